"""The keyring: root slots, KEK versions, audit keys, epoch, and how far the file of tombstones goes.

Owns: the keyring's content and file format (docs/spec/formats.md), the table of legal moves of a KEK version, and every
change of the keyring. Each change is a pure function from one body to the next.

Hierarchy: the keyring key is sealed to each slot, and each slot opens under one root key. Slots are alternatives. The
keyring key wraps the KEK versions and the audit keys, and authenticates the body (GMAC over its exact bytes). A slot is
removed together with the keyring key: a fresh one is sealed to the slots that stay, so the removed root key and an old
keyring do not open a later keyring. The removed root key is `revoking` until no DEK file is wrapped under a KEK version
that it could open.

Invariants: exactly one KEK version is `active`, and at most one is `pending`. Every written body has a higher epoch
than the one before it. The number of a KEK version is never used again. An illegal move raises and changes nothing. It
must never hold unwrapped key material: that is in `minikms.keys.unlocked`. Changes of the slots are in
`minikms.keys.root_slots`.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal

import msgspec

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import ConflictError, StartError
from minikms.crypto.aead import KEY_BYTES, OVERHEAD_BYTES
from minikms.crypto.hpke import PUBLIC_KEY_BYTES
from minikms.crypto.shares import SET_ID, SHARES_COUNT_MAX, THRESHOLD_MIN
from minikms.crypto.slots import COMMITMENT_BYTES, MAC_BYTES, SEALED_BYTES
from minikms.keys.tombstones import TOMBSTONES_COUNT_MAX

FORMAT: Final = "minikms-keyring"
VERSION: Final = 5
"""The first one that was released, with miniKMS 0.2.0."""
FILE_BYTES_MAX: Final = 256 * 1024 * 1024
VERSION_MAX: Final = 2**32
"""Exclusive bound of the numbers of KEKs, audit keys and keyring keys."""
SLOTS_MAX: Final = 16
ROOT_TEST_DAYS_MAX: Final = 90
"""Days for which a root key counts as tested."""
KEKS_OPEN_COUNT_MAX: Final = 64
"""KEK versions that are not destroyed. Each takes a slot of the arena."""
AUDIT_KEYS_COUNT_MAX: Final = 1024
"""Each removal of a root key takes one, and it stays as long as a line of the log is under it. Each takes two slots of
the arena and about 400 bytes of the file.
"""
AUDIT_KEYS_COUNT_WARN: Final = 900
RETIRED_ROOTS_MAX: Final = 64
HEAD_BYTES: Final = 32
"""The size of a SHA-256."""
WRAPPED_KEY_BYTES: Final = KEY_BYTES + OVERHEAD_BYTES

PROVIDER: Final = re.compile(r"[a-z0-9-]{1,32}", re.ASCII)


# --- KEK states -------------------------------------------------------------------------------------------------------

KekState = Literal["pending", "active", "retired", "destroyed"]
"""`pending`: a rotation to it is running and new DEKs are wrapped under it; `retired`: it only unwraps."""
KekMove = Literal["promote", "retire", "destroy"]

KEK_MOVES: Final[dict[tuple[KekState, KekMove], KekState]] = {
    ("pending", "promote"): "active",
    ("active", "retire"): "retired",
    ("retired", "destroy"): "destroyed",
}


def move_kek(state: KekState, move: KekMove) -> KekState:
    """The state after a move. Raises ConflictError for a move that KEK_MOVES does not have."""
    try:
        return KEK_MOVES[state, move]
    except KeyError:
        done = {"promote": "promoted", "retire": "retired", "destroy": "destroyed"}[move]
        raise ConflictError(f"a KEK version that is {state} can't be {done}") from None


# --- the body and its file --------------------------------------------------------------------------------------------


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of all parts. An unknown field is refused: it might change the meaning of the known ones."""


class ShareSet(_Part, frozen=True):
    """The shares of a root key: `threshold` of `count` give it back. `digests` names a wrong share, by number."""

    set_id: str
    threshold: int
    count: int
    digests: tuple[bytes, ...]


