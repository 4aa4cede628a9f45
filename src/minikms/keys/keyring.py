"""The keyring: root slots, KEK versions, audit keys, epoch, tombstones.

Owns: the keyring's contents and file format, and the changes that may be made to it; each change is a pure function
from one body to the next. Hierarchy: each root key wraps the keyring key in a slot of its own; the keyring key wraps
the KEK versions and the audit keys, and authenticates the body as a whole (GMAC over its exact bytes). Invariants: at
most one KEK version is `active` and at most one `pending`; every written body has a higher epoch than the one before
it; a KEK version's number is never used again. It must never hold unwrapped key material: that lives in
`minikms.keys.unlocked`. docs/spec/formats.md describes the file.
"""

from __future__ import annotations

import binascii
from typing import Final, Literal

import msgspec

from minikms.errors import StartError
from minikms.keys.states import KekState, move_kek

FORMAT: Final = "minikms-keyring"
VERSION: Final = 1
FILE_BYTES_MAX: Final = 256 * 1024 * 1024
SLOTS_MAX: Final = 16
KEK_WRAPS_LEASE: Final = 2**20
KEK_WRAPS_WARN: Final = 2**31
KEK_WRAPS_MAX: Final = 2**32 - KEK_WRAPS_LEASE
"""NIST SP 800-38D section 8.3: fewer than 2^32 random nonces under one key."""
RETIRED_ROOTS_MAX: Final = 64

Provider = Literal["file", "environment", "dev", "request"]


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the parts: an unknown field is refused, since it may change what the others mean."""


class Slot(_Part, frozen=True):
    slot_id: str
    fingerprint: str
    provider: Provider
    created_at: str
    commitment: bytes
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
    version: int
    created_at: str
    public_key: bytes
    wrapped_key: bytes
    wrapped_seed: bytes


class Rotation(_Part, frozen=True):
    """A rotation that has begun. `slot_id` names the new root's slot, or is empty when the root stays."""

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
    slots: tuple[Slot, ...]
    keks: tuple[Kek, ...]
    audit_keys: tuple[AuditKey, ...]
    rotation: Rotation | None = None
    retired_roots: tuple[RetiredRoot, ...] = ()
    tombstones: tuple[Tombstone, ...] = ()

    def kek(self, version: int) -> Kek | None:
        return next((kek for kek in self.keks if kek.version == version), None)

    def kek_in_state(self, state: KekState) -> Kek | None:
        return next((kek for kek in self.keks if kek.state == state), None)

    @property
    def wrapping_kek(self) -> Kek:
        """The version that new DEKs are wrapped under: the pending one while a rotation runs, else the active one."""
        kek = self.kek_in_state("pending") or self.kek_in_state("active")
        if kek is None:
            raise StartError("the keyring has no active KEK version")
        return kek

    @property
    def audit_key(self) -> AuditKey:
        return self.audit_keys[-1]

    def slot_for(self, fingerprint: str) -> Slot | None:
        return next((slot for slot in self.slots if slot.fingerprint == fingerprint), None)

    def tombstone_of(self, key_id: str) -> Tombstone | None:
        return next((stone for stone in self.tombstones if stone.key_id == key_id), None)


class File(msgspec.Struct, forbid_unknown_fields=True):
    """The file's two members. `body` keeps its exact bytes: they are what the tag authenticates."""

    body: msgspec.Raw
    tag: bytes


_file_decoder = msgspec.json.Decoder(File)
_body_decoder = msgspec.json.Decoder(Body)
_encoder = msgspec.json.Encoder()


def encode_body(body: Body) -> bytes:
    return _encoder.encode(body)


def encode_file(body_bytes: bytes, tag: bytes) -> bytes:
    return b'{"body":' + body_bytes + b',"tag":"' + binascii.b2a_base64(tag, newline=False) + b'"}\n'


