"""The record format: a small plaintext header, then the part that only the key service can open (docs/spec/store.md).

Layout: form byte, header length (2 bytes, big-endian), header (MessagePack array), then what encrypt answered:
nonce(24) | ciphertext | tag(16). The additional data of the encryption is the record's storage key.

Forms:
- FORM_FIRST: metadata of a thread, and the first version of a message.
- FORM_LATER: a later version of a message. Only an edit has content (role, body, reply_to) of its own; a change of
  reactions and a tombstone name the version whose content they keep.

Invariants:
- A record is self-describing: its key id is the first element of every header, so reading never depends on a map.
- Everything that a user typed is in the sealed part. The header's copies (author, deleted) are there to find and
  rebuild; the sealed ones count, and a record whose two copies differ does not open.
- A record that no request to the key service can hold is none: it can't spoil the batch that it is opened in.
- A record of one form does not open as the other form, although the form byte is not sealed: the types of the two
  sealed arrays differ.
- A version without content names, in its sealed part, a version of the same message that has content of its own.
- Message records are never rewritten but by a key rotation; `rekey` is how.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeVar

import msgspec

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.client.items import SEALED_BYTES_MAX
from progressdb_server.store import keyspace
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import Message, Thread

FORM_FIRST: Final = 1
FORM_LATER: Final = 2
_PREFIX_BYTES: Final = 3
HEADERS_CACHED_MAX: Final = 1024
"""Decoded headers in FORM_FIRST. All first versions of an author under one key have the same header."""

T = TypeVar("T")


class RecordFormatError(Exception):
    """The bytes are no record that this version of the program reads."""


class MessageHeader(msgspec.Struct, array_like=True, frozen=True):
    """`first` is the stamp of the message's first version, empty when this is it."""

    key_id: str
    first: str
    author: str
    deleted: bool


class LaterHeader(MessageHeader, array_like=True, frozen=True):
    """`content` is the stamp of the version that has this version's content, empty when this version has it."""

    content: str


class ThreadHeader(msgspec.Struct, array_like=True, frozen=True):
    """`created` is a stamp. `updated_ns`: of the last change of the metadata; messages touch a thread by their own
    stamps."""

    key_id: str
    author: str
    created: str
    updated_ns: int
    deleted_ns: int


class MessageSecret(msgspec.Struct, array_like=True, frozen=True):
    """The sealed part in FORM_FIRST, as a JSON array. `first` binds the record to its message. `body` is JSON that
    `_to_secret` wrote, so that a reader needs not decode it."""

    first: str
    author: str
    deleted: bool
    role: str
    body: msgspec.Raw
    reply_to: str
    reactions: dict[str, str]


class Before(NamedTuple):
    """How many versions a message had before this one, and the bytes of their sealed parts."""

    versions: int
    bytes: int


_NULL: Final = msgspec.Raw(b"null")
_NOTHING_BEFORE: Final = Before(0, 0)


class LaterSecret(msgspec.Struct, array_like=True, frozen=True):
    """The sealed part in FORM_LATER. `versions` and `bytes` are those of `Before`; `own` is role, body and reply_to,
    None when the version at `content` has them."""

    first: str
    author: str
    deleted: bool
    content: str
    versions: int
    bytes: int
    reactions: dict[str, str]
    own: tuple[str, msgspec.Raw, str] | None


class OpenedVersion(NamedTuple):
    """A version as its own record has it. `content`: the stamp of the version from which it takes its content, empty
    when `message` is whole."""

    message: Message
    content: str
    before: Before


class ThreadSecret(msgspec.Struct, array_like=True, frozen=True):
    author: str
    deleted: bool
    title: str
    slug: str


_to_header = msgspec.msgpack.Encoder().encode
_message_header = lru_cache(maxsize=HEADERS_CACHED_MAX)(msgspec.msgpack.Decoder(MessageHeader).decode)
_later_header = msgspec.msgpack.Decoder(LaterHeader).decode
_thread_header = msgspec.msgpack.Decoder(ThreadHeader).decode
_any_header = msgspec.msgpack.Decoder(list[Any]).decode
_to_secret = msgspec.json.Encoder().encode
_message_secret = msgspec.json.Decoder(MessageSecret).decode
_later_secret = msgspec.json.Decoder(LaterSecret).decode
_thread_secret = msgspec.json.Decoder(ThreadSecret).decode


def pack(header: MessageHeader | ThreadHeader, sealed: bytes) -> bytes:
    form = FORM_LATER if isinstance(header, LaterHeader) else FORM_FIRST
    return _prefix(form, _to_header(header)) + sealed


def _prefix(form: int, head: bytes) -> bytes:
    return b"%c%b%b" % (form, len(head).to_bytes(2, "big"), head)


def split(raw: bytes) -> tuple[bytes, bytes]:
    """Header and sealed part of any record. Raises RecordFormatError."""
    if len(raw) < _PREFIX_BYTES or raw[0] not in (FORM_FIRST, FORM_LATER):
        raise RecordFormatError("unknown form of a record")
    end = _PREFIX_BYTES + (raw[1] << 8 | raw[2])
    if end > len(raw):
        raise RecordFormatError("the record is cut short")
    return raw[_PREFIX_BYTES:end], raw[end:]


def _decoded(decode: Callable[[bytes], T], raw: bytes, what: str) -> T:
    try:
        return decode(raw)
    except UNDECODABLE as error:
        raise RecordFormatError(what) from error


