"""Threads: creating, finding, renaming and deleting them. `conversations.members` has their members.

Owns: what a thread's metadata becomes, and the lists of threads. Invariants: a thread's key map, metadata and index
entries are written in one batch; its last change is the later of its metadata and its newest record, so appending a
message rewrites nothing; a deleted thread takes no further write; a thread whose record does not open is listed with an
error code and hides no other.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import msgspec

from minikms import api
from minikms.api.errors import KmsRefusedError
from minikms.client import DecryptItem
from progressdb_server.conversations import membership
from progressdb_server.store import drafts, keyspace, record
from progressdb_server.store.conditions import LateStampError
from progressdb_server.store.drafts import Draft
from progressdb_server.store.engine import Commits, Reads
from progressdb_server.store.idempotency import Retries, Ticket
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import (
    NOT_OPENED,
    RECORD_MALFORMED,
    RECORD_MISSING,
    ConditionFailedError,
    Idempotency,
    InvalidThreadIdError,
    NotTheAuthorError,
    NotWrittenError,
    Page,
    RecordUnreadableError,
    StoreUnavailableError,
    Thread,
    ThreadNotFoundError,
    TooManyMembersError,
)
from progressdb_server.store.sealer import Sealer, ThreadState

LIST_THREADS_MAX: Final = 16
"""The threads in one chunk of a list, each with a key of its own. It takes the key service and the event loop about 2
ms each, and one chunk is on its way at a time, so that other requests come in between.
"""
MAKE_TRIES_MAX: Final = 8
"""The tries for a new thread, each with a key of its own."""
CHANGE_TRIES_MAX: Final = 64
"""The tries for a change of a message or thread that other servers change too. One server makes one at a time, so that
of three servers one fails so often once in 10^11 changes, unless the others are nearer to the database.
"""
PAGE_LOOKED_MAX: Final = 16_384
"""Threads of which one page of a search is chosen; so it may have fewer than its `limit`, and older ones follow."""
SLUG_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")


def _unpacked(thread: str, raw: bytes) -> tuple[record.ThreadHeader, bytes]:
    try:
        return record.unpack_thread(raw)
    except record.RecordFormatError as error:
        raise RecordUnreadableError(f"the metadata of thread {thread} is malformed") from error


def slug_of(title: str, thread: str) -> str:
    return f"{SLUG_SEPARATORS.sub('-', title.lower()).strip('-') or 't'}-{thread}"


def _to_open(thread: str, header: record.ThreadHeader, sealed: bytes) -> DecryptItem:
    return DecryptItem(key_id=header.key_id, ciphertext=sealed, aad=keyspace.meta(thread), thread_id=thread)


def _entries(thread: str, members: Sequence[str]) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((keyspace.writer(thread, member), keyspace.MEMBER) for member in members)


class Listed(NamedTuple):
    """A thread's metadata that was read for a list and not opened yet. `header` is None if `error` says why."""

    thread: str
    header: record.ThreadHeader | None
    sealed: bytes
    error: str = ""

    @property
    def created_ns(self) -> int:
        """0 if the header names no time."""
        try:
            return 0 if self.header is None else Stamp.parse(self.header.created).time_ns
        except ValueError:
            return 0

    def unopened(self, error: str) -> Thread:
        """What can be listed of a thread whose record does not open."""
        if self.header is None:
            return Thread(id=self.thread, author="", error=error)
        return Thread(
            id=self.thread,
            author=self.header.author,
            created_ts=self.created_ns,
            updated_ts=self.header.updated_ns,
            deleted=bool(self.header.deleted_ns),
            deleted_ts=self.header.deleted_ns,
            error=error,
        )


class _Wanted(NamedTuple):
    """Which threads a list has: by a part of the title, casefolded, and by the slug."""

    title: str = ""
    slug: str = ""
    deleted: bool = True

    def has(self, thread: Thread) -> bool:
        return self.title in thread.title.casefold() and self.slug in ("", thread.slug)


_EVERY: Final = _Wanted()
_DOTS: Final = (".", "..")
"""No ids: clients and proxies resolve them as parts of a path."""


