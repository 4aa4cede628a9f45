"""A DEK: its id, its states, and its record on disk, wrapped under one KEK version.

Owns: the one strict form of a key id; the table of legal moves of a DEK; the record's fields, its strict parsing, and
its wrapping and unwrapping. docs/spec/formats.md describes the file.

An id is `k_` and a ULID in lower case (https://github.com/ulid/spec): 48 bits of Unix milliseconds, then 80 random
bits, in Crockford base 32. So ids sort by time of creation.

Invariants: every id has one spelling, so text and bytes map one to one. An id from outside passes `check_key_id` before
it is used. A record whose id, format or algorithm is not the expected one does not parse. Every file that is written
has the same length, and every change raises the record's `version`, so two contents of one key's file are never equal.
Unwrapping authenticates the record's id, thread, purpose, algorithm, number and KEK version, so a swapped or foreign
file does not open. An illegal move raises and changes nothing. It must never hold an unwrapped key or build a path
from an unchecked id.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, Self

import msgspec

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import ConflictError, DecryptionError, InvalidRequestError, KeyNotFoundError, KeyUnreadableError
from minikms.crypto import labels
from minikms.crypto.aead import XaesCipher
from minikms.keys.keyring import VERSION_MAX as KEK_VERSION_MAX
from minikms.memory.arena import zero

# --- ids --------------------------------------------------------------------------------------------------------------

KEY_ID_BYTES: Final = 16
KEY_ID_RANDOM_BYTES: Final = 10
UNIX_MS_MAX: Final = (1 << 48) - 1

_CROCKFORD: Final = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS: Final = [first + second for first in _CROCKFORD for second in _CROCKFORD]
"""The two digits of each number of 10 bits."""
_TO_INT: Final = str.maketrans(_CROCKFORD, "0123456789abcdefghijklmnopqrstuv")
"""To the digits of `int` in base 32, which is four times as fast as a decoder of base 32."""


def make_key_id(unix_ms: int, random: bytes) -> str:
    """The id of a key created at `unix_ms` (0 to 2^48 - 1), with 10 random bytes.

    Raises ValueError for a time or a length out of range, which is a defect of the caller.
    """
    if not 0 <= unix_ms <= UNIX_MS_MAX:
        raise ValueError("the time of a key id is 48 bits of Unix milliseconds")
    if len(random) != KEY_ID_RANDOM_BYTES:
        raise ValueError("a key id takes ten random bytes")
    return bytes_to_key_id(unix_ms.to_bytes(6, "big") + random)


def check_key_id(text: str) -> str:
    """`text` itself if it is a key id. Raises InvalidRequestError, which does not repeat the text."""
    if api.KEY_ID_PATTERN.fullmatch(text) is None:
        raise InvalidRequestError("a key id is k_ and 26 characters of lower-case Crockford base 32")
    return text


def not_found(key_id: str) -> KeyNotFoundError:
    """The one answer for a key that does not exist, and for one that the caller may not know of."""
    return KeyNotFoundError(f"key not found: {key_id}")


def key_id_to_bytes(key_id: str) -> bytes:
    """The 16 bytes of a key id, which sort as the ids do. Raises InvalidRequestError."""
    return int(check_key_id(key_id)[2:].translate(_TO_INT), 32).to_bytes(KEY_ID_BYTES, "big")


def bytes_to_key_id(raw: bytes) -> str:
    """The key id of 16 bytes. Raises ValueError for any other length."""
    if len(raw) != KEY_ID_BYTES:
        raise ValueError("a key id is sixteen bytes")
    number, pairs = int.from_bytes(raw, "big"), _PAIRS
    # 26 digits are 130 bits, of which the first 2 are zero. Without a loop it takes half the time.
    return (
        f"k_{pairs[number >> 120]}{pairs[number >> 110 & 1023]}{pairs[number >> 100 & 1023]}"
        f"{pairs[number >> 90 & 1023]}{pairs[number >> 80 & 1023]}{pairs[number >> 70 & 1023]}"
        f"{pairs[number >> 60 & 1023]}{pairs[number >> 50 & 1023]}{pairs[number >> 40 & 1023]}"
        f"{pairs[number >> 30 & 1023]}{pairs[number >> 20 & 1023]}{pairs[number >> 10 & 1023]}{pairs[number & 1023]}"
    )


def key_id_unix_ms(key_id: str) -> int:
    """The time of creation that the id contains, in Unix milliseconds. Raises InvalidRequestError."""
    return int.from_bytes(key_id_to_bytes(key_id)[:6], "big")


# --- states -----------------------------------------------------------------------------------------------------------

DekState = Literal["active", "retired", "destroyed"]
"""`active` encrypts and decrypts; `retired` only decrypts; a `destroyed` key has no file."""
DekMove = Literal["retire", "destroy"]

DEK_MOVES: Final[dict[tuple[DekState, DekMove], DekState]] = {
    ("active", "retire"): "retired",
    ("retired", "destroy"): "destroyed",
}


def move_dek(state: DekState, move: DekMove) -> DekState:
    """The state after a move. Raises ConflictError for a move that DEK_MOVES does not have."""
    try:
        return DEK_MOVES[state, move]
    except KeyError:
        done = {"retire": "retired", "destroy": "destroyed"}[move]
        hint = "; retire it first" if (state, move) == ("active", "destroy") else ""
        raise ConflictError(f"a key that is {state} can't be {done}{hint}") from None


# --- the record -------------------------------------------------------------------------------------------------------

FORMAT: Final = 1
FILE_BYTES: Final = 1024
"""Every file has this length, so an overwrite never changes the length."""
VERSION_MAX: Final = 2**31
"""Exclusive bound of a record's `version`, which each change of the file raises by one."""
NUMBER_MAX: Final = 2**31
"""Exclusive bound of the number of a key in its thread."""
UNNUMBERED_COUNT_MAX: Final = 64
"""Keys without a number that are read to find the newest one with a number: each may be a read of the disk."""