class RootSlot(_Part, frozen=True):
    """`sealed` is the keyring key, sealed to `public_key`; `mac` authenticates it under the slot's authentication key.

    Both keys are derived from the root key (`minikms.crypto.slots`); `wrapped_auth` is the authentication key under the
    keyring key, so that a fresh keyring key can be sealed without the root key. `provider` is for people: the name of
    the root key provider that the slot was made with, or `request` for a root key that came with `POST /rotate_kek`.
    `tested_at`: when a root key last proved that it opens the slot. `replaces`: the slot that goes once this one was
    proved, by its id.
    """

    slot_id: str
    fingerprint: str
    provider: str
    created_at: str
    commitment: bytes
    tested_at: str
    public_key: bytes
    sealed: bytes
    mac: bytes
    wrapped_auth: bytes
    replaces: str = ""
    shares: ShareSet | None = None


class Kek(_Part, frozen=True):
    version: int
    state: KekState
    created_at: str
    wrapped: bytes
    retired_at: str = ""
    destroyed_at: str = ""


class AuditKeyEntry(_Part, frozen=True):
    """`since_seq` and `since_sig` name the last line of the audit log under the version before; empty for the first.

    They limit an earlier key to the lines up to there: it can't be used to write a different log.
    """

    version: int
    created_at: str
    public_key: bytes
    wrapped_key: bytes
    wrapped_seed: bytes
    since_seq: int = 0
    since_sig: bytes = b""


class Rotation(_Part, frozen=True):
    """A running rotation. `slot_id` names the slot of the new root key; empty if the root key stays."""

    from_version: int
    to_version: int
    started_at: str
    stamp: str
    slot_id: str = ""


class RetiredRoot(_Part, frozen=True):
    """`line_owed`: the audit log has no line yet about the end of its revocation."""

    fingerprint: str
    rotated_at: str
    line_owed: bool = False


class RevokingRoot(_Part, frozen=True):
    """A root key whose slot was removed, until every DEK is under KEK version `kek_version` or a later one: those it
    could never open. `line_owed`: it was replaced, and the audit log has no line yet about its removal.
    """

    slot_id: str
    fingerprint: str
    provider: str
    removed_at: str
    kek_version: int
    line_owed: bool = False


class TombstoneLog(_Part, frozen=True):
    """How far the file of tombstones goes: the number of its records, and SHA-256 of the file up to the last of them.

    `wrapped_key` is the tombstone key, sealed under the keyring key.
    """

    count: int
    head: bytes
    wrapped_key: bytes


class AuditState(_Part, frozen=True):
    """What the keyring has of one audit log: its keys, and the tree of the auditor that was attached first; empty if
    none was.
    """

    audit_keys: tuple[AuditKeyEntry, ...]
    audit_origin: str = ""

    @property
    def current(self) -> AuditKeyEntry:
        """The key of all further lines."""
        return self.audit_keys[-1]


class Member(_Part, frozen=True):
    """A host of a replicated key service. `slot_id`: of the root key that it joined with, or of the one that replaced
    it. `audit`: of its own log; None for the host that the keyring was made on, which has what the body has.
    `key_version`: the keyring key under which its newest audit key was made; with an older one, the member changes its
    audit key before it serves. `unconfirmed`: this key may not be in use, since a crash or a lost connection may have
    come between the database and its log.
    """

    member_id: str
    name: str
    slot_id: str
    joined_at: str
    key_version: int
    audit: AuditState | None = None
    unconfirmed: bool = False


