"""Reading messages: where the latest version is, opening in batches, lists.

Owns: how an entry of `index:order` is read, and the streaming of lists. Invariants:
- A list is in order of creation and shows each message once; what is created while it is read is not of it.
- A list of any length takes bounded memory: it goes by batches of LIST_MESSAGES_MAX and LIST_BYTES_MAX, the next of
  which is read and sent to the key service while the one before is answered.
- A record is shown only as what its sealed part says it is, and only where the index led to it rightly.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final, NamedTuple

from progressdb_server.kms.provider import Open
from progressdb_server.store import keyspace, record
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Engine
from progressdb_server.store.model import Message, MessageNotFoundError, RecordUnreadableError
from progressdb_server.store.sealer import Sealer

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