_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)


class DekRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The content of a DEK file. `wrapped` is the DEK, sealed under the KEK version `kek_version`. `number`: in its
    thread; 0 for a key without one.
    """

    id: str
    created_at: str
    wrapped: bytes
    thread_id: str
    format: int
    version: int
    kek_version: int
    purpose: api.Purpose
    algorithm: str
    state: DekState
    retired_at: str = ""
    replaces: str = ""
    replaced_by: str = ""
    number: int = 0

    def aad(self, kek_version: int) -> bytes:
        """The associated data of this record's DEK when wrapped under `kek_version`."""
        return self.aad_prefix() + labels.kek_version_field(kek_version)

    def aad_prefix(self) -> bytes:
        """The part of it that does not depend on the KEK version."""
        return labels.dek_aad_prefix(
            key_id=self.id,
            thread_id=self.thread_id,
            purpose=self.purpose,
            algorithm=self.algorithm,
            in_thread=self.number,
        )


_ID_FIRST: Final = re.compile(rb'\{"id":"(k_[0-7][0-9a-hjkmnp-tv-z]{25})"', re.ASCII)

_WAY_OUT: Final = "restore it from a backup"
_decoder = msgspec.json.Decoder(DekRecord)
_encoder = msgspec.json.Encoder()


def encode(record: DekRecord) -> bytes:
    """The bytes of the record's file: padded with spaces before the newline to FILE_BYTES, which any record fits."""
    return _encoder.encode(record).ljust(FILE_BYTES - 1) + b"\n"


def parse(data: bytes, key_id: str) -> DekRecord:
    """The record in the file of `key_id`. Raises KeyUnreadableError, which says what is wrong with the file."""
    if len(data) != FILE_BYTES:
        raise KeyUnreadableError(
            f"the file of key {key_id} is damaged: it has {len(data):,} bytes in place of {FILE_BYTES:,}; {_WAY_OUT}"
        )
    try:
        record = _decoder.decode(data)
    except UNDECODABLE:
        raise KeyUnreadableError(
            f"the file of key {key_id} is damaged or of an unknown format version; {_WAY_OUT}"
        ) from None
    if record.format != FORMAT:
        raise KeyUnreadableError(
            f"the file of key {key_id} has format version {record.format}; this program reads {FORMAT}: start the "
            "program that wrote it, or restore the file from a backup"
        )
    if record.id != key_id:
        raise KeyUnreadableError(f"the file of key {key_id} holds another key's record")
    if not _is_known(record):
        raise KeyUnreadableError(f"the file of key {key_id} has an invalid algorithm, version, state or time")
    if not (_is_key_id_or_empty(record.replaces) and _is_key_id_or_empty(record.replaced_by)):
        raise KeyUnreadableError(f"the file of key {key_id} refers to an invalid key id")
    if api.THREAD_ID_PATTERN.fullmatch(record.thread_id) is None:
        raise KeyUnreadableError(f"the file of key {key_id} has an invalid thread id")
    return record


