"""Changes of the slots of a keyring: adding, testing, replacing and removing root keys.

Owns: which root keys may be added or removed, what goes with a removed one, which slots a proved one replaces, and the
root keys of a restored keyring. Invariants: as in `minikms.keys.keyring`: each change is a pure function from one body
to the next. A root key that was removed is never added again, as long as the keyring remembers it. The last slot stays.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final, NamedTuple

import msgspec

from minikms.api.errors import ConflictError, LastRootError
from minikms.keys.keyring import (
    RETIRED_ROOTS_MAX,
    SLOTS_MAX,
    AuditKeyEntry,
    AuditState,
    Body,
    Kek,
    Member,
    RevokingRoot,
    RootSlot,
    TombstoneLog,
    check_has_room,
    check_takes_audit_key,
    confirmed,
    next_epoch,
    with_audit_key,
    without_audit_keys,
)

REMOVALS_HOUR_MAX: Final = 2 * SLOTS_MAX
"""The removal of all root keys but one is not delayed. An operator can't use up the audit keys in less than a day."""


def check_is_new(body: Body, fingerprint: str) -> None:
    """Checks that the root key neither opens the keyring nor did so before. Raises ConflictError."""
    if (slot := body.slot_for(fingerprint)) is not None:
        raise ConflictError(f"this root key opens the keyring already, as slot {slot.slot_id}; give a fresh one")
    former = {old.fingerprint for old in body.retired_roots} | {old.fingerprint for old in body.revoking}
    if fingerprint in former:
        raise ConflictError("this root key was rotated away before; give a fresh one")


def next_slot_id(body: Body) -> str:
    """For a slot that comes with the next body: named after its epoch, so no other slot has this id."""
    return f"s{body.epoch + 1}"


def check_takes(body: Body, fingerprint: str) -> None:
    """Checks that the root key is new, and that the keyring may have one more. Raises ConflictError."""
    check_has_room(body, kek=False, slot=True)
    check_is_new(body, fingerprint)


def add_slot(body: Body, slot: RootSlot, *, at: str) -> Body:
    """Adds a root key. Raises the errors of `check_takes`."""
    check_takes(body, slot.fingerprint)
    return next_epoch(body, at=at, slots=(*body.slots, slot))


def mark_tested(body: Body, slot_id: str, *, at: str) -> Body:
    """The body after a root key has proved that it opens the slot. The epoch stays."""
    slots = tuple(
        msgspec.structs.replace(slot, tested_at=at) if slot.slot_id == slot_id else slot for slot in body.slots
    )
    return msgspec.structs.replace(body, slots=slots)


def taken_over(
    body: Body, member_id: str, slot_id: str, audit_key: AuditKeyEntry | None, *, oldest: int, in_use: int, at: str
) -> Body:
    """The body of a member that is about to serve, whose root key opens the slot. `oldest`, `in_use`: the audit keys
    that its log begins and ends under. `audit_key`: for all further lines of it, or None.
    """
    body = mark_tested(without_audit_keys(body, member_id, before=oldest), slot_id, at=at)
    if audit_key is None:
        body = confirmed(body, member_id)
    else:
        check_takes_audit_key(body.audit_of(member_id))
        body = with_audit_key(body, member_id, audit_key, in_use=in_use)
    return next_epoch(body, at=at)


def check_removes(body: Body, slot_ids: Container[str], audit: AuditState) -> None:
    """Checks that these slots can be removed: a slot stays, and no bound is exceeded. `audit`: the state of the log
    that gets a fresh key. Raises ConflictError.
    """
    count = sum(slot.slot_id in slot_ids for slot in body.slots)
    if count == len(body.slots):
        raise LastRootError("the last root key can't be removed; add another one first")
    check_has_room(body, kek=True, slot=False)
    check_takes_audit_key(audit)
    if len(body.revoking) + count > RETIRED_ROOTS_MAX:
        raise ConflictError("too many removed root keys wait for a KEK rotation; see the warnings in /status")


def check_pace(audit: AuditState, *, now: str, hour_ago: str) -> None:
    """Checks that a root key may be removed or replaced now: each time takes an audit key for good. Raises
    ConflictError.
    """
    check_takes_audit_key(audit)
    if sum(hour_ago <= key.created_at <= now for key in audit.audit_keys) >= REMOVALS_HOUR_MAX:
        raise ConflictError(f"{REMOVALS_HOUR_MAX} root keys were removed or replaced in the last hour; wait")


class Resealed(NamedTuple):
    """Everything that the keyring key seals, under a fresh one of number `key_version`."""

    key_version: int
    slots: tuple[RootSlot, ...]
    keks: tuple[Kek, ...]
    audit_keys: tuple[AuditKeyEntry, ...]
    members: tuple[Member, ...]
    tombstone_log: TombstoneLog


