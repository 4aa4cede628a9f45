"""What the viewer shows, read from the store and the key service.

Owns: the pages of threads and messages, and which keys protect a record. Invariants: the cost of a page depends on what
it shows and not on the size of its thread: at most `PAGE_THREADS`, `PAGE_MESSAGES` or `VERSIONS_MAX` records are
decrypted; the key of a record is read from the record itself and not from the thread's metadata. It must never write.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from minikms import api
from progressdb_server.kms.provider import Provider, ProviderError
from progressdb_server.store import keyspace, record
from progressdb_server.store.conversations import Conversations
from progressdb_server.store.model import Message, MessageNotFoundError, Thread

PAGE_THREADS: Final = 50
PAGE_MESSAGES: Final = 50
VERSIONS_MAX: Final = 200
KEY_PAGES_MAX: Final = 4
"""Pages of a thread's keys that are read. A record under a later key is shown without the details of its key."""


class ThreadPage(NamedTuple):
    threads: list[Thread]
    older: str
    """Cursor of the next page; empty on the last."""


class Protection(NamedTuple):
    """The keys of one record. Times are Unix nanoseconds, 0 if the key service does not give one."""

    key_id: str
    state: str
    dek_since_ns: int
    kek_version: int
    kek_since_ns: int


class Shown(NamedTuple):
    """A message with the number of its versions and the protection of the latest."""

    message: Message
    versions: int
    protection: Protection


class MessagePage(NamedTuple):
    messages: list[Shown]
    older: bool
    newer: bool


class _Keys(NamedTuple):
    deks: dict[str, api.KeyAnswer]
    keks: dict[int, int]
    """KEK version → its creation time in Unix nanoseconds."""


