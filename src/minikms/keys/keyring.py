"""The keyring: root slots, KEK versions, audit keys, epoch, tombstones.

Owns: the keyring's contents and file format, and the changes that may be made to it; each change is a pure function
from one body to the next. Hierarchy: each root key wraps a keyring key in a slot of its own; the newest keyring key
wraps the KEK versions and the audit keys, and authenticates the body as a whole (GMAC over its exact bytes). A new root
key comes with a new keyring key, so that who kept an old root key and an old keyring can't open a later one; until the
older slots are dropped, links lead from their keyring key to the newest. Invariants: at most one KEK version is
`active` and at most one `pending`; every written body has a higher epoch than the one before it; a KEK version's
number is never used again. It must never hold unwrapped key material: that lives in `minikms.keys.unlocked`.
docs/spec/formats.md describes the file.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import msgspec

from minikms.errors import ConflictError, StartError
from minikms.keys.states import KekState, move_kek

FORMAT: Final = "minikms-keyring"
VERSION: Final = 1
FILE_BYTES_MAX: Final = 256 * 1024 * 1024
VERSION_MAX: Final = 2**32
"""Above every number of a KEK, an audit key or a keyring key."""
SLOTS_MAX: Final = 16
KEKS_OPEN_COUNT_MAX: Final = 64
"""KEK versions that are not destroyed: each takes a slot of the arena."""
AUDIT_KEYS_COUNT_MAX: Final = 64
TOMBSTONES_COUNT_MAX: Final = 1_000_000
"""Some 80 MiB of the file."""
KEK_WRAPS_LEASE: Final = 2**16
"""Reserved at a time. What a run leaves of it is wasted, so 65,536 starts wear a KEK out, not fewer."""
RESTORE_WRAPS: Final = 2**26
"""More than any KEK wraps between two backups; a KEK bears 64 restores."""
KEK_WRAPS_WARN: Final = 2**31
KEK_WRAPS_MAX: Final = 2**32 - KEK_WRAPS_LEASE
"""NIST SP 800-38D section 8.3: fewer than 2^32 random nonces under one key."""
RETIRED_ROOTS_MAX: Final = 64

_PROVIDER: Final = re.compile(r"[a-z0-9-]{1,32}")


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the parts: an unknown field is refused, since it may change what the others mean."""


class Slot(_Part, frozen=True):
    """`wrapped` is the keyring key of version `opens`, sealed under this slot's root key.

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
    """The keyring key of `version`, sealed under the version before it."""

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
    """`since_seq` and `since_sig` are the audit log's last line under the version before, for all but the first: so
    that who has got an earlier key can't write another log with it."""

    version: int
    created_at: str
    public_key: bytes
    wrapped_key: bytes
    wrapped_seed: bytes
    since_seq: int = 0
    since_sig: bytes = b""


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
    key_version: int
    slots: tuple[Slot, ...]
    keks: tuple[Kek, ...]
    audit_keys: tuple[AuditKey, ...]
    links: tuple[Link, ...] = ()
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
    if not (_keks_agree(body) and _slots_agree(body) and _audit_keys_agree(body) and body.epoch >= 1):
        raise StartError("the keyring contradicts itself; restore keyring.json from a backup")


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
    # From each slot's keyring key, the links lead on step by step to the present one.
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
    """Whether these are positive, and each is larger than the one before."""
    before = 0
    for version in versions:
        if version <= before:
            return False
        before = version
    return True


# --- changes: each gives the next body, with its epoch raised ---------------------------------------------------------


def next_epoch(body: Body, *, at: str, **changes: object) -> Body:
    """`body` with `changes`, one epoch later."""
    changed = msgspec.structs.replace(body, epoch=body.epoch + 1, updated_at=at, **changes)
    check(changed)
    return changed


