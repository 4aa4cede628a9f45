"""The purge of a deleted thread: which threads are deleted, the proof that one is, and the removal of what is stored.

Owns: which entries belong to a thread; the entry `keyspace.CLOCK`. Invariants:
- Whether and when a thread was deleted is what its sealed records say: its metadata, and its newest record. That is the
  event of the deletion; its storage key, with the time in it, is authenticated. Headers and indexes prove nothing.
- A chunk of records goes with the index entries that lead to them, in one write; the metadata goes last, with the map
  and everything that names the thread. So a purge that was interrupted finds what is left.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from typing import Final

import msgspec

from minikms.api.decoding import UNDECODABLE
from progressdb_server.conversations.reading import Reading
from progressdb_server.conversations.threads import Threads
from progressdb_server.store import keyspace, record
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import Commits, Reads, in_order
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import MessageNotFoundError, OpaqueWrite, RecordUnreadableError, shown
from progressdb_server.store.sealer import Sealer

LOOKED_UP: Final = 512
NOT_DELETED: Final = "the thread's records do not say that it was deleted"


class SeenClock(msgspec.Struct):
    """When the clock was last believed, and the last look at one that is ahead of that (0: it is not), in Unix
    nanoseconds; how long the server has run since the clock went ahead.
    """

    believed_ns: int
    ahead_ns: int
    waited_ns: int = 0


class Purging:
    def __init__(self, reads: Reads, writer: Commits, sealer: Sealer, threads: Threads, reading: Reading) -> None:
        self._reads = reads
        self._writer = writer
        self._sealer = sealer
        self._threads = threads
        self._reading = reading

    async def clock(self) -> SeenClock | None:
        """What the last server stored; a damaged entry counts as a clock that was never believed. Raises
        StoreUnavailableError."""
        raw = await self._reads.get(keyspace.CLOCK)
        try:
            return None if raw is None else msgspec.json.decode(raw, type=SeenClock)
        except UNDECODABLE:
            return SeenClock(0, 0)

    async def keep_clock(self, seen: SeenClock) -> None:
        """Durable when it returns. Raises StoreUnavailableError."""
        await self._writer.commit(Write(((keyspace.CLOCK, msgspec.json.encode(seen)),)))

    async def deleted(self, before_ns: int) -> AsyncIterator[list[str]]:
        """Threads whose metadata says that they were deleted before then, page by page: some may be empty."""
        async for page in in_order(self._reads, keyspace.CREATED):
            for start in range(0, len(page), LOOKED_UP):
                threads = [keyspace.last_part(key) for key in page[start : start + LOOKED_UP]]
                closed = await self._reads.values([keyspace.closed_key(thread) for thread in threads])
                named = [thread for thread in threads if keyspace.closed_key(thread) in closed]
                listed = await self._threads.listed(named, opened=False)
                yield [thread.id for thread in listed if 0 < thread.deleted_ts < before_ns]

    async def deleted_ns(self, thread_id: str) -> int:
        """When the thread was deleted. Raises RecordUnreadableError, also for one that is not, KeyServiceRefusedError,
        StoreUnavailableError, ThreadNotFoundError."""
        thread = await self._threads.get(thread_id)
        newest = await self.newest(thread_id)
        if not (thread.deleted and newest):
            raise RecordUnreadableError(NOT_DELETED)
        try:
            event = await self._reading.message(keyspace.message_id(keyspace.stamp_of(newest)), thread_id=thread_id)
        except MessageNotFoundError:  # it is a later version of a message
            raise RecordUnreadableError(NOT_DELETED) from None
        if not (event.deleted and isinstance(event.value, dict) and event.value.get("_event") == "thread_deleted"):
            raise RecordUnreadableError(NOT_DELETED)
        return event.ts

    def is_message(self, key: bytes) -> bool:
        """Whether it is the storage key of a message, not of the metadata."""
        return keyspace.is_version(key)

    async def members(self, thread_id: str) -> AsyncIterator[OpaqueWrite]:
        """The removal of the thread's members, in steps."""
        async for keys in in_order(self._reads, keyspace.writers(thread_id)):
            yield Write([(key, None) for key in keys])

    async def newest(self, thread_id: str) -> bytes:
        """The storage key of the thread's newest record, which goes last; empty if there is none."""
        (newest,) = await self._reads.newest([keyspace.messages(thread_id)])
        return newest or b""

    def records(self, thread_id: str, entries: Collection[tuple[bytes, bytes]]) -> OpaqueWrite:
        """The removal of messages, given as storage keys with their bytes, and of the entries that lead to them. Raises
        RecordUnreadableError."""
        removals = {key: None for one in entries for key in _entries(thread_id, *one)}
        return Write(list(removals.items()), (_closed(thread_id),), messages=-len(entries))

    async def thread(self, thread_id: str) -> OpaqueWrite:
        """The removal of the rest: the newest record, the metadata, and what names the thread. Raises
        RecordUnreadableError, StoreUnavailableError."""
        last = await self.newest(thread_id)
        keys = [keyspace.meta(thread_id), *([last] if last else [])]
        values = await self._reads.values(keys)
        try:
            header, _ = record.unpack_thread(values.get(keys[0], b""))
            entry = keyspace.creation(Stamp.parse(header.created), thread_id)
        except (record.RecordFormatError, ValueError):
            raise RecordUnreadableError(f"the metadata of thread {thread_id} is malformed") from None
        removals = [keys[0], keyspace.closed_key(thread_id), keyspace.key_map(thread_id), keyspace.room(thread_id)]
        removals += [keyspace.CREATED + entry, keyspace.author_threads(header.author) + entry]
        if last:
            removals += _entries(thread_id, last, values.get(last, b""))
        expect = (*values.items(), _closed(thread_id))
        return Write([(key, None) for key in removals], expect, threads=-1, messages=1 - len(values))

    def forget(self, thread_id: str) -> None:
        self._sealer.forget(thread_id)
        self._reading.validators.forget()


def _closed(thread_id: str) -> tuple[bytes, bytes]:
    """The condition of each write: the thread is deleted."""
    return keyspace.closed_key(thread_id), b""


def _entries(thread_id: str, key: bytes, raw: bytes) -> tuple[bytes, bytes, bytes]:
    """The keys of a record's version, from `keyspace.version_keys`. Raises RecordUnreadableError."""
    own = key[-keyspace.STAMP_BYTES :]
    try:
        first = record.unpack_message(raw)[0].first.encode() or own
        message = keyspace.message_id_of(first.decode())
    except (record.RecordFormatError, ValueError):
        raise RecordUnreadableError(f"the record {shown(key)} is malformed") from None
    return keyspace.version_keys(keyspace.part(thread_id), message, first, own)
