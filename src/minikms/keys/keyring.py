"""The keyring: root slots, KEK versions, audit keys, epoch, tombstones.

Owns: the keyring's content and file format (docs/spec/formats.md), the table of legal moves of a KEK version, and every
change of the keyring. Each change is a pure function from one body to the next.

Hierarchy: each root key wraps a keyring key in its own slot. The newest keyring key wraps the KEK versions and the
audit keys, and authenticates the body (GMAC over its exact bytes). A new root key comes with a new keyring key, so an
old root key and an old keyring do not open a later keyring. Until the older slots are dropped, links lead from their
keyring key to the newest one.

Invariants: exactly one KEK version is `active`, and at most one is `pending`. Every written body has a higher epoch
than the one before it. The number of a KEK version is never used again. An illegal move raises and changes nothing. It
must never hold unwrapped key material: that is in `minikms.keys.unlocked`.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, NamedTuple

import msgspec

from minikms.errors import ConflictError, StartError

FORMAT: Final = "minikms-keyring"
VERSION: Final = 1
FILE_BYTES_MAX: Final = 256 * 1024 * 1024
VERSION_MAX: Final = 2**32
"""Exclusive bound of the numbers of KEKs, audit keys and keyring keys."""
SLOTS_MAX: Final = 16
KEKS_OPEN_COUNT_MAX: Final = 64
"""KEK versions that are not destroyed. Each takes a slot of the arena."""
AUDIT_KEYS_COUNT_MAX: Final = 64
TOMBSTONES_COUNT_MAX: Final = 1_000_000
"""About 80 MiB of the file."""
KEK_WRAPS_LEASE: Final = 2**16
"""Wraps reserved at a time. A run wastes what it leaves of a reservation, so a KEK lasts for 65,536 starts at least."""
RESTORE_WRAPS: Final = 2**26
"""Added to every KEK by a restore: more wraps than a KEK makes between two backups. A KEK lasts for 64 restores."""
KEK_WRAPS_WARN: Final = 2**31
KEK_WRAPS_MAX: Final = 2**32 - KEK_WRAPS_LEASE
"""NIST SP 800-38D, section 8.3: at most 2^32 random nonces under one key."""
RETIRED_ROOTS_MAX: Final = 64

_PROVIDER: Final = re.compile(r"[a-z0-9-]{1,32}")


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


class Slot(_Part, frozen=True):
    """`wrapped` is the keyring key of version `opens`, sealed under the root key of this slot.

    `provider` is for people: the name of the root key provider that the slot was made with, or `request` for a root key
    that came with `POST /rotate_kek`.
    """

    slot_id: str
    fingerprint: str
    provider: str
    created_at: str
    commitment: bytes
    opens: int
    wrapped: bytes


class Link(_Part, frozen=True):
    """`wrapped` is the keyring key of `version`, sealed under the version before it."""

    version: int
    wrapped: bytes


class Kek(_Part, frozen=True):
    version: int
    state: KekState
    created_at: str
    wraps_reserved: int
    wrapped: bytes
    retired_at: str = ""
    destroyed_at: str = ""


class AuditKey(_Part, frozen=True):
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
    fingerprint: str
    rotated_at: str


class Tombstone(_Part, frozen=True):
    key_id: str
    destroyed_at: str


class Body(_Part, frozen=True):
    format: str
    version: int
    keyring_id: str
    epoch: int
    created_at: str
    updated_at: str
    key_version: int
    slots: tuple[Slot, ...]
    keks: tuple[Kek, ...]
    audit_keys: tuple[AuditKey, ...]
    links: tuple[Link, ...] = ()
    rotation: Rotation | None = None
    retired_roots: tuple[RetiredRoot, ...] = ()
    tombstones: tuple[Tombstone, ...] = ()

    def kek(self, version: int) -> Kek | None:
        """The KEK version, also a destroyed one; None if there was never one of this number."""
        return next((kek for kek in self.keks if kek.version == version), None)

    def kek_in_state(self, state: KekState) -> Kek | None:
        return next((kek for kek in self.keks if kek.state == state), None)

    @property
    def wrapping_kek(self) -> Kek:
        """The KEK version that wraps new DEKs: the pending one during a rotation, otherwise the active one."""
        kek = self.kek_in_state("pending") or self.kek_in_state("active")
        if kek is None:
            raise StartError("the keyring has no active KEK version")
        return kek

    @property
    def audit_key(self) -> AuditKey:
        """The audit key in use."""
        return self.audit_keys[-1]

    def slot_for(self, fingerprint: str) -> Slot | None:
        return next((slot for slot in self.slots if slot.fingerprint == fingerprint), None)


class File(msgspec.Struct, forbid_unknown_fields=True):
    """The members of the file. `body` keeps its exact bytes, which the tag authenticates."""

    body: msgspec.Raw
    tag: bytes


_file_decoder = msgspec.json.Decoder(File)
WAY_OUT: Final = (
    "restore keyring.json from a backup: `minikms backup list` shows the backups, docs/runbook.md has the steps, and "
    "`minikms doctor` checks every file"
)
"""What to do about a keyring that can't be used. Ends the text of a StartError."""

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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        if (version := _version_of(data)) > VERSION:
            raise StartError(_newer_text(version)) from None
        raise StartError(f"the keyring is damaged or of an unknown format version; {WAY_OUT}") from None
    if body.format == FORMAT and body.version > VERSION:
        raise StartError(_newer_text(body.version))
    if body.format != FORMAT or body.version != VERSION:
        raise StartError(
            f"the keyring has format {body.format!r} version {body.version}; this program reads {VERSION}; {WAY_OUT}"
        )
    check(body)
    return body, body_bytes, file.tag


