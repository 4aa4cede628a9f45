"""Messages: appending, versions, reactions, tombstones, reading and lists.

Owns: what a next version becomes, how an entry of the order index leads to a record, and the streaming of lists.
Invariants:
- Every version is a record at its own stamp and is never changed afterwards; a message's id is the stamp of its first
  version.
- The order index has one entry per message, at the stamp of its first version, which leads to the latest version; it is
  changed in the batch of that version. So a list costs as much as it has messages, however often they were edited.
- Changes of one message run one after another; each builds on the version before it.
- A list is in order of creation and shows each message once; messages created while it is read are not in it. A list of
  any length takes bounded memory: batches of LIST_MESSAGES_MAX and LIST_BYTES_MAX, the next of which is read and sent
  to the key service while the one before is answered.
- A record is shown only as what its sealed part says it is, and only where the index rightly leads to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from minikms.client import DecryptItem
from progressdb_server.store import drafts, keyspace, record
from progressdb_server.store.drafts import Draft
from progressdb_server.store.engine import SCAN_ENTRIES_MAX
from progressdb_server.store.idempotency import Ticket
from progressdb_server.store.keyspace import Place, Stamp
from progressdb_server.store.model import (
    ConditionFailedError,
    Idempotency,
    Message,
    MessageNotFoundError,
    NewMessage,
    NotTheAuthorError,
    RecordUnreadableError,
    StoredVersion,
)
from progressdb_server.store.sealer import ThreadState
from progressdb_server.store.threads import Threads

LIST_MESSAGES_MAX: Final = 256
"""Of one batch of a list or of a message's versions."""
LIST_BYTES_MAX: Final = 2 * 1024 * 1024
"""Of sealed parts in one batch, exceeded by one record at most."""
LIST_BATCHES_AHEAD: Final = 1


class Loaded(NamedTuple):
    """A record that was read and not opened yet. `first`: stamp of the message that it must belong to."""

    sealed: DecryptItem
    header: record.MessageHeader
    first: str


