"""The records of the journal of key files, and the replay table (docs/spec/journal.md). No I/O.

Owns: how a change of a key's file is written, in the journal and in the backups that it becomes; which record is
damaged and which was not completely written; what becomes of a file of which the journal has records (`Chain`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from minikms.api.errors import StartError
from minikms.keys import dek
from minikms.keys.dek import FILE_BYTES, KEY_ID_BYTES, bytes_to_key_id, key_id_to_bytes

MAGIC: Final = b"minikms-journal\x01"
"""The last byte is the version of the format."""
CHECKSUM_BYTES: Final = 32
RECORD_BYTES: Final = KEY_ID_BYTES + 2 * FILE_BYTES + CHECKSUM_BYTES
RECORDS_MAX: Final = 2048
BYTES_MAX: Final = len(MAGIC) + RECORDS_MAX * RECORD_BYTES
PART_RECORDS: Final = 32
"""Records that are read or written at a time. The allocator maps new pages for parts of more than 128 KiB."""
SECTOR_BYTES: Final = 512
"""The smallest unit that a disk writes whole."""
BLANK: Final = bytes(RECORD_BYTES)
"""A record that is unused, or was that of a destroyed key."""
_NO_IDS: Final = {"", bytes_to_key_id(bytes(KEY_ID_BYTES)), bytes_to_key_id(b"\xff" * KEY_ID_BYTES)}
_NONE: Final = b"\xff" * FILE_BYTES
"""The old content where there was no file. Not zeros: a sector of zeros was not written."""


class Change(NamedTuple):
    """The content of a key's file becomes `new`. `old` is empty if there was no file. `checksum` is that of the record,
    where it was computed before.
    """

    key_id: str
    old: bytes
    new: bytes
    checksum: bytes = b""

    @classmethod
    def summed(cls, key_id: str, old: bytes, new: bytes) -> Change:
        """With the checksum, which is computed here and not in a worker: a worker that computed the checksums of a
        batch would keep the interpreter from requests.
        """
        return cls(key_id, old, new, _checksum(key_id_to_bytes(key_id), old or _NONE, new))


class Decoded(NamedTuple):
    """The intact records of a journal; of each damaged one, which a power loss does not explain, the key ids in it."""

    intact: list[Change]
    damaged: list[set[str]]


def encode_records(changes: Iterable[Change]) -> Iterator[bytes]:
    """The parts of the records."""
    for change in changes:
        raw_id, old = key_id_to_bytes(change.key_id), change.old or _NONE
        yield raw_id
        yield old
        yield change.new
        yield change.checksum or _checksum(raw_id, old, change.new)


def encode(changes: Iterable[Change]) -> bytes:
    """The content of a journal with these records."""
    return MAGIC + b"".join(encode_records(changes))


def _checksum(raw_id: bytes, old: bytes, new: bytes) -> bytes:
    digest = hashlib.sha256(MAGIC + raw_id)
    digest.update(old)  # in parts: for 2,048 bytes or more Python gives up the interpreter's lock
    digest.update(new)
    return digest.digest()


def decode(content: bytes) -> Decoded:
    """The records, without those that were not completely written or blanked. Raises StartError if another version of
    the program wrote them.
    """
    content = completed(content)
    intact: list[Change] = []
    damaged: list[set[str]] = []
    for offset in offsets(content):
        record = content[offset : offset + RECORD_BYTES]
        if record == BLANK:
            continue
        change = parse(record)
        if change is not None:
            intact.append(change)
        elif not has_empty_sector(record, offset):
            damaged.append(ids_in(record))
    if not intact and dek.is_other_version(content, MAGIC):
        raise StartError(
            "the journal of key files was written by another version of miniKMS, which did not stop in order; start "
            "the version that wrote it once and stop it, then start this one"
        )
    return Decoded(intact, damaged)


def is_whole(content: bytes) -> bool:
    """Whether a journal has its first bytes and whole records."""
    return len(content) >= len(MAGIC) and not (len(content) - len(MAGIC)) % RECORD_BYTES


def completed(content: bytes) -> bytes:
    """The journal with whole records only. What is left of one that was cut is filled with bytes of 0xff, so that it
    counts as damaged; without a whole key id it names none.
    """
    if is_whole(content):
        return content
    rest = max(0, len(content) - len(MAGIC)) % RECORD_BYTES
    tail = content[len(content) - rest :] if rest >= KEY_ID_BYTES else b""
    return content[: len(content) - rest].ljust(len(MAGIC), b"\xff") + tail.ljust(RECORD_BYTES, b"\xff")


def offsets(content: bytes) -> range:
    """The offsets of the whole records."""
    return range(len(MAGIC), len(content) - RECORD_BYTES + 1, RECORD_BYTES)


def parse(record: bytes) -> Change | None:
    """The change in a record; None if its checksum is wrong."""
    raw_id, old, new, checksum = _split(record)
    if checksum != _checksum(raw_id, old, new):
        return None
    return Change(bytes_to_key_id(raw_id), b"" if old == _NONE else old, new, checksum)


def has_empty_sector(record: bytes, offset: int) -> bool:
    """Whether a sector of the record at this offset of its file is zeros: a power loss came while it was written over
    zeros, or blanked.
    """
    starts = range(-(offset % SECTOR_BYTES), RECORD_BYTES, SECTOR_BYTES)
    return any(not any(record[max(start, 0) : start + SECTOR_BYTES]) for start in starts)


def ids_in(record: bytes) -> set[str]:
    """The key ids that a record names, even if parts of it are zeros or damaged."""
    raw_id, old, new, _ = _split(record)
    return {bytes_to_key_id(raw_id), dek.id_in(old), dek.id_in(new)} - _NO_IDS


def ids_in_journal(content: bytes) -> set[str]:
    """The key ids that any record of a journal names."""
    return set().union(*(ids_in(content[offset : offset + RECORD_BYTES]) for offset in offsets(content)))


def is_half_blank(record: bytes, offset: int) -> bool:
    """Whether a crash came while the record was blanked, and took the key id in front. No sector ends in a key id."""
    if any(record[:KEY_ID_BYTES]) or record == BLANK:
        return False
    return parse(record) is None and has_empty_sector(record, offset)


def _split(record: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    old, new = KEY_ID_BYTES, KEY_ID_BYTES + FILE_BYTES
    return record[:old], record[old:new], record[new : new + FILE_BYTES], record[new + FILE_BYTES :]


# --- the replay table -------------------------------------------------------------------------------------------------


class Chain(NamedTuple):
    """The contents of a key's file that follow each other in a journal. `made`: there was no file before the first."""

    key_id: str
    contents: tuple[bytes, ...]
    made: bool

    def due(self, file: bytes | None, has_kek: Callable[[int], bool]) -> bytes | None:
        """What a replay writes into the file with this content (None: it is absent); None: nothing. `has_kek`: whether
        the keyring can use a KEK version.

        It is the newest content that opens under the keyring. If none does, it is the last one, for a keyring that is
        put back, but nothing for a new key, which that keyring never knew.
        """
        if not self.is_due(file):
            return None
        for content in reversed(self.contents):
            if dek.is_usable(content, self.key_id, has_kek):
                return content
        return None if self.made else self.contents[-1]

    def is_due(self, content: bytes | None) -> bool:
        """Whether a replay may write the file. It leaves another valid content, and makes no file that was there before
        the first change.
        """
        if content is None:
            return self.made
        return not dek.is_valid(content, self.key_id) or self._is_mixture(content)

    def _is_mixture(self, content: bytes) -> bool:
        """Whether each byte is that of one of the contents, at its place. The contents themselves are, too."""
        if content in self.contents:
            return True
        return len(content) == FILE_BYTES and all(
            byte in column for byte, *column in zip(content, *self.contents, strict=True)
        )


def chains(changes: Iterable[Change]) -> dict[str, Chain]:
    """The chain of each key, from records in their order."""
    by_key: dict[str, Chain] = {}
    for change in changes:
        before = by_key.get(change.key_id)
        if before is None:
            contents = (change.old, change.new) if change.old else (change.new,)
            by_key[change.key_id] = Chain(change.key_id, contents, not change.old)
        else:
            by_key[change.key_id] = before._replace(contents=(*before.contents, change.new))
    return by_key
