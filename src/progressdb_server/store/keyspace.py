"""The key space: every key that the store writes, built and parsed in one place (docs/spec/store.md).

Invariants: keys are ASCII; `:` separates parts and appears in none, since every part is percent-encoded (RFC 3986,
unreserved characters stay); so no id or author, whatever its characters, reaches another key. Stamps are fixed in
width, so keys sort by time. It must never hold private text: parts are ids, authors and stamps.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final
from urllib.parse import quote, unquote

from progressdb_server.store.clock import Stamp

FORMAT: Final = b"store:format"
STATE: Final = b"store:state"
EPOCH: Final = b"kms:epoch"
BACKUPS: Final = b"store:backup:"
THREAD: Final = b"thread:"
MAP: Final = b"kms:map:thread:"
VERSION: Final = b"version:msg:"
ORDER: Final = b"index:order:"
WRITER: Final = b"index:writer:"
AUTHOR: Final = b"index:author:"
CREATED: Final = b"index:created:"
CLOSED: Final = b"index:closed:"
IDEMPOTENCY: Final = b"idem:"
INDEX: Final = b"index:"

PARTS_CACHED_MAX: Final = 16_384
STAMP_BYTES: Final = 27
"""Of a stamp's text."""

_MESSAGE_ID: Final = re.compile(r"msg-([1-9][0-9]{0,19})-([0-9]{6})", re.ASCII)


@lru_cache(maxsize=PARTS_CACHED_MAX)
def part(text: str) -> bytes:
    """One part of a key."""
    return quote(text, safe="").encode()


def unpart(raw: bytes) -> str:
    return unquote(raw.decode(), errors="strict")


def after(prefix: bytes) -> bytes:
    """The least key above every key that starts with `prefix` (whose last byte is `:`, or any byte below 0xff)."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def message_id(first: Stamp) -> str:
    return f"msg-{first.ns}-{first.seq:06d}"


def parse_message_id(text: str) -> Stamp | None:
    """The stamp of the message's first version; None for anything that is no message id of this server."""
    match = _MESSAGE_ID.fullmatch(text)
    return Stamp(int(match[1]), int(match[2])) if match else None


def thread_id(created: Stamp) -> str:
    return f"thread-{created.ns}-{created.seq:06d}"


def meta(thread: str) -> bytes:
    return b"thread:%b:meta" % part(thread)


def messages(thread: str) -> bytes:
    """Prefix of the thread's records; the stamp follows."""
    return b"thread:%b:msg:" % part(thread)


def record(thread: str, stamp: Stamp) -> bytes:
    return messages(thread) + stamp.raw


def key_map(thread: str) -> bytes:
    return MAP + part(thread)


def versions(message: str) -> bytes:
    """Prefix of the message's versions; the stamp follows. The value is the thread's id."""
    return b"version:msg:%b:" % part(message)


def order(thread: str) -> bytes:
    """Prefix of the thread's messages in order of creation; the first version's stamp follows. Value: see
    `messages.Place`."""
    return b"index:order:%b:" % part(thread)


def writers(thread: str) -> bytes:
    return b"index:writer:%b:" % part(thread)


def writer(thread: str, author: str) -> bytes:
    return writers(thread) + part(author)


def authored(author: str) -> bytes:
    """Prefix of the author's threads; `<created stamp>:<thread>` follows."""
    return b"index:author:%b:" % part(author)


def created(stamp: Stamp, thread: str) -> bytes:
    """What follows `CREATED` and `authored(...)`."""
    return b"%b:%b" % (stamp.raw, part(thread))


def closed(thread: str) -> bytes:
    """Present when the thread is deleted."""
    return CLOSED + part(thread)


def stamp_of(key: bytes) -> Stamp:
    """Of a key that ends in a stamp. Raises ValueError."""
    return Stamp.parse(key[key.rindex(b":") + 1 :].decode())