class _Versioned(msgspec.Struct):
    format: str
    version: int


class _VersionedFile(msgspec.Struct):
    body: _Versioned


def _version_of(data: bytes) -> int:
    """The format version of a keyring whose other members this program may not know; 0 if it has none."""
    try:
        body = msgspec.json.decode(data, type=_VersionedFile).body
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return 0
    return body.version if body.format == FORMAT else 0


def _newer_text(version: int) -> str:
    return (
        f"a newer program wrote the keyring: it has format version {version}, and this program reads {VERSION}. Start "
        "the newer version of miniKMS, or restore a backup that this version made (docs/runbook.md)"
    )


def check(body: Body) -> None:
    """Raises StartError if the body breaks an invariant of this module."""
    if not (_keks_agree(body) and _slots_agree(body) and _audit_keys_agree(body) and body.epoch >= 1):
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
    if not 1 <= len(body.slots) <= SLOTS_MAX or len(ids) != len(body.slots) or len(names) != len(body.slots):
        return False
    if not all(_PROVIDER.fullmatch(slot.provider) for slot in body.slots):
        return False
    if body.rotation is not None and body.rotation.slot_id not in ids | {""}:
        return False
    # The links lead from the keyring key of each slot, step by step, to the newest one.
    opens = [slot.opens for slot in body.slots]
    links = [link.version for link in body.links]
    return (
        _rises((*opens, VERSION_MAX))
        and opens[-1] == body.key_version == opens[0] + len(links)
        and links == list(range(opens[0] + 1, body.key_version + 1))
    )


def _audit_keys_agree(body: Body) -> bool:
    versions = [key.version for key in body.audit_keys]
    return 1 <= len(versions) <= AUDIT_KEYS_COUNT_MAX and _rises((*versions, VERSION_MAX))


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


def after_restore(body: Body, *, seen_epoch: int, at: str) -> Body:
    """The body after an older one was put back: its epoch is above `seen_epoch`, and every KEK that is not destroyed
    counts RESTORE_WRAPS more wraps, since the wraps made after that body was written are unknown.
    """
    keks = tuple(
        kek
        if kek.state == "destroyed"
        else msgspec.structs.replace(kek, wraps_reserved=kek.wraps_reserved + RESTORE_WRAPS)
        for kek in body.keks
    )
    return next_epoch(msgspec.structs.replace(body, epoch=max(body.epoch, seen_epoch)), at=at, keks=keks)


def reserve_wraps(body: Body, version: int, count: int, *, at: str) -> Body:
    """Adds `count` to the number of wraps that a KEK version may have made."""
    return _with_kek(body, version, at=at, change=lambda kek: {"wraps_reserved": kek.wraps_reserved + count})


