"""The frame of every verb: authorise, act, audit.

Owns: the methods by verb, and what all of them have in common: the role check, the bound of a batch, the encoding of
the answer, and the audit line of a success, a refusal and a cancellation. For a caller that a policy limits also the
charge of its limits, and the check of the policy after each wait (`minikms_daemon.service.access`). Invariants: no
method acts before the caller was authorised; the audit line exists before the answer leaves. It must never answer after
a failure.

A method gets the request and the audit event, adds to the event what it learns, and returns the answer or raises a
KmsRefusedError. There are three ways to add one to the table:

- `now`: it answers in the turn of the event loop in which it was called. The daemon writes the audit lines of a turn
  with one write before the answers of the turn leave.
- `later`: it awaits something. Its audit line is written before its answer exists.
- `hot`: `/encrypt`, which does all of this itself for a caller without limits and a key that is opened, because every
  call and look-up on its path was measured. For the others it calls what `now_on_keys` made.

A method that uses keys is added with `now_on_keys` or `later_on_keys`, and gets them first: the vault, or for a limited
caller a `ScopedKeys`. It must never use a key in another way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api import Verb
from minikms.api.errors import ForbiddenError, KmsRefusedError, LimitExceededError, TooManyError
from minikms.audit import Event
from minikms.custody.vault import Permit, Vault, permitted
from minikms.http import Response
from minikms.policy.principal import Principal, require
from minikms_daemon.service.encoding import Reply, encoding_of, json_answer, refused_item

if TYPE_CHECKING:
    from minikms.policy.meters import Taken
    from minikms_daemon.service.access import Access, Keys, ScopedKeys

AUDIT_RETRY_SECONDS: Final = 1.0
"""Pause before a line about what the daemon did by itself is tried again."""

R = TypeVar("R", bound=api.Request)
A = TypeVar("A")

Perform = Callable[[Principal, R, str], Reply | Awaitable[Reply]]
"""Carries out one request of a principal; the text is the id of the request, `""` if it has none."""

_KEY_ID_OF: Final = attrgetter("key_id")
_REQUEST_ID_OF: Final = attrgetter("request_id")


class Audit(Protocol):
    """What the service needs of the audit log."""

    def add(self, event: Event) -> None:
        """Queues the event of an answer of this turn. If it can't be written, the answer is not sent."""

    async def add_written(self, event: Event, *, durable: bool) -> None:
        """Writes the event's line now, for an answer of a later turn; `durable` also waits for fsync.

        Raises AuditUnavailableError.
        """

    def require_writable(self) -> None:
        """Checks that the last line could be written. Raises AuditUnavailableError."""


class Later(NamedTuple):
    """Returned by a `now` method that has to await something: the rest of its work."""

    act: Callable[[], Awaitable[Reply]]


class AfterLine(NamedTuple, Generic[A]):
    """Returned by a `later` method that waits for more after its audit line was written: the rest of its work.

    A failure or a cancellation of the rest writes no further line.
    """

    act: Callable[[], Awaitable[A | Reply]]


