"""What the rest of the server knows of the store: data and errors. `conversations` has the operations.

Invariants: nothing here shows an engine, a storage key or a write; authors, ids and timestamps are the only fields that
a store may keep in plaintext. Each error knows the status and the sentence of its HTTP response.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
from collections.abc import AsyncIterator
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

JOB_ID_PATTERN: Final = re.compile(r"job-[0-9]{20}-[0-9a-f]{8}", re.ASCII)
REACTIONS_COUNT_MAX: Final = 1024
"""The identities that react to one message. A new message may have as many."""
RECORD_MISSING: Final = "record_missing"
RECORD_MALFORMED: Final = "record_malformed"
NOT_OPENED: Final = "not_opened"
"""Values of `error` beside the codes of the key service."""


def shown(name: bytes) -> str:
    """The name of an entry, which may be damaged, for operators."""
    return name.decode("ascii", errors="backslashreplace")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value


def json_decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """A decoder for JSON that clients made. msgspec's own takes up to 15 µs for a number with a large exponent, which
    has few bytes; this one takes less than a microsecond for any float."""
    return msgspec.json.Decoder(kind, float_hook=_finite)


def json_text(value: Any) -> Any:
    """The JSON of a body, once for all that needs it: for the record, the answer and whoever reads the message. None
    stays, as it stands for no body."""
    return None if value is None else msgspec.Raw(_encode(value))


_encode: Final = msgspec.json.Encoder().encode
_ANY: Final = json_decoder(object)


class Message(msgspec.Struct, omit_defaults=True):
    """One version of a message. `ts` is Unix nanoseconds of this version. `body` is JSON text (`json_text`), so that a
    list need not decode it. `error`: in a list, why the version does not open: a code of the key service, or
    `record_missing`, `record_malformed`. It then has no role, body, reply and reactions, and its author is not
    verified."""

    id: str
    thread: str
    author: str
    role: str = ""
    ts: int = 0
    body: Any = None
    reply_to: str = ""
    deleted: bool = False
    reactions: dict[str, str] = {}
    error: str = ""

    @property
    def value(self) -> Any:
        """The body, decoded."""
        return None if self.body is None else _ANY.decode(self.body)


class Thread(msgspec.Struct, omit_defaults=True):
    """`slug` is made from the title. `updated_ts`: of the last change of the thread or of its newest message. Times are
    Unix nanoseconds. `error`: in a list, why the thread's record does not open: a code of the key service, or
    `record_missing`, `record_malformed`, `not_opened`. It then has no title and no slug, and its other fields are not
    verified."""

    id: str
    title: str = ""
    author: str = ""
    slug: str = ""
    created_ts: int = 0
    updated_ts: int = 0
    deleted: bool = False
    deleted_ts: int = 0
    error: str = ""


class FormatError(Exception):
    """The directory is no store, one of a newer version, or one of the other kind; the text says what to do."""


class ConditionFailedError(Exception):
    """A stored value was not what the write expected; nothing was written. `key` names the first such value."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key.decode(errors="replace"))
        self.key = key


class StaleRowError(Exception):
    """The row of a job is no longer what was read; nothing was written."""


class ClaimLostError(StaleRowError):
    """Another server has claimed the job's thread; nothing was written."""


class StatusError(Exception):
    """Base of the errors that a client learns of; never raised itself. `status` and `text` are those of the HTTP
    response; no status: a defect. Without a `text`, the error's own text is a sentence for clients."""

    status: ClassVar[int] = 0
    text: ClassVar[str] = ""
    retry_after_s: int = 1
    """The seconds after which a client may try a 503 again."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or self.text)


class StoreError(StatusError):
    """Base of the store's errors; never raised itself."""


class MessageNotFoundError(StoreError):
    status, text = 404, "message not found"


class ThreadNotFoundError(StoreError):
    status, text = 404, "thread not found"


class ThreadDeletedError(StoreError):
    status, text = 403, "thread deleted"


class NotTheAuthorError(StoreError):
    status, text = 403, "author does not match"


class AuthorNotInThreadError(StoreError):
    status, text = 403, "author not found in any message in this thread"


class NotAMemberError(StoreError):
    status, text = 403, "author is not a member of this thread"


class TooManyMembersError(StoreError):
    status, text = 409, "the thread has too many members"