class Browser:
    def __init__(self, store: Conversations, provider: Provider) -> None:
        self._store = store
        self._engine = store.engine
        self._provider = provider

    # --- threads --------------------------------------------------------------------------------------------------
    async def threads(self, *, author: str, id_prefix: str, cursor: str) -> ThreadPage:
        """Threads, newest first; with `id_prefix`, in the order of ids."""
        if id_prefix:
            prefix = keyspace.MAP + keyspace.part(id_prefix)
            lower, upper = prefix, prefix + b"\xff"
            if cursor:
                lower = keyspace.MAP + keyspace.part(cursor) + b"\0"
            entries = self._engine.scan(lower, upper, limit=PAGE_THREADS + 1)
        else:
            prefix = keyspace.authored(author) if author else keyspace.CREATED
            lower, upper = prefix, keyspace.after(prefix)
            if cursor:
                upper = prefix + cursor.encode()
            entries = self._engine.scan(lower, upper, limit=PAGE_THREADS + 1, reverse=True)
        page = entries[:PAGE_THREADS]
        ids = [keyspace.unpart(key[key.rindex(b":") + 1 :]) for key, _ in page]
        threads = await asyncio.gather(*(self._store.get_thread(thread) for thread in ids))
        if id_prefix and author:
            threads = [thread for thread in threads if thread.author == author]
        older = ""
        if len(entries) > PAGE_THREADS:
            older = ids[-1] if id_prefix else page[-1][0][len(prefix) :].decode()
        return ThreadPage(list(threads), older)

    # --- messages -------------------------------------------------------------------------------------------------
    async def messages(self, thread: str, *, before: str = "", after: str = "") -> MessagePage:
        """The most recent messages, or those next to a cursor. Raises MessageNotFoundError for a malformed cursor."""
        prefix = keyspace.order(thread)
        lower, upper = prefix, keyspace.after(prefix)
        if before:
            upper = prefix + _first_stamp(before)
        if after:
            lower = prefix + _first_stamp(after) + b"\0"
        entries = self._engine.scan(lower, upper, limit=PAGE_MESSAGES + 1, reverse=not after)
        more = len(entries) > PAGE_MESSAGES
        entries = entries[:PAGE_MESSAGES]
        if not after:
            entries.reverse()
        if not entries:
            return MessagePage([], older=bool(after), newer=bool(before))
        keys = await self._keys(thread)
        opened = await self._between(thread, entries[0][0], entries[-1][0])
        shown = [
            Shown(message, self._count_versions(message.id), self._protection(thread, _latest(key, value), keys))
            for message, (key, value) in zip(opened, entries, strict=True)
        ]
        return MessagePage(shown, older=bool(after) or more, newer=bool(before) or (bool(after) and more))

    async def _between(self, thread: str, first: bytes, last: bytes) -> list[Message]:
        """The messages whose entries in the order index are `first` to `last`."""
        prefix = keyspace.order(thread)
        after = self._engine.scan(prefix, first, limit=1, reverse=True)
        before = self._engine.scan(last + b"\0", keyspace.after(prefix), limit=1)
        chunks = self._store.list_messages(
            thread,
            after=_message_id(after[0][0]) if after else None,
            before=_message_id(before[0][0]) if before else None,
            include_deleted=True,
        )
        return [message async for chunk in chunks for message in chunk]

    def _count_versions(self, message: str) -> int:
        prefix = keyspace.versions(message)
        return len(self._engine.scan(prefix, keyspace.after(prefix), limit=VERSIONS_MAX))

    async def message(self, message: str) -> list[tuple[Message, Protection]]:
        """The versions of a message, oldest first. Raises MessageNotFoundError."""
        prefix = keyspace.versions(message)
        entries = self._engine.scan(prefix, keyspace.after(prefix), limit=VERSIONS_MAX)
        versions = await self._store.message_versions(message)
        if not versions:
            raise MessageNotFoundError("message not found")
        thread = versions[0].thread
        keys = await self._keys(thread)
        return [
            (version, self._protection(thread, key[len(prefix) :], keys))
            for version, (key, _) in zip(versions, entries, strict=False)  # a version may have been added meanwhile
        ]

    # --- keys -----------------------------------------------------------------------------------------------------
    async def _keys(self, thread: str) -> _Keys:
        """The keys as the key service lists them. Empty if it does not: the messages can be shown without."""
        deks: dict[str, api.KeyAnswer] = {}
        try:
            cursor: str | None = None
            for _ in range(KEY_PAGES_MAX):
                page = await self._provider.list_keys(thread_id=thread, cursor=cursor)
                deks.update((key.key_id, key) for key in page.keys)
                cursor = page.next_cursor
                if cursor is None:
                    break
            status: dict[str, Any] = await self._provider.status()
        except ProviderError:
            return _Keys(deks, {})
        return _Keys(deks, {kek["version"]: nanoseconds(kek["created_at"]) for kek in status.get("keks", ())})

    def _protection(self, thread: str, stamp: bytes, keys: _Keys) -> Protection:
        raw = self._engine.get(keyspace.messages(thread) + stamp)
        try:
            key_id = record.unpack_message(raw or b"")[0].key_id
        except record.RecordFormatError:
            return Protection("", "", 0, 0, 0)
        key = keys.deks.get(key_id)
        if key is None:
            return Protection(key_id, "", 0, 0, 0)
        made_ns = nanoseconds(key.created_at)
        kek_ns = keys.keks.get(key.kek_version, 0)
        return Protection(
            key_id=key_id,
            state=key.state,
            dek_since_ns=max(made_ns, int(stamp[:20])),  # a rotation re-encrypts records after it made the key
            kek_version=key.kek_version,
            kek_since_ns=max(made_ns, kek_ns) if kek_ns else 0,
        )


def _latest(key: bytes, value: bytes) -> bytes:
    """The stamp of the latest version, from an entry in the order index."""
    return value.rstrip(b"d") or key[-keyspace.STAMP_BYTES :]


def _first_stamp(message: str) -> bytes:
    stamp = keyspace.parse_message_id(message)
    if stamp is None:
        raise MessageNotFoundError("message not found")
    return stamp.text.encode()


def _message_id(key: bytes) -> str:
    return keyspace.message_id(keyspace.stamp_of(key))


def nanoseconds(rfc3339: str) -> int:
    """Unix nanoseconds of a time as the key service writes it; 0 if it is malformed."""
    try:
        return int(datetime.fromisoformat(rfc3339).timestamp()) * 1_000_000_000
    except ValueError:
        return 0


def shown_time(ns: int) -> str:
    """To the second, in UTC; empty for 0."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC).strftime("%Y-%m-%d %H:%M:%S") if ns else ""
