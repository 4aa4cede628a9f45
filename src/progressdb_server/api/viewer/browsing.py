"""Reads the threads, messages and keys that the viewer shows from the store and the key service.

Owns: the pages of threads and messages, and which keys protect a record. Invariants: the cost of a page does not depend
on the size of its thread: at most `PAGE_THREADS`, `PAGE_MESSAGES` or `VERSIONS_MAX` records are decrypted. The key of a
record is read from the record itself and not from the thread's metadata. Without `opened`, a page shows what is stored
in plaintext and does not ask the key service. It must never write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from minikms import api
from minikms.api.errors import KmsError, KmsRefusedError
from progressdb_server.conversations.whole import Conversations
from progressdb_server.kms.provider import Provider
from progressdb_server.store.model import RECORD_MISSING, Message, StoredVersion, Thread, ThreadNotFoundError

PAGE_THREADS: Final = 50
PAGE_MESSAGES: Final = 50
VERSIONS_MAX: Final = 200


class ThreadPage(NamedTuple):
    threads: list[Thread]
    next_cursor: str
    """Cursor of the next page; empty on the last page."""


class Protection(NamedTuple):
    """The keys of one record.

    `dek_since_ns` and `kek_since_ns`: the earliest time from which the DEK and the KEK can have protected the record,
    in Unix nanoseconds; 0 if the key service gives no time.
    """

    key_id: str
    state: str
    dek_since_ns: int
    kek_version: int
    kek_since_ns: int


class ShownMessage(NamedTuple):
    """The latest version of a message, its keys, and the number of versions."""

    message: Message
    versions: int
    protection: Protection


class MessagePage(NamedTuple):
    messages: list[ShownMessage]
    older: bool
    newer: bool


class VersionPage(NamedTuple):
    versions: list[tuple[Message, Protection]]
    """At most VERSIONS_MAX, oldest first."""
    older: bool
    """Whether the message has older versions, which are not shown."""


class _Keys(NamedTuple):
    deks: dict[str, api.KeyAnswer]
    keks: dict[int, int]
    """KEK version → its creation time in Unix nanoseconds."""


class Browser:
    def __init__(self, store: Conversations, provider: Provider) -> None:
        self._store = store
        self._provider = provider

    async def threads(self, *, author: str, id_prefix: str, cursor: str, opened: bool = True) -> ThreadPage:
        """Threads, newest first. With `id_prefix`: the threads whose ids begin with it, in the order of ids."""
        ids, next_cursor = await self._store.threads.page(
            author=author, id_prefix=id_prefix, cursor=cursor, limit=PAGE_THREADS
        )
        threads = await self._store.threads.listed(ids, opened=opened)
        if id_prefix and author:
            threads = [thread for thread in threads if thread.author == author]
        return ThreadPage(threads, next_cursor)

    async def thread(self, thread_id: str, *, opened: bool = True) -> Thread:
        """A thread that does not open has `error`. Raises ThreadNotFoundError."""
        (thread,) = await self._store.threads.listed([thread_id], opened=opened)
        if thread.error == RECORD_MISSING:
            raise ThreadNotFoundError
        return thread

    async def messages(self, thread: str, *, before: str = "", after: str = "", opened: bool = True) -> MessagePage:
        """The newest messages, or those next to a message id. Raises MessageNotFoundError for a malformed id."""
        page, more = await self._store.reading.page(
            thread, before=before, after=after, limit=PAGE_MESSAGES, versions_max=VERSIONS_MAX, opened=opened
        )
        if not page:
            return MessagePage([], older=bool(after), newer=bool(before))
        keys = await self._keys(page) if opened else _Keys({}, {})
        messages = [ShownMessage(version.message, version.versions, _protection(version, keys)) for version in page]
        return MessagePage(messages, older=bool(after) or more, newer=bool(before) or (bool(after) and more))

    async def message(self, message: str, *, opened: bool = True) -> VersionPage:
        """The newest versions of a message. Raises MessageNotFoundError."""
        versions, more = await self._store.reading.version_page(message, VERSIONS_MAX, opened=opened)
        keys = await self._keys(versions) if opened else _Keys({}, {})
        return VersionPage([(version.message, _protection(version, keys)) for version in versions], more)

    # --- keys -----------------------------------------------------------------------------------------------------
    async def _keys(self, versions: Sequence[StoredVersion]) -> _Keys:
        """The DEKs of these records and all KEKs, as far as the key service has them. Messages can be shown without."""
        deks: dict[str, api.KeyAnswer] = {}
        try:
            for key_id in {version.key_id for version in versions if version.key_id}:  # of a thread, one or a few
                with contextlib.suppress(KmsRefusedError):
                    deks[key_id] = await self._provider.get_key(key_id)
            status = await self._provider.status()
        except KmsError:
            return _Keys(deks, {})
        return _Keys(deks, {kek.version: nanoseconds(kek.created_at) for kek in status.keks})


def _protection(version: StoredVersion, keys: _Keys) -> Protection:
    key = keys.deks.get(version.key_id)
    if key is None:
        return Protection(version.key_id, "", 0, 0, 0)
    made_ns = nanoseconds(key.created_at)
    kek_ns = keys.keks.get(key.kek_version, 0)
    return Protection(
        key_id=version.key_id,
        state=key.state,
        dek_since_ns=max(made_ns, version.message.ts),  # the key is newer than the record if a rotation re-encrypted it
        kek_version=key.kek_version,
        kek_since_ns=max(made_ns, kek_ns) if kek_ns else 0,
    )


def nanoseconds(rfc3339: str) -> int:
    """The time as Unix nanoseconds, rounded down to the second; 0 if it is malformed."""
    try:
        return int(datetime.fromisoformat(rfc3339).timestamp()) * 1_000_000_000
    except ValueError:
        return 0


def format_time(ns: int) -> str:
    """The time in UTC, to the second. An empty text for 0, which means unknown."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S") if ns else ""