class NoRoomToRemoveError(StoreError):
    status = 409
    text = (
        "the thread has as many members, removed ones counted, as it may have: the removal of somebody who is none of "
        "them can't be recorded"
    )


class MemberIsAuthorError(StoreError):
    status, text = 409, "the author of a thread can't be removed from it"


class InvalidThreadIdError(StoreError):
    """A thread can't be made under the id that was asked for."""

    status, text = 400, "thread must be 1 to 128 letters, digits, dots, underscores or hyphens, and not . or .."


class AmbiguousTimeError(StoreError):
    """A time that does not say where a page of versions ends."""

    status, text = 400, "before is a ts that does not name one version: send the older of a page of versions"


class TooManyVersionsError(StoreError):
    """The message has as many versions, or bytes of them, as it may have."""

    status = 409
    text = (
        "the message has as many versions as it may have: post a new message; this one can still be deleted, and its "
        "reactions removed"
    )


class TooManyReactionsError(StoreError):
    """The message has reactions of REACTIONS_COUNT_MAX identities."""

    status, text = 409, "too many reactions"


class IdempotencyConflictError(StoreError):
    status, text = 409, "this Idempotency-Key was used before with another request"


READ_ONLY_RETRY_S: Final = 60
"""Until a client tries again, while an operator repairs the store."""


class StoreUnavailableError(StoreError):
    """The disk or the key service can't take the write now; `retry_after_s` is what to tell the client."""

    status = 503

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def explained(self) -> str:
        """With the first line of the cause: for an operator's terminal, not for clients."""
        cause = (str(self.__cause__ or "").splitlines() or [""])[0]
        return f"{self}: {cause}" if cause and cause not in str(self) else str(self)


class OutcomeUnknownError(StoreUnavailableError):
    """The write is stored as a whole, or not at all."""


class NotWrittenError(StoreUnavailableError):
    """Nothing of the write is stored, nor will be."""


class StoreReadOnlyError(NotWrittenError):
    """The store is damaged, and RocksDB takes no writes any more until an operator repairs it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, READ_ONLY_RETRY_S)


class StoreLockedError(StoreUnavailableError):
    """Another process has the store open."""


class StoreDamagedError(StoreUnavailableError):
    """A file of the store lost what was written to it, or is missing: what it held can't be read, and the same request
    fails again. `file` is its name, empty if it is not known."""

    status = 500

    def __init__(self, file: str, directory: str = "the store", why: str = "") -> None:
        what = why or (f"the file {file}" if file else "")
        super().__init__(f"{directory} is damaged" + (f": {what}" if what else ""))
        self.file = file

    @property
    def explained(self) -> str:
        return f"{super().explained}; progressdb check says what can't be read (The store is damaged, in the runbook)"


class RecordUnreadableError(StoreError):
    """A stored record does not open (altered, misplaced, or its key is gone); names the record, never its content."""

    status = 500

    def __init__(self, message: str, code: str = "") -> None:
        """`code`: that of the key service, if it refused to open the record."""
        super().__init__(message)
        self.code = code


class ThreadKeyDestroyedError(StoreError):
    """The key that the thread is written under is destroyed, so that nothing can be written."""

    status, text = 409, "the key of this thread is destroyed: nothing can be changed in it; use another thread"


class KeyServiceRefusedError(StoreError):
    """The key service refuses what the server asks, and would refuse it again; the text is for clients."""

    status = 500

    def __init__(self, code: str) -> None:
        super().__init__(f"the key service refused what the server asked ({code}), and will until an operator mends it")
        self.code = code


class Idempotency(msgspec.Struct, frozen=True):
    """Scope and key of a create that may be retried. `scope` is a keyed digest made by the routes, never a raw API
    key."""

    scope: str
    key: str


class NewMessage(msgspec.Struct):
    """What a client may set of a message. An empty `thread` asks for a new one."""

    author: str
    thread: str = ""
    role: str = "user"
    body: Any = None
    reply_to: str = ""
    reactions: dict[str, str] = {}
    as_member: bool = False
    """Whether the author must be a member of the thread. False: the caller acts for anyone, and the message makes its
    author a member, unless that author was removed."""

    def first_version(self, message_id: str, thread: str, ts: int) -> Message:
        return Message(
            id=message_id,
            thread=thread,
            author=self.author,
            role=self.role,
            ts=ts,
            body=json_text(self.body),
            reply_to=self.reply_to,
            reactions=self.reactions,
        )


class Record(msgspec.Struct, frozen=True, gc=False):
    """A stored record: the additional data that it is sealed under, its bytes, its header, its key's id, and the part
    that only the key opens."""

    aad: bytes
    raw: bytes
    head: bytes
    key_id: str
    sealed: bytes

    @property
    def name(self) -> str:
        """For operators."""
        return shown(self.aad)


class Chunk(NamedTuple):
    """Consecutive entries of a thread. `malformed` are the names of entries that are no records. `cursor` is where the
    next chunk begins; `read_at` says when this one was read, for `Rekeying.moves`."""

    records: list[Record]
    malformed: list[str]
    cursor: str
    read_at: int

    @property
    def entries(self) -> int:
        return len(self.records) + len(self.malformed)


class KeptRecord(NamedTuple):
    """What a job has kept of a record that it re-encrypted: the record's additional data, and the id of the key that
    the kept bytes are under (empty when they are malformed)."""

    aad: bytes
    key_id: str


class Restored(NamedTuple):
    """`restored` records are back; of `kept` ones another version has been stored since, which stays."""

    restored: int
    kept: int


class OpaqueWrite(msgspec.Struct, frozen=True):
    """What is written together with the row of a job. Only the store makes one and sees what is in it."""


class RowWrite(NamedTuple):
    """The row of a job that is being written, and the end of the write."""

    job_id: str
    thread_id: str
    done: asyncio.Future[None]


class MessageRange(msgspec.Struct, frozen=True):
    """A part of a thread's messages. `limit` keeps the most recent; `before` and `after` are message ids, exclusive."""

    limit: int | None = None
    before: str | None = None
    after: str | None = None
    include_deleted: bool = False


