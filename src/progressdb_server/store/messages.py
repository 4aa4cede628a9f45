"""Reading messages: where the latest version is, opening in batches, lists.

Owns: how an entry of `index:order` is read, and the streaming of lists. Invariants:
- A list is in order of creation and shows each message once; what is created while it is read is not of it.
- A list of any length takes bounded memory: it goes by batches of LIST_MESSAGES_MAX and LIST_BYTES_MAX, the next of
  which is read and sent to the key service while the one before is answered.
- A record is shown only as what its sealed part says it is, and only where the index led to it rightly.

Messages: appending, versions, reactions, tombstones. Reading them is `store.reading`.

Owns: the records `thread:<id>:msg:<stamp>` and the indexes `version:msg` and `order`. Invariants:
- Every version is a record of its own at its own stamp and is never changed afterwards; a message's id is the stamp
  of its first version.
- `index:order` has one entry per message, at the stamp of its first version, which tells the latest one; it is
  changed in the batch of the version it points to. So a list costs as much as it has messages, however often they were
  edited.
- Changes of one message run one after another; each builds on the version before it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from typing import Any, Final, NamedTuple

from progressdb_server.kms.provider import Open
from progressdb_server.store import keyspace, record
from progressdb_server.store.clock import Clock, Stamp
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Engine
from progressdb_server.store.idempotency import Ticket
from progressdb_server.store.model import (
    Idempotency,
    Message,
    MessageNotFoundError,
    NewMessage,
    NotTheAuthorError,
    RecordUnreadableError,
)
from progressdb_server.store.sealer import Draft, Sealer, ThreadState
from progressdb_server.store.threads import Threads
from progressdb_server.store.writer import ConditionFailedError, NamedLocks, Write, Writer

LIST_MESSAGES_MAX: Final = 256
"""Of one batch of a list or of a message's versions."""
LIST_BYTES_MAX: Final = 2 * 1024 * 1024
"""Of sealed parts in one batch, passed by one record at most."""
LIST_BATCHES_AHEAD: Final = 1
DELETED: Final = b"d"


class Place(NamedTuple):
    """An entry of the order index; stamps as in keys. Value on disk: the latest version's stamp, empty when it is the
    first one; `d` follows when that is a tombstone."""

    first: bytes
    latest: bytes
    deleted: bool


class Loaded(NamedTuple):
    """A record that was read, not yet opened. `first`: stamp of the message it must belong to."""

    sealed: Open
    header: record.MessageHeader
    first: str