class Body(_Part, frozen=True):
    format: str
    version: int
    keyring_id: str
    epoch: int
    created_at: str
    updated_at: str
    key_version: int
    slots: tuple[RootSlot, ...]
    keks: tuple[Kek, ...]
    audit_keys: tuple[AuditKeyEntry, ...]
    tombstone_log: TombstoneLog
    rotation: Rotation | None = None
    retired_roots: tuple[RetiredRoot, ...] = ()
    revoking: tuple[RevokingRoot, ...] = ()
    audit_origin: str = ""
    """The tree of the auditor that was attached first; empty: none was."""
    members: tuple[Member, ...] = ()
    """The hosts that have this keyring; empty: one host, which is not replicated."""

    def kek(self, version: int) -> Kek | None:
        """The KEK version, also a destroyed one; None if there was never one of this number."""
        return next((kek for kek in self.keks if kek.version == version), None)

    def has_kek(self, version: int) -> bool:
        """Whether there is a KEK of this version that was not destroyed."""
        kek = self.kek(version)
        return kek is not None and kek.state != "destroyed"

    def kek_in_state(self, state: KekState) -> Kek | None:
        return next((kek for kek in self.keks if kek.state == state), None)

    @property
    def wrapping_kek(self) -> Kek:
        """The KEK version that wraps new DEKs: the pending one during a rotation, otherwise the active one."""
        kek = self.kek_in_state("pending") or self.kek_in_state("active")
        if kek is None:
            raise StartError("the keyring has no active KEK version")
        return kek

    def member(self, member_id: str) -> Member | None:
        return next((member for member in self.members if member.member_id == member_id), None)

    def slots_of_others(self, member_id: str) -> frozenset[str]:
        """The slots whose root keys are on other hosts: they open nothing here."""
        return frozenset(member.slot_id for member in self.members if member.member_id != member_id)

    def without_member(self, member_id: str) -> Body:
        """The body without this host. The epoch stays."""
        return msgspec.structs.replace(self, members=tuple(one for one in self.members if one.member_id != member_id))

    def audit_of(self, member_id: str) -> AuditState:
        """The audit state of a member; without such a member, that of the host on which the keyring was made."""
        member = self.member(member_id)
        if member is None or member.audit is None:
            return AuditState(self.audit_keys, self.audit_origin)
        return member.audit

    def slot(self, slot_id: str) -> RootSlot | None:
        return next((slot for slot in self.slots if slot.slot_id == slot_id), None)

    def slot_for(self, fingerprint: str) -> RootSlot | None:
        return next((slot for slot in self.slots if slot.fingerprint == fingerprint), None)

    @property
    def revocation_due(self) -> bool:
        """Whether a removed root key could open the KEK in use, and no rotation runs that changes this."""
        active = self.kek_in_state("active")
        needed = max((root.kek_version for root in self.revoking), default=0)
        return self.rotation is None and active is not None and active.version < needed


class File(msgspec.Struct, forbid_unknown_fields=True):
    """The members of the file. `body` keeps its exact bytes, which the tag authenticates."""

    body: msgspec.Raw
    tag: bytes


_file_decoder = msgspec.json.Decoder(File)
WAY_OUT: Final = (
    "restore keyring.json from a backup: `minikms backup list` shows the backups, the runbook has the steps, and "
    "`minikms doctor` checks every file"
)
"""The advice about a keyring that can't be used. Ends the text of a StartError."""

_body_decoder = msgspec.json.Decoder(Body)
_encoder = msgspec.json.Encoder()


def encode_body(body: Body) -> bytes:
    return _encoder.encode(body)


def encode_file(body_bytes: bytes, tag: bytes) -> bytes:
    return b'{"body":' + body_bytes + b',"tag":"' + binascii.b2a_base64(tag, newline=False) + b'"}\n'


def parse_file(data: bytes) -> tuple[Body, bytes, bytes]:
    """(body, its exact bytes, tag). Not authenticated yet: the caller checks the tag. Raises StartError."""
    try:
        file = _file_decoder.decode(data)
        body_bytes = bytes(file.body)
        body = _body_decoder.decode(body_bytes)
    except UNDECODABLE:
        _check_version(_version_of(data))
        raise StartError(f"the keyring is damaged or of an unknown format version; {WAY_OUT}") from None
    if body.format != FORMAT:
        raise StartError(f"the keyring has format {body.format!r}, which this program does not read; {WAY_OUT}")
    _check_version(body.version)
    check(body)
    return body, body_bytes, file.tag


class _Versioned(msgspec.Struct):
    format: str
    version: int


class _VersionedFile(msgspec.Struct):
    body: _Versioned


def _version_of(data: bytes) -> int:
    """The format version of a keyring whose other members this program may not know; VERSION if it has none."""
    try:
        body = msgspec.json.decode(data, type=_VersionedFile).body
    except UNDECODABLE:
        return VERSION
    return body.version if body.format == FORMAT else VERSION