def remove_slots(
    body: Body, resealed: Resealed, member_id: str, audit_key: AuditKeyEntry, *, at: str, proved: str = ""
) -> Body:
    """Removes every slot that `resealed` does not have. Their root keys are `revoking` until a rotation to a KEK
    version that does not exist yet has ended. `audit_key`: the key of all further lines of the log of `member_id`;
    other members change theirs before they serve. `proved`: the slot that others are removed for, which those that
    would have replaced them replace now; then lines are owed.

    Raises ConflictError if a bound of this module would be exceeded, or no slot would stay.
    """
    stay = {slot.slot_id for slot in resealed.slots}
    check_removes(body, {slot.slot_id for slot in body.slots} - stay, body.audit_of(member_id))
    needed = max(kek.version for kek in body.keks) + 1
    removed = tuple(
        RevokingRoot(slot.slot_id, slot.fingerprint, slot.provider, at, needed, line_owed=bool(proved))
        for slot in body.slots
        if slot.slot_id not in stay
    )
    rotation = body.rotation
    if rotation is not None and rotation.slot_id not in stay:
        rotation = msgspec.structs.replace(rotation, slot_id="")
    slots = tuple(
        slot
        if slot.replaces in stay
        else msgspec.structs.replace(slot, replaces=proved if slot.replaces and slot.slot_id != proved else "")
        for slot in resealed.slots
    )
    members = tuple(
        msgspec.structs.replace(member, slot_id=proved) if proved and member.slot_id not in stay else member
        for member in resealed.members
    )
    changed = msgspec.structs.replace(
        body,
        key_version=resealed.key_version,
        slots=slots,
        keks=resealed.keks,
        audit_keys=resealed.audit_keys,
        members=members,
        tombstone_log=resealed.tombstone_log,
        rotation=rotation,
        revoking=(*body.revoking, *removed),
    )
    return next_epoch(with_audit_key(changed, member_id, audit_key), at=at)


class OwedLines(NamedTuple):
    """Fingerprints of root keys about which the audit log has no line yet: of those that were replaced and removed, and
    of those whose revocation has ended.
    """

    dropped: frozenset[str]
    removed: frozenset[str]

    @classmethod
    def of(cls, body: Body) -> OwedLines:
        return cls(
            frozenset(root.fingerprint for root in body.revoking if root.line_owed),
            frozenset(root.fingerprint for root in body.retired_roots if root.line_owed),
        )

    def written(self, body: Body, *, at: str) -> Body:
        """The body after these lines were written."""
        revoking = (
            msgspec.structs.replace(root, line_owed=False) if root.fingerprint in self.dropped else root
            for root in body.revoking
        )
        retired = (
            msgspec.structs.replace(root, line_owed=False) if root.fingerprint in self.removed else root
            for root in body.retired_roots
        )
        return next_epoch(body, at=at, revoking=tuple(revoking), retired_roots=tuple(retired))


UNKNOWN_SLOT_ID: Final = "s0"
"""The id that `revoking` has for a root key whose slot is not known. No slot has this id."""


def removed_by(body: Body, later: Body) -> tuple[RevokingRoot, ...]:
    """The root keys that could open a KEK version of `body`, and open the keyring `later`, a later state of it, no
    more. They are `revoking` until a rotation to a KEK version that does not exist yet has ended.
    """
    needed = max(kek.version for kek in body.keks) + 1
    stay = {slot.fingerprint for slot in later.slots}
    slots = {slot.fingerprint: slot for slot in body.slots}
    revoked = {root.fingerprint: msgspec.structs.replace(root, kek_version=needed) for root in later.revoking}
    times = {old.fingerprint: old.rotated_at for old in later.retired_roots}
    for former in body.retired_roots:
        times.pop(former.fingerprint, None)
    for fingerprint in times.keys() | (slots.keys() - stay):
        slot = slots.get(fingerprint)
        slot_id, provider = (UNKNOWN_SLOT_ID, "unknown") if slot is None else (slot.slot_id, slot.provider)
        at = times.get(fingerprint, later.updated_at)
        revoked.setdefault(fingerprint, RevokingRoot(slot_id, fingerprint, provider, at, needed))
    return tuple(root for root in revoked.values() if root.fingerprint not in stay)


def replaced_by(body: Body, slot_id: str) -> frozenset[str]:
    """The ids of the slots that go once the slot was proved: the one that it replaces, those that this one was to
    replace, and the older ones that were to replace one of them.
    """
    order = {slot.slot_id: number for number, slot in enumerate(body.slots)}
    by_id = {slot.slot_id: slot for slot in body.slots}
    if slot_id not in by_id:
        return frozenset()
    removed_ids: set[str] = set()
    replacements = {by_id[slot_id].replaces} & by_id.keys()
    while replacements:
        removed_ids |= replacements
        named = {by_id[one].replaces for one in replacements}
        rivals = {
            slot.slot_id for slot in body.slots if slot.replaces in removed_ids and order[slot.slot_id] < order[slot_id]
        }
        replacements = ((named & by_id.keys()) | rivals) - removed_ids - {slot_id}
    return frozenset(removed_ids)