class MessageReader:
    def __init__(self, engine: Engine, sealer: Sealer) -> None:
        self._engine = engine
        self._sealer = sealer

    def locate(self, message: str, thread: str | None) -> tuple[str, Place]:
        """The message's thread and its latest version. Raises MessageNotFoundError."""
        stamp = keyspace.parse_message_id(message)
        if stamp is not None:
            first = stamp.text.encode()
            found = self._engine.get(keyspace.versions(message) + first)
            if found is not None and (thread is None or keyspace.part(thread) == found):
                owner = keyspace.unpart(found)
                key = keyspace.order(owner) + first
                value = self._engine.get(key)
                if value is None:
                    raise RecordUnreadableError(f"the order entry of message {message} is missing")
                return owner, _place(key, value)
        raise MessageNotFoundError("message not found")

    async def get(self, message: str, thread: str | None) -> Message:
        return await self.at(*self.locate(message, thread))

    async def at(self, thread: str, place: Place) -> Message:
        """The version that `place` leads to."""
        (message,) = await self._open([self._load(keyspace.messages(thread) + place.latest, thread, place.first)])
        return message

    async def first_version(self, message: str) -> Message:
        owner, place = self.locate(message, None)
        return await self.at(owner, Place(place.first, place.first, False))

    async def versions(self, message: str, thread: str | None) -> list[Message]:
        try:
            owner, place = self.locate(message, thread)
        except MessageNotFoundError:
            return []
        prefix, records = keyspace.versions(message), keyspace.messages(owner)
        lower, upper = prefix, keyspace.after(prefix)
        found: list[Message] = []
        while entries := self._engine.scan(lower, upper, limit=LIST_MESSAGES_MAX):
            lower = entries[-1][0] + b"\0"
            found += await self._open(
                [self._load(records + key[len(prefix) :], owner, place.first) for key, _ in entries]
            )
        return found

    # --- lists ----------------------------------------------------------------------------------------------------
    async def stream(
        self, thread: str, *, limit: int | None, before: str | None, after: str | None, include_deleted: bool
    ) -> AsyncIterator[list[Message]]:
        prefix = keyspace.order(thread)
        lower, upper = prefix, keyspace.after(prefix)
        if after is not None:
            lower = prefix + _cursor(after) + b"\0"
        if before is not None:
            upper = prefix + _cursor(before)
        newest = self._engine.scan(lower, upper, limit=1, reverse=True)
        if not newest or limit == 0:
            return
        upper = newest[0][0] + b"\0"
        if limit is not None:
            lower = await self._start_of_last(limit, lower, upper, include_deleted)
        loop = asyncio.get_running_loop()
        opening: deque[asyncio.Task[list[Message]]] = deque()
        try:
            for batch in self._batches(thread, lower, upper, include_deleted):
                opening.append(loop.create_task(self._open(batch)))
                if len(opening) > LIST_BATCHES_AHEAD:
                    yield await opening[0]
                    opening.popleft()
                else:
                    await asyncio.sleep(0)  # so that it is on its way while the next one is read
            while opening:
                yield await opening[0]
                opening.popleft()
        finally:  # the reader went away, or a batch failed
            for task in opening:
                task.cancel()
            await asyncio.gather(*opening, return_exceptions=True)

    def _batches(self, thread: str, lower: bytes, upper: bytes, include_deleted: bool) -> Iterator[list[Loaded]]:
        records = keyspace.messages(thread)
        while entries := self._engine.scan(lower, upper, limit=LIST_MESSAGES_MAX):
            batch: list[Loaded] = []
            size = 0
            for key, value in entries:
                lower = key
                place = _place(key, value)
                if place.deleted and not include_deleted:
                    continue
                batch.append(self._load(records + place.latest, thread, place.first))
                size += len(batch[-1].sealed.ciphertext)
                if size > LIST_BYTES_MAX:
                    break
            lower += b"\0"
            if batch:
                yield batch

    async def _start_of_last(self, limit: int, lower: bytes, upper: bytes, include_deleted: bool) -> bytes:
        """The key of the first of the last `limit` messages."""
        while entries := self._engine.scan(lower, upper, limit=min(limit + 64, SCAN_ENTRIES_MAX), reverse=True):
            for key, value in entries:
                upper = key
                if include_deleted or not value.endswith(DELETED):
                    limit -= 1
                    if limit == 0:
                        return key
            await asyncio.sleep(0)
        return lower

    # --- records --------------------------------------------------------------------------------------------------
    def _load(self, key: bytes, thread: str, first: bytes) -> Loaded:
        """Raises RecordUnreadableError."""
        raw = self._engine.get(key)
        if raw is None:
            raise RecordUnreadableError(f"the record {key.decode()} is missing")
        try:
            header, sealed = record.unpack_message(raw)
        except record.RecordFormatError as error:
            raise RecordUnreadableError(f"the record {key.decode()} is malformed") from error
        return Loaded(Open(header.key_id, sealed, key, thread), header, first.decode())

    async def _open(self, batch: Sequence[Loaded]) -> list[Message]:
        """Raises StoreUnavailableError, RecordUnreadableError."""
        plaintexts = await self._sealer.open([item.sealed for item in batch])
        messages: list[Message] = []
        for (sealed, header, first), plaintext in zip(batch, plaintexts, strict=True):
            try:
                secret = record.open_message(header, first, plaintext)
                messages.append(
                    Message(
                        id=f"msg-{int(first[:20])}-{first[21:]}",
                        thread=sealed.thread_id,
                        author=secret.author,
                        role=secret.role,
                        ts=int(sealed.aad[-keyspace.STAMP_BYTES : -7]),
                        body=secret.body,
                        reply_to=secret.reply_to,
                        deleted=secret.deleted,
                        reactions=secret.reactions,
                    )
                )
            except (record.RecordFormatError, ValueError) as error:
                raise RecordUnreadableError(f"the record {sealed.aad.decode()} is not what belongs there") from error
        return messages