class Page:
    """At most `limit` entries of a list, from `cursor` on, which is the `following` of another page; empty: from the
    beginning. `following` is known once the page has been read: empty if there are no more."""

    __slots__ = ("cursor", "following", "limit")

    def __init__(self, limit: int, cursor: str = "") -> None:
        self.limit = limit
        self.cursor = cursor
        self.following = ""


class VersionList(NamedTuple):
    """Versions of a message, oldest first, in chunks. `older` is the `before` of the page before this one, empty on the
    first."""

    chunks: AsyncIterator[list[Message]]
    older: str


class StoredVersion(NamedTuple):
    """The latest version of a message, or one version of it, with the id of the key that its record is under.
    `versions` is how many the message has, counted up to a bound."""

    message: Message
    key_id: str
    versions: int


class BackupFile(msgspec.Struct):
    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct):
    """The manifest of a backup. Every write that was acknowledged by `created_ns` is in the backup."""

    format: int
    created_ns: int
    files: list[BackupFile]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


class RegisteredBackup(msgspec.Struct, omit_defaults=True):
    """A backup that was begun and is not forgotten. One of a database is made by other programs: its path is its
    label, and nothing here can find it."""

    path: str
    created_ns: int
    of_database: bool = False

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @property
    def gone(self) -> bool:
        """Whether nothing is found at its path; a path that can't be looked at counts as there."""
        if self.of_database:
            return True
        try:
            os.lstat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        return False


class DatabaseReport(msgspec.Struct):
    """What a command has found of the database of a store."""

    schema: int
    standbys: str
    """`synchronous_standby_names`: without any, one disk has what was acknowledged."""
    connected: int | None
    """How many of them confirm commits now, None if the role may not see that (`pg_read_all_stats`)."""
    tls: str
    """The protocol's version, empty on a Unix socket."""
    problems: list[str]


class BackupError(StatusError):
    """The backup could not be made, or is not whole; its own text, for operators, says which file and what to do."""

    status, text = 500, "the backup failed and its files were removed; the log has the reason with the request id"


class BackupExistsError(BackupError):
    """Something of this name is there; nothing was begun."""

    status, text = 409, "a backup of this name exists"


class BackupBusyError(BackupError):
    status, text = 409, "another backup is running: wait until it ends"


class BackupOfDatabaseError(BackupError):
    """Other programs back up a database."""

    status, text = 409, "the store is in a database: back it up with pg_basebackup or pgBackRest"


class BackupThereError(BackupError):
    """The register forgets no backup that is there."""

    status, text = 409, "the backup still exists: delete it and all its copies first"


class BackupNotFoundError(BackupError):
    status, text = 404, "no backup of this name is registered"