def _check_version(version: int) -> None:
    """Checks the format version; one of another program is a StartError."""
    if version < VERSION:
        raise StartError(
            "the data directory was made before version 0.2.0, the first one whose formats are kept: make a new one "
            "with `minikms init`"
        )
    if version > VERSION:
        raise StartError(
            f"a newer program wrote the keyring: it has format version {version}, and this program reads {VERSION}. "
            "Start the newer version of miniKMS; an older one can't read the file (the runbook says how)"
        )


def check(body: Body) -> None:
    """Checks the invariants of this module. A body that breaks one is a StartError."""
    agree = _keks_agree(body) and _slots_agree(body) and _tombstones_agree(body) and _members_agree(body)
    logs = [body.audit_of(""), *(member.audit for member in body.members if member.audit is not None)]
    if not (agree and all(map(_audit_agrees, logs)) and body.epoch >= 1):
        raise StartError(f"the keyring is inconsistent; {WAY_OUT}")


def _keks_agree(body: Body) -> bool:
    states = [kek.state for kek in body.keks]
    active, pending, rotation = body.kek_in_state("active"), body.kek_in_state("pending"), body.rotation
    if active is None or states.count("active") != 1 or states.count("pending") > 1:
        return False
    if rotation is None:
        rotates = pending is None
    else:
        rotates = pending is not None and (rotation.from_version, rotation.to_version) == (
            active.version,
            pending.version,
        )
    return (
        rotates
        and _rises((*(kek.version for kek in body.keks), VERSION_MAX))
        and len(states) - states.count("destroyed") <= KEKS_OPEN_COUNT_MAX
    )


def _slots_agree(body: Body) -> bool:
    ids = {slot.slot_id for slot in body.slots}
    names = {slot.fingerprint for slot in body.slots}
    revoked = {root.fingerprint for root in body.revoking}
    return (
        1 <= len(body.slots) <= SLOTS_MAX
        and len(ids) == len(names) == len(body.slots)
        and (body.rotation is None or body.rotation.slot_id in ids | {""})
        and 0 < body.key_version < VERSION_MAX
        and len(body.revoking) <= RETIRED_ROOTS_MAX
        and all(0 < root.kek_version <= VERSION_MAX for root in body.revoking)
        and all(_slot_agrees(slot) and slot.fingerprint not in revoked for slot in body.slots)
        and all(slot.replaces in ids for slot in body.slots if slot.replaces)
    )


def _slot_agrees(slot: RootSlot) -> bool:
    return (
        api.SLOT_ID_PATTERN.fullmatch(slot.slot_id) is not None
        and PROVIDER.fullmatch(slot.provider) is not None
        and slot.replaces != slot.slot_id
        and (len(slot.commitment), len(slot.public_key), len(slot.sealed), len(slot.mac), len(slot.wrapped_auth))
        == (COMMITMENT_BYTES, PUBLIC_KEY_BYTES, SEALED_BYTES, MAC_BYTES, WRAPPED_KEY_BYTES)
        and (slot.shares is None or share_set_agrees(slot.shares))
    )


def share_set_agrees(shares: ShareSet) -> bool:
    """Whether the numbers of a set of shares are in their bounds."""
    return (
        SET_ID.fullmatch(shares.set_id) is not None
        and THRESHOLD_MIN <= shares.threshold <= shares.count <= SHARES_COUNT_MAX
        and len(shares.digests) == shares.count
        and all(len(digest) == HEAD_BYTES for digest in shares.digests)
    )


def _audit_agrees(audit: AuditState) -> bool:
    versions = [key.version for key in audit.audit_keys]
    origin = not audit.audit_origin or api.ORIGIN_PATTERN.fullmatch(audit.audit_origin) is not None
    return origin and 1 <= len(versions) <= AUDIT_KEYS_COUNT_MAX and _rises((*versions, VERSION_MAX))


def _members_agree(body: Body) -> bool:
    ids, names = ({getattr(member, field) for member in body.members} for field in ("member_id", "name"))
    return (
        len(ids) == len(names) == len(body.members) <= api.MEMBERS_MAX
        and sum(member.audit is None for member in body.members) <= 1
        and all(
            api.MEMBER_ID_PATTERN.fullmatch(member.member_id)
            and api.MEMBER_NAME_PATTERN.fullmatch(member.name)
            and api.SLOT_ID_PATTERN.fullmatch(member.slot_id)
            and 0 < member.key_version <= body.key_version
            for member in body.members
        )
    )


