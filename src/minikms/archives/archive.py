"""The format of a backup archive: one authenticated file with all that a data directory needs to decrypt again.

Owns: the format (docs/spec/backup.md), and writing and reading it entry by entry. Invariants: only a fixed set of entry
names is valid, so an archive can't name another file. Entries have one fixed order, so none occurs twice, and a reader
keeps no list of names. Each root key of the keyring has a tag of its own, under its slot's authentication key, so that
any of them opens the archive. Every size is checked before the content is read. Callers must not act on what they read
before `ArchiveReader.check_tag` has authenticated the whole file. It must never hold an unwrapped key: wrapped keys and
the keyring are copied as they are on disk.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import struct
from collections.abc import Container, Iterator, Sequence
from typing import BinaryIO, Final, NamedTuple

import msgspec

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsRefusedError
from minikms.crypto import roots, slots
from minikms.custody.deks import DIRECTORY as DEKS
from minikms.custody.deks import SUFFIX
from minikms.custody.keyring_file import NAME as KEYRING
from minikms.custody.tombstone_file import NAME as TOMBSTONES
from minikms.keys.dek import FILE_BYTES as DEK_BYTES_MAX
from minikms.keys.keyring import FILE_BYTES_MAX as KEYRING_BYTES_MAX
from minikms.keys.keyring import SLOTS_MAX
from minikms.keys.tombstones import FILE_BYTES_MAX as TOMBSTONES_BYTES_MAX
from minikms.memory.arena import SecretArena

MAGIC: Final = b"minikms-backup\0\x04"
"""The last byte is the version of the format."""
MANIFEST: Final = "manifest.json"
MANIFEST_BYTES_MAX: Final = 16 * 1024 * 1024
TAG_BYTES: Final = 32
UNREADABLE_COUNT_MAX: Final = 100_000
_NAME_BYTES_MAX: Final = 64
_NAME_LENGTH: Final = struct.Struct(">H")
_SIZE: Final = struct.Struct(">Q")
_SIZES: Final = {KEYRING: KEYRING_BYTES_MAX, TOMBSTONES: TOMBSTONES_BYTES_MAX, MANIFEST: MANIFEST_BYTES_MAX}
_KEYS_PLACE: Final = 0
_PLACES: Final = {KEYRING: 1, TOMBSTONES: 2, MANIFEST: 3}
"""The order of the entries. Those of keys are first, sorted by key id."""
_DEK_NAME: Final = re.compile(f"{DEKS}/({api.KEY_ID_PATTERN.pattern}){re.escape(SUFFIX)}", re.ASCII)
_FOREIGN_NAME: Final = "the backup was altered: it names a file that no backup has"
PART_BYTES: Final = 64 * 1024
"""The bytes of a file that are read and hashed at a time. The allocator maps new pages for more than 128 KiB."""
_FINGERPRINT_BYTES: Final = 8


class ArchiveError(KmsRefusedError):
    """The archive is cut short, altered, or incomplete; the text says which."""


class OtherRootError(ArchiveError):
    """The given root key is none of the archive's. It says nothing about the archive."""


class AuditHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last line of the audit log when the archive was made."""

    seq: int
    sig: str


class ArchiveManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last entry. `unreadable`: keys that are not in the archive, since their files could not be read.

    No key that existed when the archive was made has a larger id than `newest_key_id`.
    """

    archive_id: str
    created_at: str
    keyring_id: str
    epoch: int
    root_fingerprint: str
    keys: int
    newest_key_id: str
    audit_head: AuditHead | None
    unreadable: tuple[str, ...] = ()


class Entry(NamedTuple):
    """An entry of an archive. `key_id`: of a DEK file; empty for any other entry."""

    name: str
    content: bytes
    key_id: str


class TagKey(NamedTuple):
    """The authentication key of a slot, and the fingerprint of its root key."""

    slot_id: str
    fingerprint: str
    auth_key: memoryview