class Messages(Threads):
    """See `store.model.ConversationStore`."""

    # --- creating -------------------------------------------------------------------------------------------------
    def create_message(
        self, new: NewMessage, *, idempotency: Idempotency | None = None, request_id: str | None = None
    ) -> Coroutine[Any, Any, Message]:
        if idempotency is None:
            return self._create(new, None, request_id)
        return self._create_once(new, idempotency, request_id)

    async def _create_once(self, new: NewMessage, idempotency: Idempotency, request_id: str | None) -> Message:
        ticket = Ticket(idempotency, ["message", new])
        async with self.locks.hold(ticket.key):
            made = ticket.recall(self.engine, self.clock.now_ns())
            if made is None:
                return await self._create(new, ticket, request_id)
            await self.writer.barrier()  # what is answered must be durable
            thread, place = self._locate(made, None)
            return await self._read_version(thread, place.first, place.first)

    def _create(self, new: NewMessage, ticket: Ticket | None, request_id: str | None) -> Coroutine[Any, Any, Message]:
        if not new.thread:
            return self._found(new, ticket, request_id)
        state = self.sealer.thread(new.thread)
        if state is None:
            return self._found_or_append(new, ticket, request_id)
        return self._append(state, new, ticket, request_id)

    async def _found_or_append(self, new: NewMessage, ticket: Ticket | None, request_id: str | None) -> Message:
        state = None
        while state is None:
            # One at a time for each thread, so that a burst of first messages makes one key.
            async with self.locks.hold(keyspace.meta(new.thread)):
                state = self.sealer.thread(new.thread)
                if state is None:
                    try:
                        return await self._found(new, ticket, request_id)
                    except ConditionFailedError:
                        state = self.sealer.thread(new.thread)
        return await self._append(state, new, ticket, request_id)

    async def _found(self, new: NewMessage, ticket: Ticket | None, request_id: str | None) -> Message:
        """Make the thread, with its first message."""
        thread, created = self.new_thread(author=new.author, title=None, name=new.thread)
        stamp = self.clock.next()
        message = new.first_version(keyspace.message_id(stamp), thread.id, stamp.ns)
        extra = (ticket.put(message.id, stamp.ns),) if ticket else ()
        draft = drafts.joined(drafts.new_thread(thread, created, extra), drafts.message_version(message, stamp, stamp))
        await self.sealer.found(thread.id, draft, request_id)
        return message

    async def _append(
        self, state: ThreadState, new: NewMessage, ticket: Ticket | None, request_id: str | None
    ) -> Message:
        made: list[Message] = []

        def draft(stamp: Stamp) -> Draft:
            message = new.first_version(keyspace.message_id(stamp), state.thread, stamp.ns)
            made[:] = (message,)
            if ticket is None and new.author in state.writers:
                return drafts.message_version(message, stamp, stamp)
            extra: list[tuple[bytes, bytes | None]] = [ticket.put(message.id, stamp.ns)] if ticket else []
            key = keyspace.writer(state.thread, new.author)
            if self.engine.get(key) is None:
                extra.append((key, b""))
            return drafts.message_version(message, stamp, stamp, extra)

        await self.sealer.append(state, draft, request_id)
        if new.author not in state.writers:
            state.remember_writer(new.author)
        return made[0]

    # --- changing -------------------------------------------------------------------------------------------------
    async def update_message(
        self,
        message_id: str,
        *,
        author: str | None,
        body: Any,
        role: str | None,
        reply_to: str | None,
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> Message:
        def change(current: Message) -> dict[str, Any]:
            _refuse_deleted(current)
            fields: dict[str, Any] = {"body": body}
            if role is not None:
                fields["role"] = role
            if reply_to is not None:
                fields["reply_to"] = reply_to
            return fields

        return await self._change(message_id, thread_id, author, change, request_id)

    async def delete_message(
        self, message_id: str, *, author: str | None, thread_id: str | None = None, request_id: str | None = None
    ) -> None:
        def change(current: Message) -> dict[str, Any] | None:
            return None if current.deleted else {"deleted": True}

        await self._change(message_id, thread_id, author, change, request_id)

    async def set_reaction(
        self, message_id: str, identity: str, reaction: str, *, request_id: str | None = None
    ) -> Message:
        def change(current: Message) -> dict[str, Any]:
            _refuse_deleted(current)
            return {"reactions": {**current.reactions, identity: reaction}}

        return await self._change(message_id, None, None, change, request_id)

    async def remove_reaction(self, message_id: str, identity: str, *, request_id: str | None = None) -> None:
        def change(current: Message) -> dict[str, Any] | None:
            _refuse_deleted(current)
            if identity not in current.reactions:
                return None
            return {"reactions": {who: what for who, what in current.reactions.items() if who != identity}}

        await self._change(message_id, None, None, change, request_id)

    async def _change(
        self,
        message: str,
        thread: str | None,
        author: str | None,
        change: Callable[[Message], dict[str, Any] | None],
        request_id: str | None,
    ) -> Message:
        """Append a version. `change(current)` gives the fields to replace, None if nothing changes. Returns the latest
        version. Raises MessageNotFoundError, NotTheAuthorError, and what `change` raises."""
        async with self.locks.hold(message.encode()):
            owner, place = self._locate(message, thread)
            state = self.sealer.thread(owner)
            if state is None:
                raise RecordUnreadableError(f"thread {owner} has no key")
            first = Stamp.parse(place.first.decode())
            current = await self._read_version(owner, place.first, place.latest)
            if author is not None and author != current.author:
                raise NotTheAuthorError("author does not match")
            fields = change(current)
            if fields is None:
                return current
            made: list[Message] = []

            def draft(stamp: Stamp) -> Draft:
                made[:] = (msgspec.structs.replace(current, ts=stamp.ns, **fields),)
                return drafts.message_version(made[0], first, stamp)

            await self.sealer.append(state, draft, request_id)
            return made[0]

    # --- reading --------------------------------------------------------------------------------------------------
    async def get_message(self, message_id: str, *, thread_id: str | None = None) -> Message:
        thread, place = self._locate(message_id, thread_id)
        return await self._read_version(thread, place.first, place.latest)

    async def message_versions(self, message_id: str, *, thread_id: str | None = None) -> list[Message]:
        try:
            thread, place = self._locate(message_id, thread_id)
        except MessageNotFoundError:
            return []
        prefix = keyspace.versions(message_id)
        lower, upper = prefix, keyspace.after(prefix)
        records = keyspace.messages(thread)
        found: list[Message] = []
        while entries := self.engine.scan(lower, upper, limit=LIST_MESSAGES_MAX):
            lower = keyspace.next_key(entries[-1][0])
            keys = (records + key[len(prefix) :] for key, _ in entries)
            found += await self._open(thread, [self._load(key, thread, place.first) for key in keys])
        return found

    def _locate(self, message: str, thread: str | None) -> tuple[str, Place]:
        """The message's thread, and its place there. Raises MessageNotFoundError, also when it is in another thread."""
        stamp = keyspace.parse_message_id(message)
        if stamp is not None:
            first = stamp.raw
            found = self.engine.get(keyspace.versions(message) + first)
            if found is not None and (thread is None or keyspace.part(thread) == found):
                owner = keyspace.unpart(found)
                key = keyspace.order(owner) + first
                value = self.engine.get(key)
                if value is None:
                    raise RecordUnreadableError(f"the order entry of message {message} is missing")
                return owner, _place(key, value)
        raise MessageNotFoundError("message not found")

    async def _read_version(self, thread: str, first: bytes, stamp: bytes) -> Message:
        (message,) = await self._open(thread, [self._load(keyspace.messages(thread) + stamp, thread, first)])
        return message

    def _load(self, key: bytes, thread: str, first: bytes) -> Loaded:
        """The version at `key` of the message whose first version is at the stamp `first`. Raises
        RecordUnreadableError."""
        raw = self.engine.get(key)
        if raw is None:
            raise RecordUnreadableError(f"the record {key.decode()} is missing")
        try:
            header, sealed = record.unpack_message(raw)
        except record.RecordFormatError as error:
            raise RecordUnreadableError(f"the record {key.decode()} is malformed") from error
        item = DecryptItem(key_id=header.key_id, ciphertext=sealed, aad=key, thread_id=thread)
        return Loaded(item, header, first.decode())

    async def _open(self, thread: str, batch: Sequence[Loaded]) -> list[Message]:
        """Raises StoreUnavailableError, RecordUnreadableError."""
        plaintexts = await self.sealer.open([item.sealed for item in batch])
        messages: list[Message] = []
        for (sealed, header, first), plaintext in zip(batch, plaintexts, strict=True):
            try:
                messages.append(record.open_message(header, sealed.aad, thread, first, plaintext))
            except record.RecordFormatError as error:
                raise RecordUnreadableError(f"the record {sealed.aad.decode()} is not what belongs there") from error
        return messages

    # --- lists ----------------------------------------------------------------------------------------------------
    async def list_messages(
        self,
        thread_id: str,
        *,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        include_deleted: bool = False,
    ) -> AsyncIterator[list[Message]]:
        prefix = keyspace.order(thread_id)
        lower, upper = prefix, keyspace.after(prefix)
        if after is not None:
            lower = keyspace.next_key(prefix + _first_stamp(after))
        if before is not None:
            upper = prefix + _first_stamp(before)
        newest = self.engine.scan(lower, upper, limit=1, reverse=True)
        if not newest or limit == 0:
            return
        upper = keyspace.next_key(newest[0][0])
        if limit is not None:
            lower = await self._start_of_last(limit, lower, upper, include_deleted)
        loop = asyncio.get_running_loop()
        opening: deque[asyncio.Task[list[Message]]] = deque()
        try:
            for batch in self._batches(thread_id, lower, upper, include_deleted):
                opening.append(loop.create_task(self._open(thread_id, batch)))
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
        while entries := self.engine.scan(lower, upper, limit=LIST_MESSAGES_MAX):
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
            lower = keyspace.next_key(lower)
            if batch:
                yield batch

    async def _start_of_last(self, limit: int, lower: bytes, upper: bytes, include_deleted: bool) -> bytes:
        """The key of the first of the last `limit` messages."""
        while entries := self.engine.scan(lower, upper, limit=min(limit + 64, SCAN_ENTRIES_MAX), reverse=True):
            for key, value in entries:
                upper = key
                if include_deleted or not keyspace.is_deleted(value):
                    limit -= 1
                    if limit == 0:
                        return key
            await asyncio.sleep(0)
        return lower

    # --- pages ----------------------------------------------------------------------------------------------------
    async def message_page(
        self, thread_id: str, *, before: str, after: str, limit: int, versions_max: int
    ) -> tuple[list[StoredVersion], bool]:
        prefix = keyspace.order(thread_id)
        lower, upper = prefix, keyspace.after(prefix)
        if before:
            upper = prefix + _first_stamp(before)
        if after:
            lower = keyspace.next_key(prefix + _first_stamp(after))
        entries = self.engine.scan(lower, upper, limit=limit + 1, reverse=not after)
        more = len(entries) > limit
        entries = entries[:limit]
        if not after:
            entries.reverse()
        records = keyspace.messages(thread_id)
        places = [_place(key, value) for key, value in entries]
        shown = await self._show(thread_id, [(records + place.latest, place.first) for place in places])
        return [
            version._replace(versions=self._count_versions(version.message.id, versions_max)) for version in shown
        ], more

    async def version_page(self, message_id: str, limit: int) -> tuple[list[StoredVersion], bool]:
        thread, place = self._locate(message_id, None)
        prefix, records = keyspace.versions(message_id), keyspace.messages(thread)
        newest = self.engine.scan(prefix, keyspace.after(prefix), limit=limit + 1, reverse=True)
        keys = [(records + key[len(prefix) :], place.first) for key, _ in reversed(newest[:limit])]
        return await self._show(thread, keys), len(newest) > limit

    async def _show(self, thread: str, keys: Sequence[tuple[bytes, bytes]]) -> list[StoredVersion]:
        """The versions at these storage keys, each with the stamp of its message's first version. They are opened in
        batches of LIST_BYTES_MAX, as lists are."""
        shown: list[StoredVersion] = []
        batch: list[Loaded] = []
        size = 0
        for number, (key, first) in enumerate(keys, start=1):
            batch.append(self._load(key, thread, first))
            size += len(batch[-1].sealed.ciphertext)
            if size > LIST_BYTES_MAX or number == len(keys):
                messages = await self._open(thread, batch)
                shown += [
                    StoredVersion(message, loaded.header.key_id, len(keys))
                    for message, loaded in zip(messages, batch, strict=True)
                ]
                batch, size = [], 0
        return shown

    def _count_versions(self, message: str, versions_max: int) -> int:
        prefix = keyspace.versions(message)
        return len(self.engine.keys(prefix, keyspace.after(prefix), limit=versions_max))


def _place(key: bytes, value: bytes) -> Place:
    """Raises RecordUnreadableError."""
    try:
        return Place.parse(key, value)
    except ValueError as error:
        raise RecordUnreadableError(f"the index entry {key.decode()} is malformed") from error


def _first_stamp(message: str) -> bytes:
    first = keyspace.parse_message_id(message)
    if first is None:
        raise MessageNotFoundError("message not found")
    return first.raw


def _refuse_deleted(current: Message) -> None:
    if current.deleted:
        raise MessageNotFoundError("message not found")