def _change_draft(
    changed: Thread, raw: bytes, header: record.ThreadHeader, stamp: Stamp, key_id: str, *, deleted_by: str | None
) -> Draft:
    """The draft of `changed` at `stamp`. `deleted_by`: who deletes the thread, None if nobody does."""
    changed.updated_ts = stamp.time_ns
    if deleted_by is None:
        return drafts.changed_thread(changed, raw, header, key_id)
    changed.deleted_ts = stamp.time_ns
    event = drafts.deletion_event(changed.id, deleted_by, stamp, key_id)
    return drafts.joined(drafts.changed_thread(changed, raw, header, key_id), event)


def _new(thread: str, author: str, title: str, created_ns: int) -> Thread:
    slug = slug_of(title, thread)
    return Thread(id=thread, title=title, author=author, slug=slug, created_ts=created_ns, updated_ts=created_ns)


class NamedLocks:
    """Locks by name, for read-modify-write operations. The tasks that ask for one name run one after another, in the
    order in which they asked. A lock exists only while a task holds it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[bytes, asyncio.Lock] = {}
        self._users: dict[bytes, int] = {}

    @asynccontextmanager
    async def hold(self, name: bytes) -> AsyncIterator[None]:
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._users[name] = self._users.get(name, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._locks[name]


@dataclass(eq=False)
class Threads:
    reads: Reads
    writer: Commits
    clock: Clock
    sealer: Sealer
    locks: NamedLocks
    retries: Retries

    # --- creating -------------------------------------------------------------------------------------------------
    def _new_thread(self, author: str, title: str | None, name: str) -> tuple[Thread, Stamp]:
        """A thread that is not stored yet; `name` is the id asked for. Raises InvalidThreadIdError."""
        if name and (name in _DOTS or not api.THREAD_ID_PATTERN.fullmatch(name)):
            raise InvalidThreadIdError
        created = self.clock.next()
        thread = name or keyspace.thread_id(created)
        if title is None:
            title = f"New Thread #{self.writer.state.threads + 1}"
        return _new(thread, author, title, created.time_ns), created

    async def create(
        self,
        *,
        author: str,
        title: str,
        members: Sequence[str] = (),
        idempotency: Idempotency | None = None,
        request_id: str | None = None,
    ) -> Thread:
        others = sorted(set(members) - {author})
        if len(others) >= membership.MEMBERS_COUNT_MAX:
            raise TooManyMembersError
        ticket = Ticket(idempotency, ["thread", author, title, *([others] if others else [])]) if idempotency else None

        def drafted(thread: Thread, created: Stamp, key_id: str) -> Draft:
            extra = (*_entries(thread.id, others), *((ticket.put(thread.id, created.time_ns),) if ticket else ()))
            return drafts.new_thread(thread, created, key_id, extra, (ticket.condition,) if ticket else ())

        async def make() -> Thread:
            return await self.make_thread(drafted, request_id, author=author, title=title)

        if ticket is None:
            return await make()
        async with self.locks.hold(ticket.key):
            thread_id, new = await self.retries.once(ticket, make)
            if new is not None:
                return new
            created_ts = (await self.get(thread_id)).created_ts
            return _new(thread_id, author, title, created_ts)

    async def make_thread(
        self,
        drafted: Callable[[Thread, Stamp, str], Draft],
        request_id: str | None,
        *,
        author: str,
        title: str | None,
        name: str = "",
    ) -> Thread:
        """Makes the key of a new thread, then the thread that `drafted` returns for thread, stamp and key id. It is
        drafted again if another server has used one of its stamps. `name`: the id of the thread, empty for a new one.
        Raises ConditionFailedError if a thread of this name exists, or for another condition; StoreUnavailableError
        after MAKE_TRIES_MAX drafts."""
        for _ in range(MAKE_TRIES_MAX):
            thread, created = self._new_thread(author, title, name)
            try:
                await self.sealer.make_thread(thread.id, partial(drafted, thread, created), request_id)
                return thread
            except LateStampError as error:
                if error.last is not None:  # the thread exists
                    self.clock.recover(error.last)
                    if name:
                        raise
            except ConditionFailedError as error:
                if name or error.key not in (keyspace.key_map(thread.id), keyspace.meta(thread.id)):
                    raise
        raise StoreUnavailableError("other servers are making threads at the same time")

    # --- reading --------------------------------------------------------------------------------------------------
    async def _load_thread(self, thread: str) -> tuple[record.ThreadHeader, bytes] | None:
        raw = await self.reads.get(keyspace.meta(thread))
        return None if raw is None else _unpacked(thread, raw)

    async def _open_thread(self, name: str, header: record.ThreadHeader, sealed: bytes) -> Thread:
        (plaintext,) = await self.sealer.open([_to_open(name, header, sealed)])
        try:
            thread = record.open_thread(header, name, plaintext)
        except record.RecordFormatError as error:
            raise RecordUnreadableError(f"the metadata of thread {name} is malformed") from error
        await self._touch([thread])
        return thread

    async def _load_listed(self, threads: Sequence[str]) -> list[Listed]:
        """Loads the threads in order."""
        rows = await self.reads.values([keyspace.meta(thread) for thread in threads])
        listed: list[Listed] = []
        for thread in threads:
            raw = rows.get(keyspace.meta(thread))
            if raw is None:
                listed.append(Listed(thread, None, b"", RECORD_MISSING))
                continue
            try:
                listed.append(Listed(thread, *_unpacked(thread, raw)))
            except RecordUnreadableError:
                listed.append(Listed(thread, None, b"", RECORD_MALFORMED))
        return listed

    async def _open_listed(self, listed: Sequence[Listed], wanted: _Wanted = _EVERY) -> list[Thread]:
        """Opens the wanted threads in order; one that does not open has `error`. Raises StoreUnavailableError."""
        items = [_to_open(one.thread, one.header, one.sealed) for one in listed if one.header is not None]
        answers = iter(await self.sealer.open_each(items))
        threads: list[Thread] = []
        for one in listed:
            if one.header is None:
                threads.append(one.unopened(one.error))
                continue
            answer = next(answers)
            if isinstance(answer, KmsRefusedError):
                threads.append(one.unopened(answer.code))
                continue
            try:
                threads.append(record.open_thread(one.header, one.thread, answer))
            except record.RecordFormatError:
                threads.append(one.unopened(RECORD_MALFORMED))
        threads = [thread for thread in threads if wanted.has(thread)]
        await self._touch([thread for thread in threads if not thread.error])
        return threads

    async def listed(self, thread_ids: Sequence[str], *, opened: bool = True) -> list[Thread]:
        """These threads, in order. A thread whose record does not open has `error`. Without `opened` the key service is
        not asked: every thread has `error`, and no title."""
        listed = await self._load_listed(thread_ids)
        return await self._open_listed(listed) if opened else [one.unopened(one.error or NOT_OPENED) for one in listed]

    async def _touch(self, threads: Sequence[Thread]) -> None:
        """The last change of a thread is the later of its metadata's and its newest record's."""
        newest = await self.reads.newest([keyspace.messages(thread.id) for thread in threads])
        for thread, key in zip(threads, newest, strict=True):
            if key is not None:
                thread.updated_ts = max(thread.updated_ts, keyspace.stamp_of(key).time_ns)

    async def get(self, thread_id: str) -> Thread:
        """The thread, also when it is deleted. Raises ThreadNotFoundError."""
        loaded = await self._load_thread(thread_id)
        if loaded is None:
            raise ThreadNotFoundError
        return await self._open_thread(thread_id, *loaded)

    def list_threads(
        self,
        *,
        author: str | None,
        title: str | None = None,
        slug: str | None = None,
        include_deleted: bool = False,
        page: Page | None = None,
    ) -> AsyncIterator[list[Thread]]:
        """The author's own threads (None: all), in order of creation: all, or a page, of which the first one has the
        newest. A thread whose record does not open has `error`; with `title` or `slug`, it is left out. Chunks may be
        empty."""
        prefix = keyspace.CREATED if author is None else keyspace.author_threads(author)
        wanted = _Wanted(title.casefold() if title else "", slug or "", include_deleted)
        return self._all(prefix, wanted) if page is None else self._newest(prefix, wanted, page)

    async def _all(self, prefix: bytes, wanted: _Wanted) -> AsyncIterator[list[Thread]]:
        lower = prefix
        while keys := await self.reads.keys(lower, keyspace.after(prefix), limit=LIST_THREADS_MAX):
            lower = keyspace.next_key(keys[-1])
            yield await self._matching(keys, wanted)

    async def _newest(self, prefix: bytes, wanted: _Wanted, page: Page) -> AsyncIterator[list[Thread]]:
        """One chunk, after empty ones."""
        upper = prefix + page.cursor.encode() if page.cursor else keyspace.after(prefix)
        batch, left = min(LIST_THREADS_MAX, page.limit), PAGE_LOOKED_MAX
        newest: list[Thread] = []
        while keys := await self.reads.keys(prefix, upper, limit=batch, reverse=True):
            matching = {thread.id: thread for thread in await self._matching(keys, wanted)}
            for upper in keys:
                thread = matching.get(keyspace.last_part(upper))
                if thread is not None:
                    newest.append(thread)
                    if len(newest) == page.limit:
                        break
            left -= len(keys)
            if len(newest) == page.limit or left <= 0:
                if await self.reads.keys(prefix, upper, limit=1, reverse=True):
                    page.following = upper[len(prefix) :].decode()
                break
            if not (wanted.title or wanted.slug):
                batch = min(batch, page.limit - len(newest))  # no record is opened that is not shown
            yield []
        yield newest[::-1]

    async def _matching(self, keys: Sequence[bytes], wanted: _Wanted) -> list[Thread]:
        """The wanted threads of these index entries, in order."""
        listed = await self._load_listed([keyspace.last_part(key) for key in keys])
        if not wanted.deleted:
            listed = [one for one in listed if one.header is None or not one.header.deleted_ns]
        return await self._open_listed(listed, wanted)

    async def is_deleted(self, thread_id: str) -> bool:
        """Whether the thread is deleted; false for an unknown thread. Opens no record."""
        return await self.reads.get(keyspace.closed_key(thread_id)) is not None

    async def page(self, *, author: str, id_prefix: str, cursor: str, limit: int) -> tuple[list[str], str]:
        """Ids of threads, newest first (by the beginning of an id: in the order of ids), and the cursor of the next
        page, empty on the last."""
        if id_prefix:
            prefix = keyspace.MAP + keyspace.part(id_prefix)
            lower, upper = prefix, prefix + keyspace.END
            if cursor:
                lower = keyspace.next_key(keyspace.key_map(cursor))
            keys = await self.reads.keys(lower, upper, limit=limit + 1)
        else:
            prefix = keyspace.author_threads(author) if author else keyspace.CREATED
            lower, upper = prefix, keyspace.after(prefix)
            if cursor:
                upper = prefix + cursor.encode()
            keys = await self.reads.keys(lower, upper, limit=limit + 1, reverse=True)
        ids = [keyspace.last_part(key) for key in keys[:limit]]
        if len(keys) <= limit:
            return ids, ""
        return ids, ids[-1] if id_prefix else keys[limit - 1][len(prefix) :].decode()

    # --- changing -------------------------------------------------------------------------------------------------
    async def _for_change(
        self, thread: str, author: str | None
    ) -> tuple[ThreadState, bytes, record.ThreadHeader, Thread]:
        """What a change is based on. Raises ThreadNotFoundError (also when deleted), NotTheAuthorError."""
        state = await self.sealer.thread(thread)
        raw = await self.reads.get(keyspace.meta(thread))
        if state is None or raw is None or state.deleted:
            raise ThreadNotFoundError
        header, sealed = _unpacked(thread, raw)
        current = await self._open_thread(thread, header, sealed)
        if author is not None and author != current.author:
            raise NotTheAuthorError
        return state, raw, header, current

    async def update(self, thread_id: str, *, author: str | None, title: str, request_id: str | None = None) -> Thread:
        slug = slug_of(title, thread_id)
        return await self._change_thread(thread_id, author, {"title": title, "slug": slug}, request_id)

    async def delete(self, thread_id: str, *, author: str | None, by: str, request_id: str | None = None) -> None:
        await self._change_thread(thread_id, author, {"deleted": True}, request_id, deleted_by=by)

    async def _change_thread(
        self,
        thread_id: str,
        author: str | None,
        fields: dict[str, object],
        request_id: str | None,
        *,
        deleted_by: str | None = None,
    ) -> Thread:
        async with self.locks.hold(keyspace.meta(thread_id)):
            for _ in range(CHANGE_TRIES_MAX):
                state, raw, header, current = await self._for_change(thread_id, author)
                changed = msgspec.structs.replace(current, **fields)

                try:
                    await self.sealer.append(
                        state, partial(_change_draft, changed, raw, header, deleted_by=deleted_by), request_id
                    )
                    if changed.deleted:
                        self.sealer.forget(thread_id)
                    return changed
                except ConditionFailedError:  # a key rotation or another server rewrote the record meanwhile
                    continue
        raise NotWrittenError("other servers are changing the thread at the same time")