def _tombstones_agree(body: Body) -> bool:
    log = body.tombstone_log
    return 0 <= log.count <= TOMBSTONES_COUNT_MAX and len(log.head) == HEAD_BYTES


def _rises(versions: Iterable[int]) -> bool:
    """Whether the numbers are positive and strictly increasing."""
    before = 0
    for version in versions:
        if version <= before:
            return False
        before = version
    return True


# --- changes: each returns the next body, with a higher epoch ---------------------------------------------------------


def next_epoch(body: Body, *, at: str, **changes: object) -> Body:
    """`body` with `changes`, one epoch later."""
    changed = msgspec.structs.replace(body, epoch=body.epoch + 1, updated_at=at, **changes)
    check(changed)
    return changed


def add_audit_key(body: Body, member_id: str, key: AuditKeyEntry, *, at: str) -> Body:
    """`with_audit_key`, one epoch later. Raises ConflictError if there are too many."""
    check_takes_audit_key(body.audit_of(member_id))
    return next_epoch(with_audit_key(body, member_id, key), at=at)


def with_audit_key(body: Body, member_id: str, key: AuditKeyEntry, *, in_use: int = VERSION_MAX) -> Body:
    """The body with a key, made under its keyring key, for all further lines of a member's log. Those above version
    `in_use` go: the log went on without them. `confirmed` comes next. The epoch stays.
    """
    former_keys = (former for former in body.audit_of(member_id).audit_keys if former.version <= in_use)
    body = with_audit(body, member_id, audit_keys=(*former_keys, key))
    return _with_member(body, member_id, key_version=body.key_version, unconfirmed=True)


def confirmed(body: Body, member_id: str) -> Body:
    """The body after the log of a member has begun to use its newest audit key. The epoch stays."""
    return _with_member(body, member_id, unconfirmed=False)


def _with_member(body: Body, member_id: str, **changes: Any) -> Body:
    members = tuple(
        msgspec.structs.replace(member, **changes) if member.member_id == member_id else member
        for member in body.members
    )
    return msgspec.structs.replace(body, members=members)


def without_audit_keys(body: Body, member_id: str, *, before: int) -> Body:
    """The body without the audit keys of a member below version `before`, which no line of its log is under. The epoch
    stays.
    """
    keys = body.audit_of(member_id).audit_keys
    newer = tuple(key for key in keys if key.version >= before)
    return with_audit(body, member_id, audit_keys=newer or keys[-1:])


def with_audit(body: Body, member_id: str, **changes: Any) -> Body:
    """The body with another state of a member's audit log; `changes` are those of `AuditState`. The epoch stays."""
    if (member := body.member(member_id)) is None or member.audit is None:
        return msgspec.structs.replace(body, **changes)
    return _with_member(body, member_id, audit=msgspec.structs.replace(member.audit, **changes))


def check_takes_audit_key(audit: AuditState) -> None:
    """Checks that the keyring can hold another audit key of this log. Raises ConflictError."""
    if len(audit.audit_keys) >= AUDIT_KEYS_COUNT_MAX:
        raise ConflictError(
            f"the keyring holds {AUDIT_KEYS_COUNT_MAX} audit keys, which is the limit of a data directory: no root key "
            "can be removed or replaced any more. A start forgets those whose lines were removed from the audit log, "
            "as --audit-keep-mib does"
        )


def with_audit_origin(body: Body, member_id: str, origin: str, *, at: str) -> Body:
    """Records the tree of a log's first auditor. Raises ConflictError if another one is recorded."""
    recorded = body.audit_of(member_id).audit_origin
    check_audit_origin(recorded, origin)
    return body if recorded else next_epoch(with_audit(body, member_id, audit_origin=origin), at=at)


def without_audit_origin(body: Body, member_id: str, *, at: str) -> Body:
    """Forgets the tree of the auditor, so that another one can be attached."""
    return next_epoch(with_audit(body, member_id, audit_origin=""), at=at)


