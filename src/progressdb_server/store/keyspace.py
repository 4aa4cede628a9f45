"""The key space: stamps, ids, and every key that the store writes, built and parsed in one place (docs/spec/store.md).

Owns: the last stamp given out (`Clock`), and the form of keys, ids and of the entries of the order index. Invariants:
- Keys are ASCII; `:` separates parts and appears in none, since every part is percent-encoded (RFC 3986, unreserved
  characters stay). So no id or author reaches the key of another one.
- Stamps have one width, so keys sort by time. They strictly increase, within a process and across restarts
  (`Clock.recover`), also when the system clock steps back: then the nanoseconds stay and the sequence counts on. When
  it steps back by more than BACK_NS_MAX, it was in the future before. Then a new era begins, whose stamps sort after
  all earlier ones and have the true time.
It must never hold private text: parts are ids, authors and stamps.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

FORMAT: Final = b"store:format"
STATE: Final = b"store:state"
"""Present in a store that was made when posting into a thread already needed membership."""
EPOCH: Final = b"kms:epoch"
CLOCK: Final = b"store:clock"
BACKUPS: Final = b"store:backup:"
THREAD: Final = b"thread:"
MAP: Final = b"kms:map:thread:"
VERSION: Final = b"version:msg:"
ORDER: Final = b"index:order:"
WRITER: Final = b"index:writer:"
MEMBER: Final = b""
REMOVED: Final = b"r"
"""Values of an entry of `writer`."""
AUTHOR: Final = b"index:author:"
CREATED: Final = b"index:created:"
CLOSED: Final = b"index:closed:"
IDEMPOTENCY: Final = b"idem:"
INDEX: Final = b"index:"
JOBS: Final = b"job:"
MIGRATED: Final = b"backup:migrate:"
CLAIMS: Final = b"claim:"
SERVERS: Final = b"server:"
HEADS: Final = b"head:"
"""With the part of a thread, for the row of a database that has the thread's last stamp; no entry has such a key."""

END: Final = b"\xff"
"""Above every key."""
PARTS_CACHED_MAX: Final = 16_384
STAMP_BYTES: Final = 27
"""The length of a stamp's text."""
SEQUENCE_MAX: Final = 999_999
"""Six digits in a key."""

ERA_NS: Final = 10**19
"""A stamp's number is `era * ERA_NS + Unix nanoseconds`: the first of its 20 digits is the era."""
ERA_MAX: Final = 9
STAMP_NS_MAX: Final = (ERA_MAX + 1) * ERA_NS - ERA_NS // 10
"""The largest time of a stamp that others may follow, all of 20 digits: thirty years are left after it."""
BACK_NS_MAX: Final = 24 * 3600 * 1_000_000_000
"""A clock that steps back by less starts no era: stamps are ahead of it for at most this long."""
NOW_NS_MIN: Final = 1_577_836_800 * 1_000_000_000
"""2020-01-01: an earlier clock is certainly wrong (a machine without a battery starts in 1970). It begins no era, and
nothing expires by it."""

_MESSAGE_ID: Final = re.compile(r"msg-([1-9][0-9]{0,19})-([0-9]{6})", re.ASCII)
_DELETED: Final = b"d"


# --- stamps -----------------------------------------------------------------------------------------------------------
class Stamp(NamedTuple):
    """Moment and order of a stored version: era and Unix nanoseconds in one number, and a sequence that distinguishes
    stamps of one nanosecond. Its text sorts as it does."""

    ns: int
    seq: int

    @property
    def time_ns(self) -> int:
        """Unix nanoseconds."""
        return self.ns % ERA_NS

    @property
    def era(self) -> int:
        return self.ns // ERA_NS

    @property
    def raw(self) -> bytes:
        return b"%020d-%06d" % self

    @property
    def text(self) -> str:
        return self.raw.decode()

    def check(self) -> None:
        """Checks that others can follow the stamp. Raises ValueError."""
        if not (0 <= self.ns <= STAMP_NS_MAX and 0 <= self.seq <= SEQUENCE_MAX):
            raise ValueError("not a stamp that others can follow")

    def or_later(self, raw: bytes) -> Stamp:
        """The stamp of this text if it is later, and others can follow it."""
        try:
            stamp = Stamp.parse(raw.decode())
            stamp.check()
        except ValueError:
            return self
        return max(self, stamp)

    @classmethod
    def parse(cls, text: str) -> Stamp:
        """Parses the text of a stamp. Anything else is a ValueError."""
        if (
            len(text) != STAMP_BYTES
            or text[20] != "-"
            or not (text[:20].isdecimal() and text[21:].isdecimal() and text.isascii())
        ):
            raise ValueError("not a stamp")
        return cls(int(text[:20]), int(text[21:]))