def _place(key: bytes, value: bytes) -> Place:
    """Raises RecordUnreadableError."""
    first = key[-keyspace.STAMP_BYTES :]
    if not value:
        return Place(first, first, False)
    deleted = value.endswith(DELETED)
    latest = value[:-1] if deleted else value
    if len(latest) not in (0, keyspace.STAMP_BYTES):
        raise RecordUnreadableError(f"the index entry {key.decode()} is malformed")
    return Place(first, latest or first, deleted)


def _cursor(message: str) -> bytes:
    first = keyspace.parse_message_id(message)
    if first is None:
        raise MessageNotFoundError("message not found")
    return first.text.encode()


class Messages:
    def __init__(
        self,
        engine: Engine,
        writer: Writer,
        sealer: Sealer,
        clock: Clock,
        *,
        locks: NamedLocks,
        threads: Threads,
        reader: MessageReader,
    ) -> None:
        self._engine = engine
        self._writer = writer
        self._sealer = sealer
        self._clock = clock
        self._locks = locks
        self._threads = threads
        self._reader = reader

    # --- creating -------------------------------------------------------------------------------------------------
    def create(
        self, new: NewMessage, *, idempotency: Idempotency | None, request_id: str
    ) -> Coroutine[Any, Any, Message]:
        if idempotency is None:
            return self._create(new, None, request_id)
        return self._create_once(new, idempotency, request_id)

    async def _create_once(self, new: NewMessage, idempotency: Idempotency, request_id: str) -> Message:
        ticket = Ticket(idempotency, ["message", new])
        async with self._locks.hold(ticket.key):
            made = ticket.recall(self._engine, self._clock.now_ns())
            if made is not None:
                await self._writer.barrier()  # what is answered must be durable
                return await self._reader.first_version(made)
            return await self._create(new, ticket, request_id)

    def _create(self, new: NewMessage, ticket: Ticket | None, request_id: str) -> Coroutine[Any, Any, Message]:
        if not new.thread:
            return self._found(new, ticket, request_id)
        state = self._sealer.thread(new.thread)
        if state is None:
            return self._found_or_append(new, ticket, request_id)
        return self._append(state, new, ticket, request_id)

    async def _found_or_append(self, new: NewMessage, ticket: Ticket | None, request_id: str) -> Message:
        state = None
        while state is None:
            # Founders of one thread stand in line, so that a burst of first messages makes one key.
            async with self._locks.hold(keyspace.meta(new.thread)):
                state = self._sealer.thread(new.thread)
                if state is None:
                    try:
                        return await self._found(new, ticket, request_id)
                    except ConditionFailedError:
                        state = self._sealer.thread(new.thread)
        return await self._append(state, new, ticket, request_id)

    async def _found(self, new: NewMessage, ticket: Ticket | None, request_id: str) -> Message:
        founding = self._threads.plan(author=new.author, title=None, name=new.thread)
        thread = founding.thread.id
        stamp = self._clock.next()
        message = _first_version(new, thread, stamp)
        extra = [ticket.put(message.id, stamp.ns)] if ticket else []
        await self._threads.found(founding, _draft(message, stamp, stamp), extra, request_id)
        return message

    async def _append(self, state: ThreadState, new: NewMessage, ticket: Ticket | None, request_id: str) -> Message:
        made: list[Message] = []

        def draft(stamp: Stamp) -> Draft:
            message = _first_version(new, state.thread, stamp)
            made[:] = (message,)
            if ticket is None and new.author in state.writers:
                return _draft(message, stamp, stamp)
            extra: list[tuple[bytes, bytes | None]] = [ticket.put(message.id, stamp.ns)] if ticket else []
            key = keyspace.writer(state.thread, new.author)
            if self._engine.get(key) is None:
                extra.append((key, b""))
            return _draft(message, stamp, stamp, extra)

        await self._sealer.append(state, draft, request_id)
        if new.author not in state.writers:
            state.remember_writer(new.author)
        return made[0]

    # --- changing -------------------------------------------------------------------------------------------------
    async def _change(
        self, message: str, thread: str | None, author: str | None, change: Any, request_id: str
    ) -> Message | None:
        """`change(current)` gives the fields to replace, None for no change (then None is returned).

        Raises MessageNotFoundError (also for a deleted one, unless `change` says otherwise), NotTheAuthorError.
        """
        async with self._locks.hold(message.encode()):
            owner, place = self._reader.locate(message, thread)
            state = self._sealer.thread(owner)
            if state is None:
                raise RecordUnreadableError(f"thread {owner} has no key")
            first = Stamp.parse(place.first.decode())
            current = await self._reader.at(owner, place)
            if author is not None and author != current.author:
                raise NotTheAuthorError("author does not match")
            fields = change(current)
            if fields is None:
                return None
            made: list[Message] = []

            def draft(stamp: Stamp) -> Draft:
                made[:] = (_next_version(current, stamp, fields),)
                return _draft(made[0], first, stamp)

            await self._sealer.append(state, draft, request_id)
            return made[0]

    async def update(
        self,
        message: str,
        *,
        author: str | None,
        body: Any,
        role: str | None,
        reply_to: str | None,
        thread: str | None,
        request_id: str,
    ) -> Message:
        def change(current: Message) -> dict[str, Any]:
            _refuse_deleted(current)
            fields: dict[str, Any] = {"body": body}
            if role is not None:
                fields["role"] = role
            if reply_to is not None:
                fields["reply_to"] = reply_to
            return fields

        changed = await self._change(message, thread, author, change, request_id)
        if changed is None:
            raise MessageNotFoundError("message not found")
        return changed

    async def delete(self, message: str, *, author: str | None, thread: str | None, request_id: str) -> None:
        """Deleting a deleted message again changes nothing."""

        def change(current: Message) -> dict[str, Any] | None:
            return None if current.deleted else {"deleted": True}

        await self._change(message, thread, author, change, request_id)

    async def react(self, message: str, identity: str, reaction: str, *, request_id: str) -> Message:
        def change(current: Message) -> dict[str, Any]:
            _refuse_deleted(current)
            return {"reactions": {**current.reactions, identity: reaction}}

        changed = await self._change(message, None, None, change, request_id)
        if changed is None:
            raise MessageNotFoundError("message not found")
        return changed

    async def unreact(self, message: str, identity: str, *, request_id: str) -> None:
        def change(current: Message) -> dict[str, Any] | None:
            _refuse_deleted(current)
            if identity not in current.reactions:
                return None
            return {"reactions": {who: what for who, what in current.reactions.items() if who != identity}}

        await self._change(message, None, None, change, request_id)