def id_in(content: bytes) -> str:
    """The key id with which a record begins, even if the rest of it is damaged; empty if it does not begin with one."""
    match = _ID_FIRST.match(content)
    return match[1].decode("ascii") if match else ""


def is_valid(data: bytes, key_id: str) -> bool:
    """Whether `parse` accepts it."""
    try:
        parse(data, key_id)
    except KeyUnreadableError:
        return False
    return True


def is_usable(data: bytes, key_id: str, has_kek: Callable[[int], bool]) -> bool:
    """Whether `parse` accepts it, and `has_kek` says that the keyring can use its KEK version."""
    try:
        return has_kek(parse(data, key_id).kek_version)
    except KeyUnreadableError:
        return False


def is_other_version(content: bytes, magic: bytes) -> bool:
    """Whether a log of DEK files begins as one of another version. `magic`: what ours begin with; its last byte is the
    version. A version byte that a power loss left out is none.
    """
    start = content[: len(magic)]
    return start[:-1] == magic[:-1] and start[-1:] not in (magic[-1:], b"", b"\0")


def _is_known(record: DekRecord) -> bool:
    return (
        record.algorithm == labels.ALGORITHM
        and 1 <= record.version < VERSION_MAX
        and 1 <= record.kek_version < KEK_VERSION_MAX
        and 0 <= record.number < NUMBER_MAX
        and _TIME.fullmatch(record.created_at) is not None
        and (
            (record.state == "active" and not record.retired_at)
            or (record.state == "retired" and _TIME.fullmatch(record.retired_at) is not None)
        )
    )


def _is_key_id_or_empty(text: str) -> bool:
    return not text or api.KEY_ID_PATTERN.fullmatch(text) is not None


def new(
    *,
    key_id: str,
    thread_id: str,
    purpose: api.Purpose,
    created_at: str,
    kek: XaesCipher,
    kek_version: int,
    dek: memoryview,
    nonce: bytes,
    replaces: str = "",
    number: int = 0,
) -> DekRecord:
    """The record of a fresh DEK, wrapped under the cipher of a KEK."""
    aad = labels.dek_aad(
        key_id=key_id,
        thread_id=thread_id,
        purpose=purpose,
        algorithm=labels.ALGORITHM,
        kek_version=kek_version,
        in_thread=number,
    )
    return DekRecord(
        id=key_id,
        created_at=created_at,
        wrapped=kek.seal(nonce, dek, aad),
        thread_id=thread_id,
        format=FORMAT,
        version=1,
        kek_version=kek_version,
        purpose=purpose,
        algorithm=labels.ALGORITHM,
        state="active",
        replaces=replaces,
        number=number,
    )


def numbered(records: Iterable[DekRecord], thread_id: str) -> Iterator[DekRecord]:
    """The numbered keys of the thread, newest first. Raises ConflictError where too many others are among them."""
    others = 0
    for record in records:
        if record.number and record.thread_id == thread_id:
            yield record
        elif (others := others + 1) > UNNUMBERED_COUNT_MAX:
            raise ConflictError("the thread has too many keys without a number, which have to be destroyed first")


def next_number(newest: DekRecord | None, replaces: str) -> int:
    """The number of the key that follows the newest numbered one of a thread. They are made one after the other, each
    with an id above the last, so the newest has the highest number. Raises ConflictError unless its id is `replaces`.
    """
    if (newest.id if newest else "") != replaces:
        raise ConflictError("a numbered key replaces the newest numbered key of its thread, and this is another one")
    if newest is None:
        return 1
    if newest.number + 1 >= NUMBER_MAX:
        raise ConflictError("the newest key of the thread has the highest number there is")
    return newest.number + 1


