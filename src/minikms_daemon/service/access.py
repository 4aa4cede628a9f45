"""The keys that a principal may use: what a verb gets in the place of the vault where a policy limits the caller.

Owns: whether a principal may use a verb; the decision for each key and thread that a request names; the charge of its
limits; both again after a wait. Invariants:
- A request is charged as a request before anything of it is decided, and so is one that is refused.
- The thread that decides is the one in the key's record. What a request says about threads never decides.
- A key out of scope is refused like a key that does not exist. The index in memory decides before a file is read or a
  key is opened, and the same work is done for both.
- Before each use of a key the generation of the policy is compared. After a change the principal is resolved again.
- A key whose thread nobody knows (unreadable, destroyed before this run, a file that was put there since the start) is
  visible only to principals that may use every thread.
- The limits of all keys of a request are charged together, before the first of them is used.
- Counters of refused keys do not reveal whether they exist.
It must never decide for a caller that no policy limits: that one gets the vault itself.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeVar

from minikms import api
from minikms.api import Verb
from minikms.api.errors import (
    DecryptionError,
    ForbiddenError,
    InvalidRequestError,
    KeyNotFoundError,
    KeysNotReadError,
)
from minikms.audit import Event
from minikms.crypto import aead
from minikms.custody.destruction import Destroyed
from minikms.custody.open_dek import OpenDek
from minikms.custody.unlimited import StatusView
from minikms.custody.vault import Indexing, Vault
from minikms.keys.dek import DekRecord, bytes_to_key_id, check_key_id, key_id_to_bytes, not_found
from minikms.keys.index import KeyPage
from minikms.policy.meters import Charge, Cost, Meters, Taken
from minikms.policy.policy import Policy, renewed
from minikms.policy.principal import Principal, require
from minikms.policy.rules import Grant, Scope

T = TypeVar("T")

DESTROYED_COUNT_MAX: Final = 4096
_NO_THREAD_CHAR: Final = "?"
_NO_THREAD: Final = ""
"""No key has this thread."""


def _pick(which: bool, yes: T, no: T) -> T:
    """One of the two, in the same steps: a conditional expression would branch, and show by its work which it was."""
    return (no, yes)[which]


@dataclass(kw_only=True)
class Access:
    """What the requests of a run share. `refusals` counts by reason, for metrics: of keys, each one once a request.
    `limited` gets the event of each request that a limit refuses.
    """

    vault: Vault
    indexing: Indexing
    policy: Policy
    meters: Meters
    refusals: Counter[str]
    limited: Callable[[Event], None]

    def __post_init__(self) -> None:
        self.cursors = _Cursors()
        self._destroyed: dict[str, str] = {}
        """Threads of keys that were destroyed in this run, by key id; at most DESTROYED_COUNT_MAX, the newest. A caller
        that got no answer can repeat the destruction, and complete one that the disk has interrupted.
        """

    def keep_thread(self, key_id: str) -> None:
        """Before the destruction of a key, with which the index forgets it."""
        thread_id, known = self.vault.index.thread_near(key_id)
        if known:
            self._destroyed.pop(key_id, None)
            self._destroyed[key_id] = thread_id
            if len(self._destroyed) > DESTROYED_COUNT_MAX:
                del self._destroyed[next(iter(self._destroyed))]

    def thread_near(self, key_id: str) -> tuple[str, bool]:
        """Looks up a key like `KeyIndex.thread_near`, also one that was destroyed in this run."""
        near, known = self.vault.index.thread_near(key_id)
        thread_id = self._destroyed.get(key_id)
        return _pick(thread_id is not None, (thread_id or "", True), (near, known))

    def enter(self, who: Principal, verb: Verb[Any, Any] | None) -> Charge:
        """Charges a request before anything else is done for it. `verb`: None where there is none. Raises
        LimitExceededError.
        """
        scope = who.scope
        return self.meters.enter(scope, () if scope is None else scope.grants_of(() if verb is None else verb.roles))

    def keys(self, who: Principal, verb: Verb[Any, Any]) -> ScopedKeys:
        """For one request, which was charged (`enter`). Raises ForbiddenError where the principal has no rights under
        the policy.
        """
        if who.scope is None or who.entered is None:
            raise ForbiddenError("no policy gives this principal a scope")
        return ScopedKeys(self, who, who.scope, verb, who.entered)


class _Decision(NamedTuple):
    """`thread_id`: the thread that was decided; empty where every thread is allowed."""

    grants: tuple[Grant, ...]
    thread_id: str


class ScopedKeys:
    """The vault as one request of a limited principal sees it. Methods of the names of `Vault` raise as those do.

    A key that the principal may not use raises KeyNotFoundError, like an unknown one. KeysNotReadError: the threads of
    the keys are not known yet. UnauthorizedError, ForbiddenError: the policy has changed, and no longer lets the
    principal do this.
    """

    __slots__ = ("_access", "_decisions", "_entered", "_not_counted", "_scope", "verb", "who")

    def __init__(self, access: Access, who: Principal, scope: Scope, verb: Verb[Any, Any], entered: Charge) -> None:
        self.who = who
        self._access = access
        self._scope = scope
        self.verb = verb
        self._entered = entered
        self._decisions: dict[str, _Decision | None] = {}
        """The decision for each key id; None: not allowed."""
        self._not_counted: int | None = 0
        """Keys that were refused before the request was charged; None: it is charged."""

    # --- the policy in force -----------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Takes the policy in force, after a wait. Raises UnauthorizedError, ForbiddenError."""
        policy = self._access.policy
        if self._scope.generation == policy.generation:
            return
        who = renewed(self.who, policy, self.verb)  # first: what was refused once is refused at every later call
        if who.scope is None:
            raise ForbiddenError("no policy gives this principal a scope")
        self.who, self._scope = who, who.scope
        self._decisions.clear()

    def check_still(self) -> None:
        """Before plaintext leaves after a wait. Raises as `refresh`, and KeyNotFoundError if a key that was used is no
        longer allowed.
        """
        if self._scope.generation == self._access.policy.generation:
            return
        used = [key_id for key_id, decision in self._decisions.items() if decision is not None]
        self.refresh()
        for key_id in used:
            self._allowed(key_id)

    def of_verb(self, verb: Verb[Any, Any]) -> ScopedKeys:
        """The view of the same principal and request for what another verb does. Raises ForbiddenError without its
        roles.
        """
        self.refresh()
        require(self.who, verb)
        keys = ScopedKeys(self._access, self.who, self._scope, verb, self._entered)
        keys._not_counted = self._not_counted
        return keys

    @property
    def status_view(self) -> StatusView:
        """The part of the status that concerns the principal."""
        if self.who.via:
            return "reduced"
        return "whole" if self._scope.everywhere("monitor") is not None else "without_key_files"

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _allowed(self, key_id: str) -> _Decision:
        """The decision for the key. Raises KeyNotFoundError, KeysNotReadError, InvalidRequestError for a malformed
        id."""
        try:
            decision = self._decisions[key_id]
        except KeyError:
            decision = self._decisions[key_id] = self._decide(key_id)
        if decision is None:
            raise not_found(key_id)
        return decision

    def _decide(self, key_id: str) -> _Decision | None:
        roles, scope = self.verb.roles, self._scope
        grants = [scope.everywhere(role) for role in roles]
        thread_id = ""
        if None in grants:
            if not self._access.indexing.complete:
                raise KeysNotReadError(
                    "key files are still being read after the start, so it is not known which keys this principal may "
                    "use; try again"
                )
            # Nothing branches on `known`: see `_pick`. No pattern but `*` matches the text in the place of an unknown
            # thread.
            near, known = self._access.thread_near(key_id)
            thread_id = _pick(known, near, _NO_THREAD_CHAR * len(near))
            of_thread = [scope.decide(role, thread_id) for role in roles]
            of_unknown = [scope.anywhere(role) for role in roles]
            grants, thread_id = _pick(known, (of_thread, near), (of_unknown, ""))
            if None in grants:
                self._count_refused_key()
        allowed = [grant for grant in grants if grant is not None]
        return _Decision(tuple(allowed), thread_id) if len(allowed) == len(roles) else None

    def _count_refused_key(self) -> None:
        """One reason for unknown keys and for those out of scope: a reader of metrics must not learn which it was."""
        if self._not_counted is None:
            self._access.refusals["unknown_key"] += 1
        else:
            self._not_counted += 1

    def _check_record(self, key_id: str, decision: _Decision, thread_id: str) -> None:
        """Checks a record that names another thread than the index. Raises KeyNotFoundError if that one is not
        allowed."""
        if decision.thread_id and thread_id != decision.thread_id and not self.allows_thread(thread_id):
            self._decisions[key_id] = None
            raise not_found(key_id)

    def allows_thread(self, thread_id: str) -> bool:
        """Whether the policy in force allows the verb on keys of this thread. Raises as `refresh`."""
        self.refresh()
        return all(self._scope.decide(role, thread_id) is not None for role in self.verb.roles)

    def permit_all_threads(self) -> None:
        """For a verb that concerns the keys of every thread. Raises as `refresh`, and ForbiddenError."""
        self.refresh()
        if any(self._scope.anywhere(role) is None for role in self.verb.roles):
            raise ForbiddenError("this concerns the keys of all threads, and the policy allows it in some threads only")

    # --- limits ------------------------------------------------------------------------------------------------------

    def charge(self, request: Any) -> Taken:
        """Takes what the request needs from the limits of the grants that decide it; unless the result is empty, no key
        may be used before `reserve`. Keys that are not allowed are left out: a request for no other keys counts as one
        request of the first grant with the role. Raises LimitExceededError, KeysNotReadError.
        """
        charge = self._access.meters.charge(self.who.scope, self._costs(request), self._entered)
        # A request that a limit refused has no answer that concerns the keys that were refused.
        self._access.refusals["unknown_key"] += self._not_counted or 0
        self._not_counted = None
        return charge

    async def reserve(self, charge: Taken) -> None:
        await self._access.meters.reserve(charge)

    def _costs(self, request: Any) -> dict[Grant, Cost]:
        self.refresh()
        items: Counter[Grant] = Counter()
        for key_id, count in _named_keys(request).items():
            try:
                grants = self._allowed(key_id).grants
            except (KeyNotFoundError, InvalidRequestError):
                continue
            items[grants[0]] += count  # once, also where several roles are needed
            for grant in grants[1:]:
                items[grant] += 0
        thread_id = request.thread_id if self.verb.creates else None
        if thread_id is not None and api.THREAD_ID_PATTERN.fullmatch(thread_id) is None:
            thread_id = None  # the verb refuses it
        if not items or thread_id is not None:
            for role in self.verb.roles:
                decides = self._scope.decide(role, thread_id)
                if decides is None:
                    raise ForbiddenError(_NOT_THIS_THREAD)
                items[decides] += 0
        charged_as = self.verb.charged_as
        return {grant: Cost(**{charged_as: count}) if charged_as else Cost() for grant, count in items.items()}

    # --- the vault ---------------------------------------------------------------------------------------------------

    def opened(self, key_id: str) -> OpenDek:
        self.refresh()
        decision = self._allowed(key_id)
        opened = self._access.vault.opened(key_id)
        self._check_record(key_id, decision, opened.thread_id)
        return opened

    def record(self, key_id: str) -> DekRecord:
        self.refresh()
        decision = self._allowed(key_id)
        record = self._access.vault.record(key_id)
        self._check_record(key_id, decision, record.thread_id)
        return record

    def check_destroyable(self, key_id: str, of_thread: str | None) -> None:
        self.refresh()
        self._allowed(key_id)
        self._access.vault.check_destroyable(key_id, of_thread)

    async def create_in_log(
        self, thread_id: str, *, purpose: api.Purpose = "thread", replaces: str = "", numbered: bool = False
    ) -> DekRecord:
        """Creates a key like `Vault.create_in_log`. Raises ForbiddenError for a thread that is out of scope."""

        def permit() -> None:
            self._permit_thread(thread_id)
            if replaces:
                self.record(replaces)

        permit()
        return await self._access.vault.create_in_log(
            thread_id, purpose=purpose, replaces=replaces, numbered=numbered, permit=permit
        )

    async def get_or_create(self, thread_id: str, *, purpose: api.Purpose) -> tuple[str, bool]:
        """Gets or creates a key like `Vault.get_or_create`. Raises ForbiddenError for a thread that is out of scope."""

        def permit() -> None:
            self._permit_thread(thread_id)

        return await self._access.vault.get_or_create(thread_id, purpose=purpose, permit=permit)

    async def retire(self, key_id: str, *, again: bool) -> DekRecord:
        return await self._access.vault.retire(key_id, again=again, permit=lambda: self._permit_key(key_id))

    async def destroy(self, key_id: str) -> Destroyed:
        self._access.keep_thread(key_id)
        return await self._access.vault.destroy(key_id, permit=lambda: self._permit_key(key_id))

    def _permit_thread(self, thread_id: str) -> None:
        if not self.allows_thread(thread_id):
            raise ForbiddenError(_NOT_THIS_THREAD)

    def _permit_key(self, key_id: str) -> None:
        self.refresh()
        self._allowed(key_id)

    def page(self, *, after: str, limit: int, thread_id: str | None, state: str | None) -> KeyPage:
        """Pages like `KeyIndex.page`, over visible keys only. Where the principal may not see every key, `after` and
        `next_after` are opaque, because they name any key. Raises InvalidRequestError for an `after` that this run did
        not give to the principal.
        """
        self.refresh()
        index = self._access.vault.index
        if self._scope.everywhere("monitor") is not None:
            return index.page(after=check_key_id(after) if after else "", limit=limit, thread_id=thread_id, state=state)
        cursors, actor = self._access.cursors, self.who.actor
        position = cursors.position(after, actor) if after else ""
        visible = self.allows_thread if thread_id is None else None
        if thread_id is not None and not self.allows_thread(thread_id):
            thread_id = _NO_THREAD  # so that the work is the same as for a thread without keys
        page = index.page(after=position, limit=limit, thread_id=thread_id, state=state, visible=visible)
        return page._replace(next_after=cursors.cursor(page.next_after, actor) if page.next_after else "")