class Clock:
    """Gives out stamps. `on_era` is called with the last stamp of an era and the first one of the next."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.now_ns = now_ns
        self.on_era: Callable[[Stamp, Stamp], None] | None = None
        self._ns = 0
        self._seq = 0
        self._era_ns = 0

    @property
    def last(self) -> Stamp:
        return Stamp(self._ns, self._seq)

    def recover(self, last: Stamp) -> None:
        """Continue after `last`, the highest stamp in the store. Raises ValueError for one that no stamp can follow."""
        last.check()
        if last > self.last:
            self._ns, self._seq = last
            self._era_ns = last.era * ERA_NS

    def may_follow(self, last: Stamp) -> bool:
        """Whether a stamp of the true time can follow, if only in the next era."""
        return last.era < ERA_MAX or last.time_ns - self.now_ns() <= BACK_NS_MAX

    def hurry(self, ns: int) -> None:
        """Give out stamps that are at least so far ahead of the system clock, until that reaches them."""
        self.recover(Stamp(self._era_ns + self.now_ns() + ns, 0))

    @property
    def ahead_ns(self) -> int:
        """How far the last stamp is ahead of the system clock; 0 if it is not."""
        return max(0, self._ns - self._era_ns - self.now_ns())

    def next(self) -> Stamp:
        now = self._era_ns + self.now_ns()
        if now > self._ns:
            self._ns, self._seq = now, 0
        elif self._ns - now > BACK_NS_MAX and self._may_begin_era(now):
            before = self.last
            self._era_ns += ERA_NS
            self._ns, self._seq = now + ERA_NS, 0
            if self.on_era is not None:
                self.on_era(before, self.last)
        elif self._seq < SEQUENCE_MAX:
            self._seq += 1
        else:
            self._ns, self._seq = self._ns + 1, 0
        return Stamp(self._ns, self._seq)

    def _may_begin_era(self, now: int) -> bool:
        return now - self._era_ns >= NOW_NS_MIN and self._era_ns < ERA_MAX * ERA_NS


# --- parts and ranges -------------------------------------------------------------------------------------------------
@lru_cache(maxsize=PARTS_CACHED_MAX)
def part(text: str) -> bytes:
    """One part of a key."""
    return quote(text, safe="").encode()


def unpart(raw: bytes) -> str:
    return unquote(raw.decode(), errors="strict")


def after(prefix: bytes) -> bytes:
    """The least key above every key that starts with `prefix` (whose last byte is `:`, or any byte below 0xff)."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def next_key(key: bytes) -> bytes:
    """The least key above `key`: where a walk continues."""
    return key + b"\0"


# --- ids --------------------------------------------------------------------------------------------------------------
def message_id(first: Stamp) -> str:
    return f"msg-{first.ns}-{first.seq:06d}"


def message_id_of(first: str) -> str:
    """The id of the message with this first stamp. Raises ValueError for another text."""
    return f"msg-{int(first[:20])}-{first[21:]}"


def parse_message_id(text: str) -> Stamp | None:
    """The stamp of the message's first version; None for anything that is no message id of this server."""
    match = _MESSAGE_ID.fullmatch(text)
    return Stamp(int(match[1]), int(match[2])) if match else None


def cursor(version: Stamp) -> str:
    """The cursor at which a page of a message's versions ends, as clients see it."""
    return f"{version.ns}-{version.seq:06d}"


def parse_cursor(text: str) -> Stamp | int:
    """The stamp of a `cursor`, or Unix nanoseconds. Raises ValueError."""
    ns, _, seq = text.partition("-")
    if seq:
        return Stamp.parse(f"{ns:0>20}-{seq:0>6}")
    return Stamp.parse(f"0{ns:0>19}-000000").ns


def thread_id(created: Stamp) -> str:
    return f"thread-{created.ns}-{created.seq:06d}"


def new_job_id(now_ns: int) -> str:
    """Ids sort by time."""
    return f"job-{now_ns:020d}-{os.urandom(4).hex()}"


def jobs_since(ns: int) -> bytes:
    """Not above the keys of jobs whose ids were made from then on."""
    return b"%bjob-%020d" % (JOBS, ns)


# --- threads ----------------------------------------------------------------------------------------------------------
def meta(thread: str) -> bytes:
    return meta_of(part(thread))


def meta_of(thread_part: bytes) -> bytes:
    return b"thread:%b:meta" % thread_part


def key_map(thread: str) -> bytes:
    return MAP + part(thread)


def closed_key(thread: str) -> bytes:
    """Present when the thread is deleted."""
    return CLOSED + part(thread)


def writer(thread: str, author: str) -> bytes:
    """Present when the author owns the thread, has written in it, or was added to it. The value says whether the
    author was removed (`conversations.membership`)."""
    return b"index:writer:%b:%b" % (part(thread), part(author))


def writers(thread: str) -> bytes:
    """Prefix of the entries `writer(thread, ...)`."""
    return b"index:writer:%b:" % part(thread)