class VerbTable:
    """The method of each verb that is served. `access`: of callers that a policy limits; without it none is served."""

    def __init__(self, audit: Audit, access: Access | None = None) -> None:
        self.audit = audit
        self._access = access
        self._performs: dict[Verb[Any, Any], Perform[Any]] = {}

    def __contains__(self, verb: Verb[Any, Any]) -> bool:
        return verb in self._performs

    def __getitem__(self, verb: Verb[R, Any]) -> Perform[R]:
        return self._performs[verb]

    def hot(self, verb: Verb[R, Any], perform: Perform[R]) -> None:
        """Adds a method that authorises and audits by itself."""
        self._performs[verb] = perform

    def now(self, verb: Verb[R, A], act: Callable[[R, Event], A | Reply | Later]) -> None:
        """Adds a method that answers in the same turn and uses no keys."""
        self._now(verb, act, lambda keys, request, event: act(request, event))

    def now_on_keys(self, verb: Verb[R, A], vault: Vault, act: Callable[[Keys, R, Event], A | Reply | Later]) -> None:
        """Adds a method that answers in the same turn and uses keys of `vault`."""
        self._now(verb, partial(act, vault), act)

    def later(
        self,
        verb: Verb[R, A],
        act: Callable[[R, Event, Permit], Awaitable[A | Reply | AfterLine[A]]],
        *,
        durable: bool = False,
        audited: bool = True,
    ) -> None:
        """Adds a method that awaits and uses no keys. It calls the `Permit` after each wait, before it changes
        anything. `durable`: it changes keys, so the audit log must be writable before it begins, and its audit line is
        on disk before the answer. `audited`: False for reports about the audit log itself, of which only refusals leave
        a line.
        """

        def act_unscoped(request: R, event: Event) -> Awaitable[A | Reply | AfterLine[A]]:
            return act(request, event, permitted)

        def act_scoped(keys: Keys, request: R, event: Event) -> Awaitable[A | Reply | AfterLine[A]]:
            return act(request, event, keys.refresh)

        self._later(verb, act_unscoped, act_scoped, durable=durable, audited=audited)

    def later_on_keys(
        self,
        verb: Verb[R, A],
        vault: Vault,
        act: Callable[[Keys, R, Event], Awaitable[A | Reply | AfterLine[A]]],
        *,
        durable: bool = False,
    ) -> None:
        """Adds a method that awaits and uses keys of `vault`. `durable`: as for `later`."""
        self._later(verb, partial(act, vault), act, durable=durable)

    def _now(
        self,
        verb: Verb[R, A],
        act: Callable[[R, Event], A | Reply | Later],
        act_scoped: Callable[[Keys, R, Event], A | Reply | Later],
    ) -> None:
        frame = _Frame(verb)
        begin, authorise, add = frame.event, frame.authorise, self.audit.add
        scoped = self._scoped_now(verb, act_scoped)

        def perform(who: Principal, request: R, request_id: str) -> Reply | Awaitable[Reply]:
            if who.scope is not None:
                return scoped(who, request, request_id)
            event = begin(who, request, request_id)
            try:
                forbidden = authorise(who, request, event)
                answer = act(request, event) if forbidden is None else _refuse_items(request, event, forbidden)
            except Exception as error:
                self.refused(event, error)
                raise
            if type(answer) is bytes:  # of most requests
                add(event)
                return answer
            if isinstance(answer, Later):
                return self.put_off(event, answer.act)
            add(event)
            return _reply(answer)

        self._performs[verb] = perform

    def _later(
        self,
        verb: Verb[R, A],
        act: Callable[[R, Event], Awaitable[A | Reply | AfterLine[A]]],
        act_scoped: Callable[[Keys, R, Event], Awaitable[A | Reply | AfterLine[A]]],
        *,
        durable: bool,
        audited: bool = True,
    ) -> None:
        frame = _Frame(verb)

        def perform(who: Principal, request: R, request_id: str) -> Awaitable[Reply]:
            event = frame.event(who, request, request_id)

            async def authorised() -> A | Reply | AfterLine[A]:
                frame.require(who, request, event)
                if durable:
                    self.audit.require_writable()
                return await act(request, event)

            if who.scope is None:
                return self.put_off(event, authorised, durable=durable, audited=audited)

            async def authorised_and_charged() -> A | Reply | AfterLine[A]:
                keys.refresh()  # the task begins in a later step than the request
                frame.require(keys.who, request, event)
                if durable:
                    self.audit.require_writable()
                if charge := keys.charge(request):
                    await keys.reserve(charge)
                return await act_scoped(keys, request, event)

            try:
                keys = self._view(who, verb)
            except KmsRefusedError as error:
                self.refused(event, error)
                raise
            return self.put_off(event, authorised_and_charged, durable=durable, audited=audited, keys=keys)

        self._performs[verb] = perform

    def _scoped_now(self, verb: Verb[R, A], act: Callable[[Keys, R, Event], A | Reply | Later]) -> Perform[R]:
        """What `now_on_keys` does for a caller that a policy limits."""
        frame = _Frame(verb)

        async def act_reserved(keys: ScopedKeys, charge: Taken, request: R, event: Event) -> Reply:
            await keys.reserve(charge)
            answer = act(keys, request, event)
            return await answer.act() if isinstance(answer, Later) else _reply(answer)

        def perform(who: Principal, request: R, request_id: str) -> Reply | Awaitable[Reply]:
            event = frame.event(who, request, request_id)
            try:
                keys = self._view(who, verb)
                forbidden = frame.authorise(who, request, event)
                if forbidden is not None:
                    answer: A | Reply | Later = _refuse_items(request, event, forbidden)
                else:
                    charge = keys.charge(request)
                    if charge:
                        answer = Later(partial(act_reserved, keys, charge, request, event))
                    else:
                        answer = act(keys, request, event)
                    if isinstance(answer, Later):
                        return self.put_off(event, answer.act, keys=keys)
            except Exception as error:
                self.refused(event, error)
                raise
            self.audit.add(event)
            return _reply(answer)

        return perform

    def entered(self, who: Principal, verb: Verb[Any, Any] | None) -> Principal:
        """The caller of a request, which was charged before anything else is done for it: before it is decoded, and
        whatever becomes of it (`Meters.enter`). No limit holds up a seal by who may seal. `verb`: None where there is
        none. Raises LimitExceededError.
        """
        if self._access is None or (verb is api.SEAL and not who.via and who.roles.issuperset(verb.roles)):
            return who
        try:
            return msgspec.structs.replace(who, entered=self._access.enter(who, verb))
        except LimitExceededError as error:
            self.refused(request_event("" if verb is None else verb.name, who, ""), error)
            raise

    def _view(self, who: Principal, verb: Verb[Any, Any]) -> ScopedKeys:
        if self._access is None:
            raise ForbiddenError("this key service has no policy")
        if who.via:
            require(who, verb)
        return self._access.keys(who, verb)

    async def put_off(
        self,
        event: Event,
        act: Callable[[], Awaitable[A | Reply | AfterLine[A]]],
        *,
        durable: bool = False,
        audited: bool = True,
        keys: ScopedKeys | None = None,
    ) -> Reply:
        """The answer of `act`, in a later turn; its audit line is written first, whatever the outcome. `audited`: False
        leaves the line out, unless it is of a refusal. `keys`: those of a caller that a policy limits.
        """
        try:
            answer = await act()
        except Exception as error:
            event.outcome = _outcome(error)
            if not self._only_counted(event, error):
                await self.audit.add_written(event, durable=False)
            raise
        except asyncio.CancelledError:
            # Cancelled at shutdown; its effects may already be durable.
            event.outcome = api.CODE_INTERRUPTED
            if audited:
                self.audit.add(event)
            raise
        if audited:
            await self.audit.add_written(event, durable=durable)
        if keys is not None and keys.verb.answers_plaintext:
            try:
                keys.check_still()
            except KmsRefusedError as error:
                withheld = another_line(event, "the policy changed before the answer left, so it was withheld")
                self.refused(withheld, error)
                raise
        return _reply(await answer.act() if isinstance(answer, AfterLine) else answer)

    def refused(self, event: Event, error: Exception) -> None:
        """Audits a refusal, or an unexpected error, that is answered in this turn. Refusals by a limit are counted."""
        event.outcome = _outcome(error)
        if not self._only_counted(event, error):
            self.audit.add(event)

    def _only_counted(self, event: Event, error: Exception) -> bool:
        """Counts a refusal by a policy. True: it has no line of its own, because a limit refused it."""
        access = self._access
        if access is None:
            return False
        if isinstance(error, LimitExceededError):
            access.refusals[error.limit] += 1
            access.limited(event)
            return True
        if isinstance(error, ForbiddenError):
            access.refusals["forbidden"] += 1
        return False

    def malformed(self, verb: Verb[Any, Any], who: Principal, error: Exception, request_id: str) -> None:
        """Audits a request whose body or query could not be decoded."""
        self.refused(request_event(verb.name, who, request_id), error)