def parse_file(data: bytes) -> tuple[Body, bytes, bytes]:
    """(body, the body's exact bytes, tag), not yet authenticated. Raises StartError."""
    try:
        file = _file_decoder.decode(data)
        body_bytes = bytes(file.body)
        body = _body_decoder.decode(body_bytes)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise StartError(
            "the keyring is damaged or of an unknown format version; restore keyring.json from a backup"
        ) from None
    if body.format != FORMAT or body.version != VERSION:
        raise StartError(f"the keyring has format {body.format!r} version {body.version}; this program reads {VERSION}")
    check(body)
    return body, body_bytes, file.tag


def check(body: Body) -> None:
    """Raises StartError when the body breaks an invariant of this module."""
    versions = [kek.version for kek in body.keks]
    states = [kek.state for kek in body.keks]
    if (
        len(set(versions)) != len(versions)
        or states.count("active") != 1
        or states.count("pending") > 1
        or (body.rotation is None) != (states.count("pending") == 0)
        or not body.audit_keys
        or not 1 <= len(body.slots) <= SLOTS_MAX
    ):
        raise StartError("the keyring contradicts itself; restore keyring.json from a backup")


# --- changes: each gives the next body, with its epoch raised ---------------------------------------------------------


def next_epoch(body: Body, *, at: str, **changes: object) -> Body:
    """`body` with `changes`, one epoch later."""
    changed = msgspec.structs.replace(body, epoch=body.epoch + 1, updated_at=at, **changes)
    check(changed)
    return changed


def reserve_wraps(body: Body, version: int, count: int, *, at: str) -> Body:
    """Adds `count` to the wraps that may have been made under a KEK version."""
    return next_epoch(
        body, at=at, keks=_with_kek(body, version, lambda kek: {"wraps_reserved": kek.wraps_reserved + count})
    )


def begin_rotation(body: Body, *, kek: Kek, slot: Slot | None, stamp: str, at: str) -> Body:
    """Adds the pending version, and the new root's slot if there is one: step 1 of a rotation."""
    active = body.kek_in_state("active")
    if active is None:
        raise StartError("the keyring has no active KEK version")
    rotation = Rotation(
        from_version=active.version,
        to_version=kek.version,
        started_at=at,
        stamp=stamp,
        slot_id=slot.slot_id if slot else "",
    )
    slots = (*body.slots, slot) if slot else body.slots
    return next_epoch(body, at=at, keks=(*body.keks, kek), slots=slots, rotation=rotation)


def promote(body: Body, *, at: str) -> Body:
    """The pending version becomes active, the active one retired: step 3 of a rotation."""
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
    """Drops the wrapped key of a retired version; its number stays. Raises ConflictError for any other state."""
    return next_epoch(
        body,
        at=at,
        keks=_with_kek(
            body,
            version,
            lambda kek: {"state": move_kek(kek.state, "destroy"), "wrapped": b"", "destroyed_at": at},
        ),
    )


def drop_slots_except(body: Body, slot_id: str, *, at: str) -> Body:
    """Only the proved root opens the keyring from here on; the others are remembered by fingerprint."""
    gone = tuple(RetiredRoot(slot.fingerprint, at) for slot in body.slots if slot.slot_id != slot_id)
    kept = tuple(slot for slot in body.slots if slot.slot_id == slot_id)
    retired_roots = (*body.retired_roots, *gone)[-RETIRED_ROOTS_MAX:]
    return next_epoch(body, at=at, slots=kept, retired_roots=retired_roots)


def bury(body: Body, key_id: str, *, at: str) -> Body:
    """Adds the tombstone of a destroyed DEK."""
    return next_epoch(body, at=at, tombstones=(*body.tombstones, Tombstone(key_id, at)))


def _with_kek(body: Body, version: int, changes: object) -> tuple[Kek, ...]:
    if not callable(changes):
        raise TypeError("changes must be a function from a KEK to its changed fields")
    return tuple(msgspec.structs.replace(kek, **changes(kek)) if kek.version == version else kek for kek in body.keks)