def unpack_message(raw: bytes) -> tuple[MessageHeader, bytes]:
    """Header and sealed part. Raises RecordFormatError."""
    head, sealed = split(raw)
    try:
        header = (_later_header if raw[0] == FORM_LATER else _message_header)(head)
    except UNDECODABLE as error:
        raise RecordFormatError("the header is not a message's") from error
    _check_sendable(header.key_id, sealed)
    return header, sealed


def unpack_thread(raw: bytes) -> tuple[ThreadHeader, bytes]:
    """Header and sealed part. Raises RecordFormatError."""
    head, sealed = split(raw)
    if raw[0] != FORM_FIRST:
        raise RecordFormatError("the record is not a thread's")
    header = _decoded(_thread_header, head, "the header is not a thread's")
    _check_sendable(header.key_id, sealed)
    return header, sealed


def _check_sendable(key_id: str, sealed: bytes) -> None:
    """Checks what the client of the key service refuses to send. Raises RecordFormatError."""
    if len(key_id) > api.ID_CHARS_MAX or not key_id.isascii() or len(sealed) > SEALED_BYTES_MAX:
        raise RecordFormatError("no request to the key service can hold the record")


def key_of(head: bytes) -> str:
    """The key id of any record's header. Raises RecordFormatError."""
    key_id: str = _fields(head)[0]
    return key_id


def unpack_sealed(raw: bytes) -> tuple[str, bytes]:
    """Key id and sealed part of any record. Raises RecordFormatError."""
    head, sealed = split(raw)
    return key_of(head), sealed


def rekey(form: int, head: bytes, key_id: str) -> bytes:
    """What comes before the sealed part of a record of this form whose header was `head`, under another key.

    Raises RecordFormatError.
    """
    fields = _fields(head)
    return _prefix(form, _to_header([key_id, *fields[1:]]))


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
    """The plaintext of the sealed part in FORM_FIRST; `first` is the text of the stamp of the message's first
    version."""
    return _to_secret(
        MessageSecret(
            first, message.author, message.deleted, message.role, message.body, message.reply_to, message.reactions
        )
    )


def later_secret(message: Message, first: str, content: str, before: Before) -> bytes:
    """The plaintext of the sealed part in FORM_LATER. `content` is the text of the stamp of the version that has the
    content; empty: this one."""
    own = None if content else (message.role, message.body, message.reply_to)
    return _to_secret(LaterSecret(first, message.author, message.deleted, content, *before, message.reactions, own))


def thread_secret(thread: Thread) -> bytes:
    return _to_secret(ThreadSecret(thread.author, thread.deleted, thread.title, thread.slug))


def open_message(header: MessageHeader, key: bytes, thread: str, first: str, plaintext: bytes) -> OpenedVersion:
    """The version that is stored at `key`; `first` is the stamp of the message that the reader expects there. Raises
    RecordFormatError."""
    if not isinstance(header, LaterHeader):
        return OpenedVersion(open_first(header, key, thread, first, plaintext), "", _NOTHING_BEFORE)
    secret = _decoded(_later_secret, plaintext, "the sealed part is not a later version's")
    if secret.content != header.content or (secret.own is None) != bool(secret.content):
        raise RecordFormatError("the header is not the one that was sealed")
    role, body, reply_to = secret.own or ("", None, "")
    message = _message(header, secret, key, thread, first, role=role, body=body, reply_to=reply_to)
    return OpenedVersion(message, secret.content, Before(secret.versions, secret.bytes))


def open_first(header: MessageHeader, key: bytes, thread: str, first: str, plaintext: bytes) -> Message:
    """Opens a first version, which is a whole message, like `open_message`."""
    if not key.endswith(first.encode()):
        raise RecordFormatError("a later version in the form of a first one")
    try:
        secret = _message_secret(plaintext)
    except UNDECODABLE as error:
        raise RecordFormatError("the sealed part is not a message's") from error
    return _message(header, secret, key, thread, first, role=secret.role, body=secret.body, reply_to=secret.reply_to)


def _message(
    header: MessageHeader,
    secret: MessageSecret | LaterSecret,
    key: bytes,
    thread: str,
    first: str,
    *,
    role: str,
    body: Any,
    reply_to: str,
) -> Message:
    """The message of a sealed part, with its content. Raises RecordFormatError if it belongs elsewhere."""
    if secret.first != first or secret.author != header.author or secret.deleted != header.deleted:
        raise RecordFormatError("the header is not the one that was sealed")
    try:
        return Message(
            id=keyspace.message_id_of(first),
            thread=thread,
            author=secret.author,
            role=role,
            ts=keyspace.ns_of(key),
            body=None if body == _NULL else body,
            reply_to=reply_to,
            deleted=secret.deleted,
            reactions=secret.reactions,
        )
    except ValueError as error:
        raise RecordFormatError("the record's place names no stamp") from error


def with_content(version: OpenedVersion, content: OpenedVersion) -> Message:
    """The whole message of a version that takes its content from `content`. Raises RecordFormatError."""
    source = content.message
    if content.content or source.id != version.message.id:
        raise RecordFormatError("the version that should have the content has none for this message")
    return msgspec.structs.replace(version.message, role=source.role, body=source.body, reply_to=source.reply_to)


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
        created_ts=created.time_ns,
        updated_ts=header.updated_ns,
        deleted=secret.deleted,
        deleted_ts=header.deleted_ns,
    )