def request_event(name: str, who: Principal, request_id: str) -> Event:
    """The audit event of a request that reached no method. `name`: of its verb."""
    facts: dict[str, str | int] = {"via": who.via} if who.via else {}
    return Event(type=name, actor=who.actor, pid=who.pid, request_id=request_id, facts=facts)


class _Frame:
    """What is done before a method acts, prepared for one verb."""

    __slots__ = ("_creates", "_is_batch", "_name", "_names_itself", "_needed", "_roles", "_roles_by_item")

    def __init__(self, verb: Verb[Any, Any]) -> None:
        self._name = verb.name
        self._roles = verb.roles
        self._needed = frozenset(verb.roles)
        self._roles_by_item = verb.roles_by_item
        self._is_batch = verb.is_batch
        self._creates = verb.creates
        self._names_itself = "request_id" in verb.request.__struct_fields__

    def event(self, who: Principal, request: Any, request_id: str) -> Event:
        """The audit event of a request. An id in the body is preferred to that of the HTTP header."""
        if self._names_itself and request.request_id is not UNSET:
            request_id = cut(request.request_id)
        event = Event(type=self._name, actor=who.actor, pid=who.pid, request_id=request_id)
        if who.via:
            event.facts = {"via": who.via}
        if self._is_batch:
            event.count = len(request.items)
        if self._creates and api.THREAD_ID_PATTERN.fullmatch(request.thread_id) is not None:
            event.thread_id = request.thread_id  # also of one that is refused
        return event

    def require(self, who: Principal, request: Any, event: Event) -> None:
        forbidden = self.authorise(who, request, event)
        if forbidden is not None:
            try:
                raise forbidden
            finally:
                del forbidden  # the traceback of an error leads to this frame

    def authorise(self, who: Principal, request: Any, event: Event) -> ForbiddenError | None:
        """Checks roles and limits. Raises ForbiddenError, or returns it where each item is refused by itself. Raises
        TooManyError.
        """
        forbidden: ForbiddenError | None = None
        if not self._needed <= who.roles:
            try:
                for role in self._roles:
                    who.require(role)
            except ForbiddenError as error:
                if not self._roles_by_item:
                    raise
                forbidden = error
        if not self._is_batch:
            return forbidden
        if len(request.items) > api.BATCH_ITEMS_MAX:
            raise TooManyError(f"a batch holds at most {api.BATCH_ITEMS_MAX} items; send several batches")
        if self._roles_by_item and forbidden is None:  # a caller without the role can't fill the log with ids
            event.key_ids = _distinct(map(_KEY_ID_OF, request.items))
            event.request_ids = _distinct(map(_REQUEST_ID_OF, request.items))
        return forbidden


