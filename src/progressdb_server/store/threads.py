"""Threads: metadata, the indexes that find them, founding and deleting.

Owns: `thread:<id>:meta` and the indexes `created`, `author`, `writer` (the founder's entry) and `closed`. Invariants:
a thread's key map, metadata and index entries come into being in one batch; its last change is the later one of its
metadata and its newest record, so appending a message rewrites nothing; a deleted thread takes no further write.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import msgspec

from minikms import api
from progressdb_server.kms.provider import Open, ProviderError
from progressdb_server.store import keyspace, record
from progressdb_server.store.clock import Clock, Stamp
from progressdb_server.store.engine import Engine
from progressdb_server.store.idempotency import Ticket
from progressdb_server.store.model import (
    Idempotency,
    InvalidThreadIdError,
    NotTheAuthorError,
    RecordUnreadableError,
    Thread,
    ThreadNotFoundError,
)
from progressdb_server.store.sealer import Draft, Sealer, ThreadState, unavailable
from progressdb_server.store.writer import ConditionFailedError, NamedLocks, Write, Writer

LIST_THREADS_MAX: Final = 512
"""Of one chunk of a list."""
LIST_BYTES_MAX: Final = 4 * 1024 * 1024
SLUG_SEPARATORS: Final = re.compile(r"[^a-z0-9]+")


def slug_of(title: str, thread: str) -> str:
    return f"{SLUG_SEPARATORS.sub('-', title.lower()).strip('-') or 't'}-{thread}"


class Founding(msgspec.Struct, frozen=True):
    """A thread about to be: its metadata, and the plaintext of its record."""

    thread: Thread
    created: Stamp

    @property
    def secret(self) -> tuple[bytes, bytes]:
        thread = self.thread
        secret = record.ThreadSecret(thread.author, False, thread.title, thread.slug)
        return keyspace.meta(thread.id), record.encode_secret(secret)

    def puts(self, key_id: str, sealed: bytes) -> list[tuple[bytes, bytes | None]]:
        thread = self.thread
        header = record.ThreadHeader(key_id, thread.author, self.created.text, self.created.ns, 0)
        entry = keyspace.created(self.created, thread.id)
        return [
            (keyspace.key_map(thread.id), key_id.encode()),
            (keyspace.meta(thread.id), record.pack(header, sealed)),
            (keyspace.CREATED + entry, b""),
            (keyspace.authored(thread.author) + entry, b""),
            (keyspace.writer(thread.id, thread.author), b""),
        ]

    @property
    def expect(self) -> list[tuple[bytes, bytes | None]]:
        """Nobody else founded the thread meanwhile."""
        return [(keyspace.key_map(self.thread.id), None), (keyspace.meta(self.thread.id), None)]


class Threads:
    def __init__(self, engine: Engine, writer: Writer, sealer: Sealer, clock: Clock, locks: NamedLocks) -> None:
        self._engine = engine
        self._writer = writer
        self._sealer = sealer
        self._clock = clock
        self._locks = locks

    # --- founding -------------------------------------------------------------------------------------------------
    def plan(self, *, author: str, title: str | None, name: str = "") -> Founding:
        """`name`: the id asked for. Raises InvalidThreadIdError."""
        if name and not api.THREAD_ID_PATTERN.fullmatch(name):
            raise InvalidThreadIdError("a thread id is 1 to 128 of A-Z, a-z, 0-9, '.', '_', '-'")
        created = self._clock.next()
        thread = name or keyspace.thread_id(created)
        if title is None:
            title = f"New Thread #{self._writer.state.threads + 1}"
        meta = Thread(
            id=thread,
            title=title,
            author=author,
            slug=slug_of(title, thread),
            created_ts=created.ns,
            updated_ts=created.ns,
        )
        return Founding(meta, created)

    async def found(
        self, founding: Founding, first: Draft | None, extra: Sequence[tuple[bytes, bytes | None]], request_id: str
    ) -> None:
        """Make the thread, with the message `first` if one is given, in one write. Raises ConditionFailedError when
        somebody else made it first; the key made here is then retired."""
        thread = founding.thread.id
        key_id = await self._sealer.new_key(thread, request_id)
        secrets = [founding.secret, *(first.secrets if first else ())]
        try:
            sealed = await self._sealer.seal(thread, key_id, secrets, request_id)
        except ProviderError as error:
            await self._sealer.retire(key_id, request_id)
            raise unavailable(error) from error
        puts = [*founding.puts(key_id, sealed[0]), *extra]
        messages = 0
        if first:
            write = first.finish(key_id, sealed[1:])
            puts += write.puts
            messages = write.messages
        try:
            await self._writer.commit(Write(puts, founding.expect, threads=1, messages=messages))
        except ConditionFailedError:
            await self._sealer.retire(key_id, request_id)
            raise

    async def create(self, *, author: str, title: str, idempotency: Idempotency | None, request_id: str) -> Thread:
        if idempotency is None:
            founding = self.plan(author=author, title=title)
            await self.found(founding, None, (), request_id)
            return founding.thread
        ticket = Ticket(idempotency, ["thread", author, title])
        async with self._locks.hold(ticket.key):
            made = ticket.recall(self._engine, self._clock.now_ns())
            if made is not None:
                await self._writer.barrier()
                return await self.get(made)
            founding = self.plan(author=author, title=title)
            await self.found(founding, None, (ticket.put(founding.thread.id, founding.created.ns),), request_id)
            return founding.thread

    # --- reading --------------------------------------------------------------------------------------------------
    def _load(self, thread: str) -> tuple[record.ThreadHeader, bytes] | None:
        raw = self._engine.get(keyspace.meta(thread))
        if raw is None:
            return None
        try:
            return record.unpack_thread(raw)
        except record.RecordFormatError as error:
            raise RecordUnreadableError(f"the metadata of thread {thread} is malformed") from error

    async def _open(self, loaded: Sequence[tuple[str, record.ThreadHeader, bytes]]) -> list[Thread]:
        plaintexts = await self._sealer.open(
            [Open(header.key_id, sealed, keyspace.meta(thread), thread) for thread, header, sealed in loaded]
        )
        threads: list[Thread] = []
        for (thread, header, _), plaintext in zip(loaded, plaintexts, strict=True):
            try:
                secret = record.open_thread(header, plaintext)
                created = Stamp.parse(header.created).ns
            except (record.RecordFormatError, ValueError) as error:
                raise RecordUnreadableError(f"the metadata of thread {thread} is malformed") from error
            threads.append(
                Thread(
                    id=thread,
                    title=secret.title,
                    author=secret.author,
                    slug=secret.slug,
                    created_ts=created,
                    updated_ts=max(header.updated_ns, self._last_touch(thread)),
                    deleted=secret.deleted,
                    deleted_ts=header.deleted_ns,
                )
            )
        return threads

    def _last_touch(self, thread: str) -> int:
        prefix = keyspace.messages(thread)
        newest = self._engine.scan(prefix, keyspace.after(prefix), limit=1, reverse=True)
        return keyspace.stamp_of(newest[0][0]).ns if newest else 0

    async def get(self, thread: str) -> Thread:
        loaded = self._load(thread)
        if loaded is None:
            raise ThreadNotFoundError("thread not found")
        return (await self._open([(thread, *loaded)]))[0]

    async def list(
        self, *, author: str | None, title: str | None, slug: str | None, include_deleted: bool
    ) -> AsyncIterator[list[Thread]]:
        prefix = keyspace.CREATED if author is None else keyspace.authored(author)
        lower, upper = prefix, keyspace.after(prefix)
        needle = title.casefold() if title else ""
        while entries := self._engine.scan(lower, upper, limit=LIST_THREADS_MAX):
            loaded: list[tuple[str, record.ThreadHeader, bytes]] = []
            size = 0
            for key, _ in entries:
                lower = key + b"\0"
                thread = keyspace.unpart(key[key.rindex(b":") + 1 :])
                found = self._load(thread)
                if found is None:
                    raise RecordUnreadableError(f"the metadata of thread {thread} is missing")
                header, sealed = found
                if header.deleted_ns and not include_deleted:
                    continue
                loaded.append((thread, header, sealed))
                size += len(sealed)
                if size > LIST_BYTES_MAX:
                    break
            chunk = [
                thread
                for thread in await self._open(loaded)
                if needle in thread.title.casefold() and (not slug or thread.slug == slug)
            ]
            if chunk:
                yield chunk

    def written_by(self, thread: str, author: str) -> bool:
        return self._engine.get(keyspace.writer(thread, author)) is not None

    # --- changing -------------------------------------------------------------------------------------------------
    async def _for_change(
        self, thread: str, author: str | None
    ) -> tuple[ThreadState, bytes, record.ThreadHeader, Thread]:
        """Raises ThreadNotFoundError (also when deleted), NotTheAuthorError."""
        state = self._sealer.thread(thread)
        raw = self._engine.get(keyspace.meta(thread))
        if state is None or raw is None or state.deleted:
            raise ThreadNotFoundError("thread not found")
        header, sealed = record.unpack_thread(raw)
        (current,) = await self._open([(thread, header, sealed)])
        if author is not None and author != current.author:
            raise NotTheAuthorError("author does not match")
        return state, raw, header, current

    async def update(self, thread: str, *, author: str | None, title: str, request_id: str) -> Thread:
        async with self._locks.hold(keyspace.meta(thread)):
            while True:
                state, raw, header, current = await self._for_change(thread, author)
                changed = msgspec.structs.replace(current, title=title, slug=slug_of(title, thread))

                def draft(
                    stamp: Stamp, raw: bytes = raw, header: record.ThreadHeader = header, changed: Thread = changed
                ) -> Draft:
                    changed.updated_ts = stamp.ns
                    return self._rewrite(raw, header, changed)

                try:
                    await self._sealer.append(state, draft, request_id)
                    return changed
                except ConditionFailedError:  # a key rotation rewrote the record meanwhile
                    continue

    async def delete(self, thread: str, *, author: str | None, event: Any, request_id: str) -> None:
        """`event(stamp)` is the draft of the message that says so."""
        async with self._locks.hold(keyspace.meta(thread)):
            while True:
                state, raw, header, current = await self._for_change(thread, author)

                def draft(
                    stamp: Stamp, raw: bytes = raw, header: record.ThreadHeader = header, current: Thread = current
                ) -> Draft:
                    deleted = msgspec.structs.replace(current, deleted=True, deleted_ts=stamp.ns, updated_ts=stamp.ns)
                    meta = self._rewrite(raw, header, deleted)
                    message = event(stamp)

                    def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
                        one, two = meta.finish(key_id, sealed[:1]), message.finish(key_id, sealed[1:])
                        closed = (keyspace.closed(thread), b"")
                        return Write([*one.puts, *two.puts, closed], one.expect, messages=two.messages)

                    return Draft([*meta.secrets, *message.secrets], finish)

                try:
                    await self._sealer.append(state, draft, request_id)
                    self._sealer.forget(thread)
                    return
                except ConditionFailedError:  # a key rotation rewrote the record meanwhile
                    continue

    @staticmethod
    def _rewrite(raw: bytes, old: record.ThreadHeader, thread: Thread) -> Draft:
        key = keyspace.meta(thread.id)
        secret = record.ThreadSecret(thread.author, thread.deleted, thread.title, thread.slug)

        def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
            header = record.ThreadHeader(key_id, old.author, old.created, thread.updated_ts, thread.deleted_ts)
            return Write(((key, record.pack(header, sealed[0])),), ((key, raw),))

        return Draft(((key, record.encode_secret(secret)),), finish)