def deletion_event(thread: str, by: str, stamp: Stamp) -> Draft:
    """The message that a thread's deletion leaves in it."""
    body = {"_event": "thread_deleted", "by": by}
    message = Message(id=keyspace.message_id(stamp), thread=thread, author=by, ts=stamp.ns, body=body, deleted=True)
    return _draft(message, stamp, stamp)


def _first_version(new: NewMessage, thread: str, stamp: Stamp) -> Message:
    return Message(
        id=keyspace.message_id(stamp),
        thread=thread,
        author=new.author,
        role=new.role,
        ts=stamp.ns,
        body=new.body,
        reply_to=new.reply_to,
        reactions=new.reactions,
    )


def _next_version(current: Message, stamp: Stamp, fields: dict[str, Any]) -> Message:
    return Message(
        **{
            "id": current.id,
            "thread": current.thread,
            "author": current.author,
            "role": current.role,
            "ts": stamp.ns,
            "body": current.body,
            "reply_to": current.reply_to,
            "deleted": current.deleted,
            "reactions": current.reactions,
            **fields,
        }
    )


def _draft(message: Message, first: Stamp, stamp: Stamp, extra: Sequence[tuple[bytes, bytes | None]] = ()) -> Draft:
    """The version `message` at `stamp`, with its index entries and `extra`."""
    is_first = stamp == first
    own = stamp.raw
    first_own = own if is_first else first.raw
    text = first_own.decode()
    thread = keyspace.part(message.thread)
    key = b"thread:%b:msg:%b" % (thread, own)
    secret = record.MessageSecret(
        text, message.author, message.deleted, message.role, message.body, message.reply_to, message.reactions
    )

    def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
        header = record.MessageHeader(key_id, "" if is_first else text, message.author, message.deleted)
        place = (b"" if is_first else own) + (DELETED if message.deleted else b"")
        return Write(
            (
                (key, record.pack(header, sealed[0])),
                (b"version:msg:%b:%b" % (message.id.encode(), own), thread),
                (b"index:order:%b:%b" % (thread, first_own), place),
                *extra,
            ),
            messages=1,
        )

    return Draft(((key, record.encode_secret(secret)),), finish)


def _refuse_deleted(current: Message) -> None:
    if current.deleted:
        raise MessageNotFoundError("message not found")