def _outcome(error: Exception) -> str:
    """`internal` for an exception of any other type than KmsRefusedError: a defect leaves a line too."""
    return error.code if isinstance(error, KmsRefusedError) else api.CODE_INTERNAL


def another_line(event: Event, detail: str) -> Event:
    """An event for a second audit line about the same request."""
    return Event(
        type=event.type,
        actor=event.actor,
        pid=event.pid,
        key_id=event.key_id,
        request_id=event.request_id,
        detail=detail,
        facts={"via": event.facts["via"]} if "via" in event.facts else {},
    )


def _reply(answer: object) -> Reply:
    return answer if isinstance(answer, (bytes, Response)) else json_answer(answer)


def _refuse_items(request: Any, event: Event, error: KmsRefusedError) -> Reply:
    count_refused(event, len(request.items))
    return encoding_of(request).items("", [refused_item(error)] * len(request.items), len(request.items))


def count_refused(event: Event, count: int) -> None:
    if count:
        event.outcome = "partly_refused"
        event.detail = f"{count} refused"


def cut(text: str) -> str:
    """An id for the audit log. A longer text than an id may be is cut, so that a client can't fill the log."""
    return text if len(text) <= api.ID_CHARS_MAX else text[:32] + "…"


def _distinct(ids: Iterable[str | UnsetType | None]) -> list[str]:
    """Each id once, without absent ones, for the audit log. Most batches name one, so that few are left to be cut."""
    return list(dict.fromkeys([cut(text) for text in dict.fromkeys(ids) if isinstance(text, str)]))