def check_audit_origin(recorded: str, origin: str) -> None:
    """Checks that no other origin is recorded. Raises ConflictError."""
    if recorded not in ("", origin):
        raise ConflictError(f"the audit log belongs to the origin {recorded}, and no other auditor can be attached")


def begin_rotation(body: Body, *, kek: Kek, slot: RootSlot | None, stamp: str, at: str) -> Body:
    """Step 1 of a rotation: adds the pending KEK version and, if there is a new root key, its slot.

    Raises ConflictError if a bound of this module would be exceeded.
    """
    active = body.kek_in_state("active")
    if active is None:
        raise StartError("the keyring has no active KEK version")
    check_has_room(body, kek=True, slot=slot is not None)
    rotation = Rotation(
        from_version=active.version,
        to_version=kek.version,
        started_at=at,
        stamp=stamp,
        slot_id=slot.slot_id if slot else "",
    )
    slots = body.slots if slot is None else (*body.slots, slot)
    return next_epoch(body, at=at, slots=slots, keks=(*body.keks, kek), rotation=rotation)


def check_has_room(body: Body, *, kek: bool, slot: bool) -> None:
    """Checks the bounds for another KEK version or slot. A ConflictError says what to do."""
    if kek and sum(kek.state != "destroyed" for kek in body.keks) >= KEKS_OPEN_COUNT_MAX:
        raise ConflictError(
            f"the keyring holds {KEKS_OPEN_COUNT_MAX} KEK versions; destroy the unused ones with POST /kek/prune"
        )
    if slot and len(body.slots) >= SLOTS_MAX:
        raise ConflictError(f"{SLOTS_MAX} root keys open this keyring; remove the unused ones first")


def promote(body: Body, *, at: str) -> Body:
    """Step 3 of a rotation: the pending KEK version becomes active, and the active one retired."""
    keks: list[Kek] = []
    for kek in body.keks:
        if kek.state == "active":
            keks.append(msgspec.structs.replace(kek, state=move_kek(kek.state, "retire"), retired_at=at))
        elif kek.state == "pending":
            keks.append(msgspec.structs.replace(kek, state=move_kek(kek.state, "promote")))
        else:
            keks.append(kek)
    return next_epoch(body, at=at, keks=tuple(keks), rotation=None)


def end_revocation(body: Body, *, at: str) -> Body:
    """Retires the removed root keys that can't open the active KEK version, once every DEK file is under it."""
    active = body.wrapping_kek.version if body.rotation is None else 0
    done = tuple(
        RetiredRoot(root.fingerprint, root.removed_at, line_owed=True)
        for root in body.revoking
        if root.kek_version <= active
    )
    if not done:
        return body
    return next_epoch(
        body,
        at=at,
        revoking=tuple(root for root in body.revoking if root.kek_version > active),
        retired_roots=(*body.retired_roots, *done)[-RETIRED_ROOTS_MAX:],
    )


def destroy_kek(body: Body, version: int, *, at: str) -> Body:
    """Removes the wrapped key of a retired version; its number stays. Raises ConflictError in any other state."""
    return _with_kek(
        body,
        version,
        at=at,
        change=lambda kek: {"state": move_kek(kek.state, "destroy"), "wrapped": b"", "destroyed_at": at},
    )


def with_tombstones(body: Body, count: int, head: bytes, *, at: str) -> Body:
    """`counting`, one epoch later. Raises ConflictError if there are too many."""
    return next_epoch(counting(body, count, head), at=at)


def counting(body: Body, count: int, head: bytes) -> Body:
    """The body that counts the first `count` records of the tombstone file, whose SHA-256 is `head`. The epoch stays.

    Raises ConflictError if there are too many.
    """
    if count > TOMBSTONES_COUNT_MAX:
        raise ConflictError(f"{TOMBSTONES_COUNT_MAX:,} keys were destroyed, which is the limit of a data directory")
    log = msgspec.structs.replace(body.tombstone_log, count=count, head=head)
    return msgspec.structs.replace(body, tombstone_log=log)


def _with_kek(body: Body, version: int, *, at: str, change: Callable[[Kek], dict[str, Any]]) -> Body:
    changed = tuple(msgspec.structs.replace(kek, **change(kek)) if kek.version == version else kek for kek in body.keks)
    return next_epoch(body, at=at, keks=changed)