def add_audit_key(body: Body, key: AuditKey, *, at: str) -> Body:
    """Adds the audit key for all further lines of the log. Raises ConflictError if there are too many."""
    if len(body.audit_keys) >= AUDIT_KEYS_COUNT_MAX:
        raise ConflictError(f"the keyring holds {AUDIT_KEYS_COUNT_MAX} audit keys already; begin a new audit log")
    return next_epoch(body, at=at, audit_keys=(*body.audit_keys, key))


class NewRoot(NamedTuple):
    """What a rotation to a new root key adds: its slot, the link to the new keyring key, and every key sealed under
    that.
    """

    slot: Slot
    link: Link
    keks: tuple[Kek, ...]
    audit_keys: tuple[AuditKey, ...]


def begin_rotation(body: Body, *, kek: Kek, root: NewRoot | None, stamp: str, at: str) -> Body:
    """Step 1 of a rotation: adds the pending KEK version and, if there is a new root key, its parts.

    Raises ConflictError if a bound of this module would be exceeded.
    """
    active = body.kek_in_state("active")
    if active is None:
        raise StartError("the keyring has no active KEK version")
    check_has_room(body, new_root=root is not None)
    rotation = Rotation(
        from_version=active.version,
        to_version=kek.version,
        started_at=at,
        stamp=stamp,
        slot_id=root.slot.slot_id if root else "",
    )
    if root is None:
        return next_epoch(body, at=at, keks=(*body.keks, kek), rotation=rotation)
    return next_epoch(
        body,
        at=at,
        key_version=root.link.version,
        slots=(*body.slots, root.slot),
        links=(*body.links, root.link),
        keks=(*root.keks, kek),
        audit_keys=root.audit_keys,
        rotation=rotation,
    )


def check_has_room(body: Body, *, new_root: bool) -> None:
    """Raises ConflictError, which says what to do, if a rotation would exceed a bound of this module."""
    if sum(kek.state != "destroyed" for kek in body.keks) >= KEKS_OPEN_COUNT_MAX:
        raise ConflictError(
            f"the keyring holds {KEKS_OPEN_COUNT_MAX} KEK versions; destroy the unused ones with POST /kek/prune"
        )
    if new_root and len(body.slots) >= SLOTS_MAX:
        raise ConflictError("too many root keys open this keyring; start once with the newest one first")


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


def destroy_kek(body: Body, version: int, *, at: str) -> Body:
    """Removes the wrapped key of a retired version; its number stays. Raises ConflictError in any other state."""
    return _with_kek(
        body,
        version,
        at=at,
        change=lambda kek: {"state": move_kek(kek.state, "destroy"), "wrapped": b"", "destroyed_at": at},
    )


def drop_slots_except(body: Body, slot_id: str, *, at: str) -> Body:
    """Removes all slots but `slot_id`, which must be the newest; the fingerprints of the others are kept.

    Raises ConflictError for an older slot: only the newest one opens the newest keyring key without links.
    """
    newest = body.slots[-1]
    if newest.slot_id != slot_id:
        raise ConflictError("only the slot of the newest root key can stay")
    gone = tuple(RetiredRoot(slot.fingerprint, at) for slot in body.slots[:-1])
    retired_roots = (*body.retired_roots, *gone)[-RETIRED_ROOTS_MAX:]
    return next_epoch(body, at=at, slots=(newest,), links=(), retired_roots=retired_roots)


def add_tombstone(body: Body, key_id: str, *, at: str) -> Body:
    """Adds the tombstone of a destroyed DEK. Raises ConflictError if there are too many."""
    if len(body.tombstones) >= TOMBSTONES_COUNT_MAX:
        raise ConflictError(f"the keyring holds {TOMBSTONES_COUNT_MAX} destroyed keys, which is its limit")
    return next_epoch(body, at=at, tombstones=(*body.tombstones, Tombstone(key_id, at)))


def _with_kek(body: Body, version: int, *, at: str, change: Callable[[Kek], dict[str, Any]]) -> Body:
    changed = tuple(msgspec.structs.replace(kek, **change(kek)) if kek.version == version else kek for kek in body.keks)
    return next_epoch(body, at=at, keks=changed)