def after_restore(body: Body, *, seen_epoch: int, at: str) -> Body:
    """An older body that goes on after `seen_epoch`: each KEK may have wrapped RESTORE_WRAPS more than it says."""
    keks = tuple(
        kek
        if kek.state == "destroyed"
        else msgspec.structs.replace(kek, wraps_reserved=kek.wraps_reserved + RESTORE_WRAPS)
        for kek in body.keks
    )
    return next_epoch(msgspec.structs.replace(body, epoch=max(body.epoch, seen_epoch)), at=at, keks=keks)


def reserve_wraps(body: Body, version: int, count: int, *, at: str) -> Body:
    """Adds `count` to the wraps that may have been made under a KEK version."""
    return _with_kek(body, version, at=at, change=lambda kek: {"wraps_reserved": kek.wraps_reserved + count})


def add_audit_key(body: Body, key: AuditKey, *, at: str) -> Body:
    """Adds the audit key that lines are chained with from here on. Raises ConflictError when there are too many."""
    if len(body.audit_keys) >= AUDIT_KEYS_COUNT_MAX:
        raise ConflictError(f"the keyring holds {AUDIT_KEYS_COUNT_MAX} audit keys already; begin a new audit log")
    return next_epoch(body, at=at, audit_keys=(*body.audit_keys, key))


class NewRoot(NamedTuple):
    """What a rotation to a new root key adds: its slot, and the new keyring key with all that is sealed under it."""

    slot: Slot
    link: Link
    keks: tuple[Kek, ...]
    audit_keys: tuple[AuditKey, ...]


def begin_rotation(body: Body, *, kek: Kek, root: NewRoot | None, stamp: str, at: str) -> Body:
    """Adds the pending version, and what a new root key brings, if there is one: step 1 of a rotation.

    Raises ConflictError when the keyring has no room for one more.
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
    """Raises ConflictError, saying what to do, when a rotation would exceed a bound of this module."""
    if sum(kek.state != "destroyed" for kek in body.keks) >= KEKS_OPEN_COUNT_MAX:
        raise ConflictError(
            f"the keyring holds {KEKS_OPEN_COUNT_MAX} KEK versions; destroy those that nothing needs: POST /kek/prune"
        )
    if new_root and len(body.slots) >= SLOTS_MAX:
        raise ConflictError("too many root keys open this keyring; start once with the newest one first")


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
    return _with_kek(
        body,
        version,
        at=at,
        change=lambda kek: {"state": move_kek(kek.state, "destroy"), "wrapped": b"", "destroyed_at": at},
    )


def drop_slots_except(body: Body, slot_id: str, *, at: str) -> Body:
    """Only the newest root, proved by now, opens the keyring from here on; the others are remembered by fingerprint.

    Raises ConflictError for any slot but the newest: the links to the present keyring key begin at the older ones.
    """
    newest = body.slots[-1]
    if newest.slot_id != slot_id:
        raise ConflictError("only the newest root key may be the one that stays")
    gone = tuple(RetiredRoot(slot.fingerprint, at) for slot in body.slots[:-1])
    retired_roots = (*body.retired_roots, *gone)[-RETIRED_ROOTS_MAX:]
    return next_epoch(body, at=at, slots=(newest,), links=(), retired_roots=retired_roots)


def bury(body: Body, key_id: str, *, at: str) -> Body:
    """Adds the tombstone of a destroyed DEK. Raises ConflictError when there are too many."""
    if len(body.tombstones) >= TOMBSTONES_COUNT_MAX:
        raise ConflictError(f"the keyring holds {TOMBSTONES_COUNT_MAX} destroyed keys, as many as it can")
    return next_epoch(body, at=at, tombstones=(*body.tombstones, Tombstone(key_id, at)))


def _with_kek(body: Body, version: int, *, at: str, change: Callable[[Kek], dict[str, Any]]) -> Body:
    changed = tuple(msgspec.structs.replace(kek, **change(kek)) if kek.version == version else kek for kek in body.keks)
    return next_epoch(body, at=at, keks=changed)