Keys = Vault | ScopedKeys
"""What a verb uses keys through: the vault itself, where no policy limits the caller."""

_NOT_THIS_THREAD: Final = "the policy does not let this principal use this thread"


class _Cursors:
    """Encrypts the positions of listings under a key of this run, with a cipher for each call. The key is not in the
    arena: it protects nothing else.
    """

    def __init__(self) -> None:
        self._key = memoryview(os.urandom(aead.KEY_BYTES))

    def cursor(self, key_id: str, actor: str) -> str:
        nonce = os.urandom(aead.NONCE_BYTES)
        return aead.seal(self._key, nonce, key_id_to_bytes(key_id), actor.encode()).hex()

    def position(self, cursor: str, actor: str) -> str:
        try:
            sealed = bytes.fromhex(cursor if len(cursor) <= api.ID_CHARS_MAX else "")
            raw = aead.open_sealed(self._key, sealed, actor.encode())
        except (ValueError, DecryptionError):
            raise InvalidRequestError(
                "the cursor is not one that this run of the key service gave to this principal: begin the listing again"
            ) from None
        return bytes_to_key_id(raw)


def _named_keys(request: Any) -> Counter[str]:
    """The keys that a request names, each with the number of items to charge for it."""
    fields = request.__struct_fields__
    if "items" not in fields:
        return Counter([request.key_id]) if "key_id" in fields else Counter()
    if "from_key_id" in fields:
        return Counter({request.to_key_id: 0, request.from_key_id: len(request.items)})
    if "key_id" in fields:
        return Counter({request.key_id: len(request.items)})
    return Counter(item.key_id for item in request.items)