def author_threads(author: str) -> bytes:
    """Prefix of the author's threads; `creation(...)` follows."""
    return b"index:author:%b:" % part(author)


def creation(stamp: Stamp, thread: str) -> bytes:
    """What follows `CREATED` and `author_threads(...)`."""
    return b"%b:%b" % (stamp.raw, part(thread))


def last_part(key: bytes) -> str:
    """The thread of an entry of `CREATED`, `author_threads(...)` or `MAP`; the author of one of `writers(...)`."""
    return unpart(key[key.rindex(b":") + 1 :])


# --- messages ---------------------------------------------------------------------------------------------------------
def records(thread: str) -> tuple[bytes, bytes]:
    """The range of the thread's records: its metadata, then its messages in order of their stamps."""
    prefix = b"thread:%b:" % part(thread)
    return prefix, after(prefix)


def messages(thread: str) -> bytes:
    """Prefix of the thread's message records; the stamp follows."""
    return b"thread:%b:msg:" % part(thread)


def message_of(thread_part: bytes, stamp: bytes) -> bytes:
    return b"thread:%b:msg:%b" % (thread_part, stamp)


def versions(message: str) -> bytes:
    """Prefix of the message's versions; the stamp follows. The value is the encoded part of the thread."""
    return b"version:msg:%b:" % part(message)


def order(thread: str) -> bytes:
    """Prefix of the thread's messages in order of creation; the first version's stamp follows. The value is an
    `OrderEntry`."""
    return b"index:order:%b:" % part(thread)


def is_version(key: bytes) -> bool:
    """Whether it is the key of the record of a version."""
    return key.startswith(THREAD) and key[-STAMP_BYTES - 5 : -STAMP_BYTES] == b":msg:"


def version_keys(thread_part: bytes, message: str, first: bytes, own: bytes) -> tuple[bytes, bytes, bytes]:
    """The keys of one version: its record, its version entry, and the order entry of its message. `message` is an id of
    this server, `first` and `own` are stamps.
    """
    return (
        b"thread:%b:msg:%b" % (thread_part, own),
        b"version:msg:%b:%b" % (message.encode(), own),
        b"index:order:%b:%b" % (thread_part, first),
    )


def stamp_of(key: bytes) -> Stamp:
    """The stamp at the end of a key. Raises ValueError."""
    return Stamp.parse(key[key.rindex(b":") + 1 :].decode())


def ns_of(key: bytes) -> int:
    """The Unix nanoseconds of a key that ends in a stamp. Raises ValueError."""
    return int(key[-STAMP_BYTES:-7]) % ERA_NS


class OrderEntry(NamedTuple):
    """An entry of the order index: stamps of the message's first and latest version, whether it is deleted, and the
    stored value.

    On disk: the latest stamp, empty when it is the first one; then `d` if the latest version is a tombstone.
    """

    first: bytes
    latest: bytes
    deleted: bool
    value: bytes

    @classmethod
    def parse(cls, key: bytes, value: bytes) -> OrderEntry:
        first = key[-STAMP_BYTES:]
        if not value:
            return cls(first, first, False, value)
        entry = latest(first, value)
        if len(entry) != STAMP_BYTES:
            raise ValueError("the index entry is malformed")
        return cls(first, entry, is_deleted(value), value)


def is_deleted(value: bytes) -> bool:
    """True if the value of an `OrderEntry` says that the message is deleted."""
    return value.endswith(_DELETED)


def latest(first: bytes, value: bytes) -> bytes:
    """The stamp of the latest version, as the value of an `OrderEntry` has it, well-formed or not."""
    return value.removesuffix(_DELETED) or first


def place(latest: bytes, *, is_first: bool, deleted: bool) -> bytes:
    """The value of an `OrderEntry`."""
    return (b"" if is_first else latest) + (_DELETED if deleted else b"")


# --- jobs and backups -------------------------------------------------------------------------------------------------
def job(job_id: str) -> bytes:
    return JOBS + job_id.encode()


def claim(thread: str) -> bytes:
    """Which server works on the thread's keys (`store.claims`)."""
    return CLAIMS + part(thread)


def room(thread: str) -> bytes:
    """Counts the additions to the members of a thread that several servers may change."""
    return b"claim:%b:room" % part(thread)


def server(server_id: str) -> bytes:
    """Until when the claims of a server hold."""
    return SERVERS + server_id.encode()


def replaced_records(job_id: str) -> bytes:
    """Prefix of the records that the job has replaced; the record's whole key follows."""
    return b"%b%b:" % (MIGRATED, job_id.encode())


def backup(created_ns: int) -> bytes:
    """The entry of a backup of the store in the register."""
    return b"%b%020d" % (BACKUPS, created_ns)


def idempotency(digest: bytes) -> bytes:
    return IDEMPOTENCY + digest.hex().encode()