class ArchiveWriter:
    """Writes entries to an open file, then the tags."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._write(MAGIC)

    def add(self, name: str, content: bytes) -> None:
        """Writes an entry. Raises ArchiveError for a name or a size that no reader accepts."""
        if len(content) > _kind(name)[0]:
            raise ArchiveError(f"{name} is too large for an archive")
        encoded = name.encode("ascii")
        self._write(_NAME_LENGTH.pack(len(encoded)) + encoded + _SIZE.pack(len(content)))
        self._write(content)

    def finish(self, manifest: ArchiveManifest, keys: Sequence[TagKey]) -> None:
        """Writes the manifest, which is the last entry, the slots, and the tag of each over all before the tags."""
        self.add(MANIFEST, msgspec.json.encode(manifest))
        self._write(_NAME_LENGTH.pack(0) + _short(manifest.keyring_id) + bytes([len(keys)]))
        for key in keys:
            self._write(_short(key.slot_id) + bytes.fromhex(key.fingerprint))
        digest = self._digest.digest()
        for key in keys:
            self._file.write(slots.archive_tag(key.auth_key, key.slot_id, digest))

    def _write(self, data: bytes) -> None:
        self._digest.update(data)
        self._file.write(data)


class ArchiveReader:
    """Reads an archive once, from its start: `entries` to the end, then `check_tag`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._part = b""
        self._at = 0
        """How much of `_part`, the latest that was read, is taken. The digest has all that is taken of former ones."""
        self.keyring_id = ""
        """After `entries`, and not authenticated before `check_tag`."""
        self._slots: list[tuple[str, str]] = []
        """Ids and fingerprints, in the order of the tags."""
        self._tags: list[bytes] = []
        self._manifest = b""

    def entries(self, only: Container[str] | None = None) -> Iterator[Entry]:
        """Every entry except the manifest, or those named in `only`. Their content is not authenticated yet. Raises
        ArchiveError.
        """
        magic = self._take(len(MAGIC))
        if not is_archive(magic):
            raise ArchiveError("the file is not a miniKMS backup")
        if magic != MAGIC:
            raise ArchiveError("the backup was made by another version of miniKMS")
        last = (-1, "")
        while length := _NAME_LENGTH.unpack(self._take(_NAME_LENGTH.size))[0]:
            if length > _NAME_BYTES_MAX:
                raise ArchiveError(_FOREIGN_NAME)
            head = self._take(length + _SIZE.size)
            name = head[:length].decode("ascii", "replace")
            (size,) = _SIZE.unpack_from(head, length)
            bytes_max, key_id = _kind(name)
            place = (_PLACES.get(name, _KEYS_PLACE), name)
            if place <= last or size > bytes_max:
                raise ArchiveError("the backup was altered: an entry is repeated, misplaced or too large")
            last = place
            content = self._take(size)
            if name == MANIFEST:
                self._manifest = content
            elif only is None or name in only:
                yield Entry(name, content, key_id)
        self._take_slots()
        self._refill(len(self._slots) * TAG_BYTES + 1)
        self._tags = [self._part[at : at + TAG_BYTES] for at in range(0, len(self._part), TAG_BYTES)]
        if len(self._part) != len(self._slots) * TAG_BYTES:
            raise ArchiveError("the backup is cut short, or something was added to it")

    def check_tag(self, root: memoryview, arena: SecretArena) -> ArchiveManifest:
        """The manifest, after the root key's tag over the whole archive was checked. Raises ArchiveError."""
        if not self._manifest or not self._tags:
            raise ArchiveError("the backup is cut short")
        actual = roots.fingerprint(root)
        for (slot_id, fingerprint), tag in zip(self._slots, self._tags, strict=True):
            if fingerprint != actual:
                continue
            with arena.allocate() as auth:
                slots.auth_key_into(root, self.keyring_id, slot_id, auth.view)
                good = hmac.compare_digest(tag, slots.archive_tag(auth.view, slot_id, self._digest.digest()))
            if not good:
                raise ArchiveError("the backup was altered")
            manifest = _manifest(self._manifest)
            if manifest.keyring_id != self.keyring_id:
                raise ArchiveError("the backup was altered: it names two keyrings")
            return manifest
        known = " or ".join(fingerprint for _, fingerprint in self._slots)
        raise OtherRootError(
            f"the backup opens under root key {known}, the given one is {actual}; give one that opened the keyring "
            "when the backup was made: --master-key-file FILE, or --root SOURCE"
        )

    def _take_slots(self) -> None:
        self.keyring_id = self._take_short()
        for _ in range(self._take(1)[0]):
            self._slots.append((self._take_short(), self._take(_FINGERPRINT_BYTES).hex()))
        names = [api.SLOT_ID_PATTERN.fullmatch(slot_id) for slot_id, _ in self._slots]
        if not all(names) or not 1 <= len(names) <= SLOTS_MAX:
            raise ArchiveError("the backup was altered: its slots are not valid")

    def _take_short(self) -> str:
        return self._take(self._take(1)[0]).decode("ascii", "replace")

    @property
    def sha256(self) -> bytes:
        """SHA-256 of everything that the tag covers."""
        return self._digest.digest()

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._part):
            self._refill(size)
            if size > len(self._part):
                raise ArchiveError("the backup is cut short")
        data = self._part[self._at : self._at + size]
        self._at += size
        return data

    def _refill(self, size: int) -> None:
        """What is not taken yet, and `size` bytes or more."""
        self._digest.update(memoryview(self._part)[: self._at])
        self._part = self._part[self._at :] + self._file.read(max(size, PART_BYTES))
        self._at = 0


def dek_entry_name(key_id: str) -> str:
    return f"{DEKS}/{key_id}{SUFFIX}"


def _short(text: str) -> bytes:
    encoded = text.encode("ascii")
    return bytes([len(encoded)]) + encoded


def _kind(name: str) -> tuple[int, str]:
    """Size limit and key id of the entry with this name. Raises ArchiveError for a name that no archive has."""
    if match := _DEK_NAME.fullmatch(name):
        return DEK_BYTES_MAX, match[1]
    if name not in _SIZES:
        raise ArchiveError(_FOREIGN_NAME)
    return _SIZES[name], ""


def _manifest(content: bytes) -> ArchiveManifest:
    try:
        return msgspec.json.decode(content, type=ArchiveManifest)
    except UNDECODABLE:
        raise ArchiveError("the backup's manifest is damaged, or of another version of miniKMS") from None


def is_archive(magic: bytes) -> bool:
    """Whether a file that begins with these bytes is an archive, of any version."""
    return magic[: len(MAGIC) - 1] == MAGIC[:-1]


def read_keyring_id(path: str | os.PathLike[str]) -> str:
    """The id of the keyring that an archive names; it is not authenticated. Raises ArchiveError, OSError."""
    with open_archive(path) as file:
        reader = ArchiveReader(file)
        for _ in reader.entries(only=()):
            pass
    if api.KEYRING_ID_PATTERN.fullmatch(reader.keyring_id) is None:
        raise ArchiveError("the backup was altered: the id of its keyring is not valid")
    return reader.keyring_id


def open_archive(path: str | os.PathLike[str]) -> BinaryIO:
    """The open file, for `ArchiveReader`. Raises OSError."""
    return open(path, "rb")
