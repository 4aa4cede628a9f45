"""The verbs of root keys: list, add, test, remove.

Owns: what each of them answers and records, and which root keys may be removed. Invariants: a root key is added only
after it was proved to open the keyring; one is removed only if another one stays that was tested recently. Both leave
two audit lines, one before they begin, so that none happens without a trace. A removal takes effect at once, and the
KEK rotation that ends the revocation goes on by itself (`minikms_daemon.service.keks`). It must never keep a root key:
the caller releases it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api.base64 import decode_canonical
from minikms.api.errors import DecryptionError, InvalidRequestError, NotFoundError, NotTestedError, WrongSlotError
from minikms.audit import Event
from minikms.crypto import roots
from minikms.crypto.shares import SHARES_COUNT_MAX, THRESHOLD_MIN
from minikms.custody.vault import Permit
from minikms.keys import keyring, root_slots
from minikms.keys.keyring import Body, RevokingRoot, RootSlot, ShareSet
from minikms.memory.arena import SecretSlot
from minikms.platform.clock import HOUR_NS, now_ns, now_rfc3339, rfc3339
from minikms_daemon.service.base import another_line
from minikms_daemon.service.keks import KekVerbs, RotateToRoot

_DIGEST_CHARS: Final = 44
"""The length of 32 bytes in base64."""
_SHARES_TEXT: Final = (
    f"shares: set_id has 16 characters of 0-9 and a-f; there are {THRESHOLD_MIN} to {SHARES_COUNT_MAX} digests of 32 "
    f"bytes; threshold is at least {THRESHOLD_MIN} and at most their number"
)
_DAY_NS: Final = 24 * 3600 * 1_000_000_000


class AddGivenRoot(api.AddRootRequest):
    """A request whose root key was taken out of the body into the arena. The caller releases `root`."""

    root: SecretSlot | None = None


class GivenRootTest(api.RootTestRequest):
    """A request whose root key was taken out of the body into the arena. The caller releases `root`."""

    root: SecretSlot | None = None


WITH_ROOT: Final[dict[api.Verb[Any, Any], type[api.Request]]] = {
    api.ROTATE_KEK: RotateToRoot,
    api.ADD_ROOT: AddGivenRoot,
    api.TEST_ROOT: GivenRootTest,
}
"""What the daemon makes of the request of each verb with a `root_field`."""


@dataclass(eq=False, repr=False, kw_only=True)
class RootVerbs:
    """`in_use_slot_id`: the slot under which this run was started. What `keks` has of a run serves these verbs too."""

    keks: KekVerbs
    in_use_slot_id: str

    def __post_init__(self) -> None:
        self._audit = self.keks.table.audit
        self.keks.table.now(api.LIST_ROOTS, self.list_roots)
        self.keks.table.later(api.ADD_ROOT, self.add_root, durable=True)
        self.keks.table.later(api.TEST_ROOT, self.test_root, durable=True)
        self.keks.table.later(api.REMOVE_ROOT, self.remove_root, durable=True)

    def list_roots(self, request: api.Request, event: Event) -> api.RootListAnswer:
        """The root keys that open the keyring, then the removed ones whose revocation has not ended."""
        body = self.keks.vault.keyring.body
        return api.RootListAnswer([*map(self._describe, body.slots), *map(self._describe_revoking, body.revoking)])

    async def add_root(self, request: api.AddRootRequest, event: Event, permit: Permit) -> api.RootAnswer:
        """Adds a root key beside the others."""
        root = _root_of(request)
        if keyring.PROVIDER.fullmatch(request.provider) is None:
            raise InvalidRequestError("provider is 1 to 32 characters of a-z, 0-9 and -")
        shares = _share_set(request.shares)
        if self.keks.pin is not None:
            self.keks.pin.check_new(root.view)
        unlocked = self.keks.vault.unlocked
        await self._audit.add_written(another_line(event, "begun"), durable=True)

        def add(body: Body) -> Body:
            permit()
            root_slots.check_takes(body, roots.fingerprint(root.view))
            at, slot_id = now_rfc3339(), root_slots.next_slot_id(body)
            slot = unlocked.make_slot(root.view, request.provider, slot_id=slot_id, at=at, shares=shares)
            return root_slots.add_slot(body, slot, at=at)

        body = await self.keks.vault.keyring.change(add)
        return self._answer(body.slots[-1], event)

    async def test_root(self, request: api.RootTestRequest, event: Event, permit: Permit) -> api.RootAnswer:
        """Proves that the root key opens the slot, and writes when."""
        root = _root_of(request)
        slot_id = "" if request.slot_id is UNSET else request.slot_id
        unlocked = self.keks.vault.unlocked

        def mark(body: Body) -> Body:
            permit()
            slot = _slot(body, slot_id)
            try:
                unlocked.check_opens(root.view, slot)
            except DecryptionError:
                raise WrongSlotError(_wrong_slot_text(body, slot, roots.fingerprint(root.view))) from None
            at = now_rfc3339()
            return keyring.next_epoch(root_slots.mark_tested(body, slot_id, at=at), at=at)

        body = await self.keks.vault.keyring.change(mark)
        return self._answer(_slot(body, slot_id), event)

    async def remove_root(self, request: api.SlotRequest, event: Event, permit: Permit) -> api.RootAnswer:
        """Removes a root key. A repeated call for one that is `revoking` changes nothing."""
        slot_id = request.slot_id
        if self._revoking(slot_id) is None:

            def chosen(body: Body) -> tuple[str]:
                permit()
                _slot(body, slot_id)
                at_ns, audit = now_ns(), self.keks.vault.unlocked.audit
                root_slots.check_removes(body, (slot_id,), audit)
                root_slots.check_pace(audit, now=rfc3339(at_ns), hour_ago=rfc3339(at_ns - HOUR_NS))
                check_another_was_tested(body, slot_id)
                return (slot_id,)

            chosen(self.keks.vault.keyring.body)
            await self._audit.add_written(another_line(event, "begun"), durable=True)
            try:
                await self.keks.removal.remove(chosen)
            finally:
                self.keks.ensure_running()  # after an error too: the slot may be gone
        slot = self._revoking(slot_id)
        if slot is None:
            raise NotFoundError("no root key has this slot; `minikms root list` (GET /roots) shows them")
        event.facts = self._facts(slot)
        return self._describe_revoking(slot)

    def _revoking(self, slot_id: str) -> RevokingRoot | None:
        return next((root for root in self.keks.vault.keyring.body.revoking if root.slot_id == slot_id), None)

    def _answer(self, slot: RootSlot, event: Event) -> api.RootAnswer:
        event.facts = self._facts(slot)
        return self._describe(slot)

    def _facts(self, slot: RootSlot | RevokingRoot) -> dict[str, str | int]:
        epoch = self.keks.vault.keyring.body.epoch
        return {"epoch": epoch, "slot_id": slot.slot_id, "fingerprint": slot.fingerprint, "provider": slot.provider}

    def _describe(self, slot: RootSlot) -> api.RootAnswer:
        shares, unlocked, pin = slot.shares, self.keks.vault.unlocked, self.keks.pin
        others = unlocked.body.slots_of_others(unlocked.member_id)
        return api.RootAnswer(
            slot_id=slot.slot_id,
            fingerprint=slot.fingerprint,
            provider=slot.provider,
            state="active",
            in_use=slot.slot_id in (self.in_use_slot_id, self.keks.proved_slot_id),
            created_at=slot.created_at,
            tested_at=slot.tested_at,
            replaces=slot.replaces,
            shares=None if shares is None else api.RootShares(shares.set_id, shares.threshold, shares.count),
            pinned=None if pin is None or slot.slot_id in others else slot.fingerprint in pin.pinned(),
        )

    def _describe_revoking(self, root: RevokingRoot) -> api.RootAnswer:
        return api.RootAnswer(
            slot_id=root.slot_id,
            fingerprint=root.fingerprint,
            provider=root.provider,
            state="revoking",
            in_use=root.slot_id == self.in_use_slot_id,
            removed_at=root.removed_at,
        )


def _root_of(request: api.Request) -> SecretSlot:
    """The root key of a request that the daemon has read. Raises InvalidRequestError if it names none."""
    root = request.root if isinstance(request, (AddGivenRoot, GivenRootTest)) else None
    if root is None:
        raise InvalidRequestError("missing root_hex")
    return root


def _slot(body: Body, slot_id: str) -> RootSlot:
    slot = body.slot(slot_id) if api.SLOT_ID_PATTERN.fullmatch(slot_id) else None
    if slot is None:
        raise NotFoundError("no root key has this slot; `minikms root list` (GET /roots) shows them")
    return slot


def _share_set(request: api.GivenShares | UnsetType) -> ShareSet | None:
    if request is UNSET:
        return None
    if len(request.digests) > SHARES_COUNT_MAX or any(len(text) > _DIGEST_CHARS for text in request.digests):
        raise InvalidRequestError(_SHARES_TEXT)
    digests = tuple(decode_canonical(text, keyring.HEAD_BYTES, "digests") for text in request.digests)
    shares = ShareSet(request.set_id, request.threshold, len(digests), digests)
    if not keyring.share_set_agrees(shares):
        raise InvalidRequestError(_SHARES_TEXT)
    return shares


def _wrong_slot_text(body: Body, slot: RootSlot, fingerprint: str) -> str:
    other = body.slot_for(fingerprint)
    known = "it opens no slot" if other is None else f"it opens slot {other.slot_id}"
    return f"the root key {fingerprint} does not open slot {slot.slot_id}, which belongs to {slot.fingerprint}; {known}"


def check_another_was_tested(body: Body, slot_id: str) -> None:
    oldest = rfc3339(now_ns() - keyring.ROOT_TEST_DAYS_MAX * _DAY_NS)  # times of this form sort as text
    if not any(slot.tested_at >= oldest for slot in body.slots if slot.slot_id != slot_id):
        raise NotTestedError(
            f"no other root key was tested in the last {keyring.ROOT_TEST_DAYS_MAX} days; test one first, with "
            "`minikms root test` (POST /roots/{slot_id}/test)"
        )
