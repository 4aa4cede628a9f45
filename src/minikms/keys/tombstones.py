"""The records of destroyed keys: their encoding, their chain, and the reading of a whole file of them.

Owns: the format of the file `kms-tombstones` (docs/spec/tombstones.md). A tombstone names a destroyed key and the time
of its destruction. The keyring's body holds the number of records and the SHA-256 of the file up to the last of them,
so a destruction changes the keyring by a few bytes, however many there were before.

Invariants: records are only added, and each is bound to the keyring and to every record before it. Its tag is an HMAC
under the tombstone key, which authenticates a record that the keyring does not count yet. Fewer records than the
keyring counts, or other ones, are refused. It must never do I/O, nor take a record without a valid tag beyond those
that the keyring counts.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final, NamedTuple

from minikms.crypto import labels

MAGIC: Final = b"minikms-stones\0t"
FORMAT_VERSION: Final = 1
HEADER: Final = MAGIC + FORMAT_VERSION.to_bytes(4, "big") + bytes(12)
HEADER_BYTES: Final = 32
RECORD_BYTES: Final = 40
KEY_BYTES: Final = 16
TAG_BYTES: Final = 16
TOMBSTONES_COUNT_MAX: Final = 10_000_000
"""400 MB of the file, and about 1 GB of memory."""
APPEND_RECORDS_MAX: Final = 4096
"""Records of one append, which is also the largest torn append."""
FILE_BYTES_MAX: Final = HEADER_BYTES + RECORD_BYTES * (TOMBSTONES_COUNT_MAX + APPEND_RECORDS_MAX)


class TombstoneFormatError(Exception):
    """A file that can't be used. The text continues a sentence that names the file."""


class Tombstone(NamedTuple):
    """`key`: the 16 bytes of the key's id. `unix_s`: when it was destroyed."""

    key: bytes
    unix_s: int


class NumberedTombstone(NamedTuple):
    """A record of the file. `number`: from 1."""

    number: int
    unix_s: int
    tag: bytes


class TombstoneChain:
    """The running hash over a file: its header and `count` records. `head`: SHA-256 of them."""

    def __init__(self, keyring_id: str) -> None:
        self._keyring_id = keyring_id.encode()
        self._hash = hashlib.sha256(HEADER)
        self.count = 0

    def copy(self) -> TombstoneChain:
        other = TombstoneChain.__new__(TombstoneChain)
        other._keyring_id, other._hash, other.count = self._keyring_id, self._hash.copy(), self.count
        return other

    def fresh(self) -> TombstoneChain:
        """The chain of the same keyring without a record."""
        other = self.copy()
        other._hash, other.count = hashlib.sha256(HEADER), 0
        return other

    @property
    def head(self) -> bytes:
        return self._hash.digest()

    def take(self, records: bytes | memoryview) -> None:
        """Adds whole records as they are."""
        self._hash.update(records)
        self.count += len(records) // RECORD_BYTES

    def append(self, mac_key: memoryview, stones: Iterable[Tombstone]) -> bytes:
        """Adds new records under the tombstone key `mac_key`; returns their bytes, RECORD_BYTES each."""
        records = bytearray()
        for stone in stones:
            body = stone.key + stone.unix_s.to_bytes(8, "big")
            record = body + self._tag(mac_key, body)
            self.take(record)
            records += record
        return bytes(records)

    def is_next(self, mac_key: memoryview, record: bytes) -> bool:
        """Whether the tag of the record, RECORD_BYTES, is valid after the last record of the chain."""
        body = record[:-TAG_BYTES]
        return hmac.compare_digest(self._tag(mac_key, body), record[-TAG_BYTES:])

    def _tag(self, mac_key: memoryview, body: bytes) -> bytes:
        data = labels.aad(labels.TOMBSTONE, self._keyring_id, labels.number(self.count + 1), self._hash.digest(), body)
        return hmac.digest(mac_key, data, "sha256")[:TAG_BYTES]


class ReadTombstones(NamedTuple):
    """A file as read. `content`: its good part, with the records beyond the keyring's count that have a valid tag.

    `adopted`: the number of those. `torn_bytes`: what follows, which belongs to an append that was cut off.
    """

    content: bytes
    chain: TombstoneChain
    adopted: int
    torn_bytes: int

    def keys(self) -> list[bytes]:
        """The destroyed keys, 16 bytes each, in the order of their destruction."""
        return keys_of(self.content)

    def stones(self) -> list[Tombstone]:
        """The records of `content`, in their order."""
        data = self.content
        return [
            Tombstone(data[at : at + KEY_BYTES], int.from_bytes(data[at + KEY_BYTES : at + 24], "big"))
            for at in range(HEADER_BYTES, len(data), RECORD_BYTES)
        ]


def keys_of(content: bytes) -> list[bytes]:
    """The keys of whole records behind a header."""
    return [content[at : at + KEY_BYTES] for at in range(HEADER_BYTES, len(content), RECORD_BYTES)]


def find(records: bytes, key: bytes, last: int) -> NumberedTombstone | None:
    """The record of a key, 16 bytes, in whole records, the last of which has the number `last`."""
    at = records.rfind(key)
    while at >= 0 and at % RECORD_BYTES:
        at = records.rfind(key, 0, at + KEY_BYTES - 1)
    if at < 0:
        return None
    body, end = at + RECORD_BYTES - TAG_BYTES, at + RECORD_BYTES
    number = last - (len(records) - end) // RECORD_BYTES
    return NumberedTombstone(number, int.from_bytes(records[at + KEY_BYTES : body], "big"), records[body:end])


def read(
    content: bytes | None, *, keyring_id: str, count: int, head: bytes, mac_key: memoryview | None
) -> ReadTombstones:
    """Reads a file; None for an absent one. `count` and `head` are those of the keyring.

    Without `mac_key` the records beyond `count` are left out. Raises TombstoneFormatError if one of the counted records
    is missing or altered, or if more follows than one torn append.
    """
    chain = TombstoneChain(keyring_id)
    if not content and count == 0:
        return ReadTombstones(HEADER, chain, 0, 0)
    if content is None:
        raise TombstoneFormatError("is missing")
    if content[:HEADER_BYTES] != HEADER:
        if content[:16] == MAGIC and content[16:20] != HEADER[16:20]:
            raise TombstoneFormatError("was written by another version of this program")
        if count == 0 and len(content) < HEADER_BYTES:
            return ReadTombstones(HEADER, chain, 0, len(content))
        raise TombstoneFormatError("is damaged or is not one of this program's files")
    end = HEADER_BYTES + RECORD_BYTES * count
    if len(content) < end:
        records = (len(content) - HEADER_BYTES) // RECORD_BYTES
        raise TombstoneFormatError(f"is cut short: it has {records:,} records, and the keyring counts {count:,}")
    chain.take(memoryview(content)[HEADER_BYTES:end])
    if not hmac.compare_digest(chain.head, head):
        raise TombstoneFormatError("was altered or is damaged")
    if mac_key is not None:
        while end + RECORD_BYTES <= len(content) and chain.is_next(mac_key, content[end : end + RECORD_BYTES]):
            chain.take(content[end : end + RECORD_BYTES])
            end += RECORD_BYTES
    torn = len(content) - end
    if mac_key is not None and torn > RECORD_BYTES * APPEND_RECORDS_MAX:
        raise TombstoneFormatError("has more bytes behind its last record than one append can leave")
    return ReadTombstones(content[:end], chain, chain.count - count, torn)
