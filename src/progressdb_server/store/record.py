"""The record format: a small plaintext header, then the part that only the key service can open (docs/spec/store.md).

Layout: version byte 1, header length (2 bytes, big-endian), header (MessagePack array), then what encrypt answered:
nonce(12) | ciphertext | tag(16). The additional data of the encryption is the record's storage key.

Invariants:
- A record is self-describing: its key id is the first element of every header, so reading never depends on a map.
- Everything that a user typed is in the sealed part. The header's copies (author, deleted) are there to find and
  rebuild; the sealed ones count, and a record whose two copies differ does not open.
- Message records are never rewritten but by a key rotation; `rekeyed` is how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from progressdb_server.store import keyspace
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import Message, Thread

VERSION: Final = 1
_PREFIX_BYTES: Final = 3

_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""msgspec raises the latter two unwrapped."""

T = TypeVar("T")


class RecordFormatError(Exception):
    """The bytes are no record that this version reads."""


class MessageHeader(msgspec.Struct, array_like=True, frozen=True):
    """`first` is the stamp of the message's first version, empty when this is it."""

    key_id: str
    first: str
    author: str
    deleted: bool


class ThreadHeader(msgspec.Struct, array_like=True, frozen=True):
    """`created` is a stamp. `updated_ns`: of the last change of the metadata; messages touch a thread by their own
    stamps."""

    key_id: str
    author: str
    created: str
    updated_ns: int
    deleted_ns: int


class MessageSecret(msgspec.Struct, array_like=True, frozen=True):
    """The sealed part, as a JSON array. `first` binds the record to its message."""

    first: str
    author: str
    deleted: bool
    role: str
    body: Any
    reply_to: str
    reactions: dict[str, str]


class ThreadSecret(msgspec.Struct, array_like=True, frozen=True):
    author: str
    deleted: bool
    title: str
    slug: str


_to_header = msgspec.msgpack.Encoder().encode
_message_header = msgspec.msgpack.Decoder(MessageHeader).decode
_thread_header = msgspec.msgpack.Decoder(ThreadHeader).decode
_any_header = msgspec.msgpack.Decoder(list[Any]).decode
_to_secret = msgspec.json.Encoder().encode
_message_secret = msgspec.json.Decoder(MessageSecret).decode
_thread_secret = msgspec.json.Decoder(ThreadSecret).decode


def pack(header: MessageHeader | ThreadHeader, sealed: bytes) -> bytes:
    head = _to_header(header)
    return b"\x01%b%b%b" % (len(head).to_bytes(2, "big"), head, sealed)


def split(raw: bytes) -> tuple[bytes, bytes]:
    """Header and sealed part of any record. Raises RecordFormatError."""
    if len(raw) < _PREFIX_BYTES or raw[0] != VERSION:
        raise RecordFormatError("unknown record version")
    end = _PREFIX_BYTES + (raw[1] << 8 | raw[2])
    if end > len(raw):
        raise RecordFormatError("the record is cut short")
    return raw[_PREFIX_BYTES:end], raw[end:]


def _decoded(decode: Callable[[bytes], T], raw: bytes, what: str) -> T:
    try:
        return decode(raw)
    except _UNREADABLE as error:
        raise RecordFormatError(what) from error


def unpack_message(raw: bytes) -> tuple[MessageHeader, bytes]:
    """Header and sealed part. Raises RecordFormatError."""
    head, sealed = split(raw)
    return _decoded(_message_header, head, "the header is not a message's"), sealed


def unpack_thread(raw: bytes) -> tuple[ThreadHeader, bytes]:
    """Header and sealed part. Raises RecordFormatError."""
    head, sealed = split(raw)
    return _decoded(_thread_header, head, "the header is not a thread's"), sealed


def key_of(head: bytes) -> str:
    """The key id of any record's header. Raises RecordFormatError."""
    key_id: str = _fields(head)[0]
    return key_id


def unpack_sealed(raw: bytes) -> tuple[str, bytes]:
    """Key id and sealed part of any record. Raises RecordFormatError."""
    head, sealed = split(raw)
    return key_of(head), sealed


def rekeyed(head: bytes, key_id: str) -> bytes:
    """What comes before the sealed part of a record whose header was `head`, under another key.

    Raises RecordFormatError.
    """
    fields = _fields(head)
    renewed = _to_header([key_id, *fields[1:]])
    return b"\x01%b%b" % (len(renewed).to_bytes(2, "big"), renewed)


def same_version(raw: bytes, stored: bytes) -> bool:
    """Whether both are one version of a record, under whichever keys; `stored` may be damaged, which is no version of
    its own. Raises RecordFormatError for `raw`."""
    fields = _fields(split(raw)[0])
    try:
        others = _fields(split(stored)[0])
    except RecordFormatError:
        return True
    return fields[1:] == others[1:]


def _fields(head: bytes) -> list[Any]:
    """The header's fields, the first of which is the key id."""
    fields = _decoded(_any_header, head, "the header is malformed")
    if not fields or not isinstance(fields[0], str):
        raise RecordFormatError("the header names no key")
    return fields


def message_secret(message: Message, first: str) -> bytes:
    """The plaintext of the sealed part; `first` is the text of the stamp of the message's first version."""
    return _to_secret(
        MessageSecret(
            first, message.author, message.deleted, message.role, message.body, message.reply_to, message.reactions
        )
    )


def thread_secret(thread: Thread) -> bytes:
    return _to_secret(ThreadSecret(thread.author, thread.deleted, thread.title, thread.slug))


def open_message(header: MessageHeader, key: bytes, thread: str, first: str, plaintext: bytes) -> Message:
    """The version that is stored at `key`; `first` is the stamp of the message that the reader expects there. Raises
    RecordFormatError."""
    secret = _decoded(_message_secret, plaintext, "the sealed part is not a message's")
    if secret.first != first or secret.author != header.author or secret.deleted != header.deleted:
        raise RecordFormatError("the header is not the one that was sealed")
    try:
        return Message(
            id=keyspace.message_id_of(first),
            thread=thread,
            author=secret.author,
            role=secret.role,
            ts=keyspace.ns_of(key),
            body=secret.body,
            reply_to=secret.reply_to,
            deleted=secret.deleted,
            reactions=secret.reactions,
        )
    except ValueError as error:
        raise RecordFormatError("the record's place names no stamp") from error


def open_thread(header: ThreadHeader, thread: str, plaintext: bytes) -> Thread:
    """The thread's metadata; `updated_ts` is that of the metadata alone. Raises RecordFormatError."""
    secret = _decoded(_thread_secret, plaintext, "the sealed part is not a thread's")
    if secret.author != header.author or secret.deleted != bool(header.deleted_ns):
        raise RecordFormatError("the header is not the one that was sealed")
    try:
        created = Stamp.parse(header.created)
    except ValueError as error:
        raise RecordFormatError("the header names no time of creation") from error
    return Thread(
        id=thread,
        title=secret.title,
        author=secret.author,
        slug=secret.slug,
        created_ts=created.ns,
        updated_ts=header.updated_ns,
        deleted=secret.deleted,
        deleted_ts=header.deleted_ns,
    )