def unwrap_into(record: DekRecord, kek: XaesCipher, target: memoryview) -> None:
    """Writes the DEK into `target`, 32 bytes of the arena, and closes the cipher of the KEK. Raises
    KeyUnreadableError.
    """
    try:
        with kek:
            kek.open_into(record.wrapped, record.aad(record.kek_version), target)
    except DecryptionError:
        raise _does_not_unwrap(record) from None


def _does_not_unwrap(record: DekRecord) -> KeyUnreadableError:
    return KeyUnreadableError(
        f"key {record.id} does not unwrap: its file was altered, swapped, or comes from another installation"
    )


UNWRAPS_SLICE: Final = 32
"""Keys of one `Unwrapper`; in the daemon, other requests get a turn of the event loop after them."""


class Unwrapper:
    """Unwraps DEKs in a `with` block, which must end in the same turn of the event loop or after a few keys: until then
    it keeps a cipher for each KEK, which has key schedules on the heap.
    """

    def __init__(self, kek: Callable[[int], XaesCipher], *slots: memoryview) -> None:
        """kek: a cipher of the KEK of a version, or KeyUnreadableError. slots: of the arena, 32 bytes each; the first
        gets the DEKs, and all are zeroed at the end of the block.
        """
        self._kek = kek
        self._slots = slots
        self._known: dict[int, tuple[XaesCipher, bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for cipher, _field in self._known.values():
            cipher.close()
        for slot in self._slots:
            zero(slot)

    def unwrap(self, record: DekRecord) -> bytes:
        """Writes the DEK into the first slot. Returns `DekRecord.aad_prefix`. Raises KeyUnreadableError."""
        cipher, field = self._known.get(record.kek_version) or self._of(record.kek_version)
        prefix = record.aad_prefix()
        try:
            cipher.open_into(record.wrapped, prefix + field, self._slots[0])
        except DecryptionError:
            raise _does_not_unwrap(record) from None
        return prefix

    def _of(self, kek_version: int) -> tuple[XaesCipher, bytes]:
        """The cipher of a KEK, and the last field of associated data under it."""
        known = self._known[kek_version] = self._kek(kek_version), labels.kek_version_field(kek_version)
        return known


class Rewrapper(Unwrapper):
    """Wraps DEKs under another KEK version."""

    def __init__(
        self, kek: Callable[[int], XaesCipher], kek_version: int, *, key: memoryview, again: memoryview
    ) -> None:
        super().__init__(kek, key, again)
        self._kek_version = kek_version
        self._cipher, self._field = self._of(kek_version)
        self._key = key
        self._again = again

    def rewrap(self, record: DekRecord, nonce: bytes) -> DekRecord:
        """The record wrapped under the KEK version; its `version` rises by one and nothing else changes, so `parse`
        accepts the result. The new wrapping was unwrapped and compared with the key.

        Raises KeyUnreadableError if the record does not unwrap, its version can't rise, or the comparison fails.
        """
        aad = self.unwrap(record) + self._field
        wrapped = self._cipher.seal(nonce, self._key, aad)
        try:
            self._cipher.open_into(wrapped, aad, self._again)
            same = hmac.compare_digest(self._key, self._again)
        except DecryptionError:
            same = False
        if not same:
            raise KeyUnreadableError(f"key {record.id} did not survive its rewrap; its file was not changed")
        return msgspec.structs.replace(
            record, wrapped=wrapped, kek_version=self._kek_version, version=_next_version(record)
        )


def retired(record: DekRecord, *, at: str, replaced_by: str = "") -> DekRecord:
    """The record of the key in the state `retired`; its `version` rises by one. Raises ConflictError unless the key is
    active, KeyUnreadableError if the version can't rise.
    """
    return msgspec.structs.replace(
        record,
        state=move_dek(record.state, "retire"),
        retired_at=at,
        replaced_by=replaced_by,
        version=_next_version(record),
    )


def _next_version(record: DekRecord) -> int:
    if record.version + 1 >= VERSION_MAX:
        raise KeyUnreadableError(
            f"the file of key {record.id} has the highest version that there is, so it can't change any more; restore "
            "it from a backup"
        )
    return record.version + 1
