"""Reading messages: one version, all versions, lists of a thread, and the pages of the viewer.

Owns: how an entry of an index leads to a record, how a version gets its content, and the streaming of lists.
Invariants:
- A record is shown only as what its sealed part says it is, and only where the index rightly leads to it.
- A version without content of its own is opened together with the record that has it. Both belong to one message.
- Lists and pages open records one by one. One that does not open is listed with `Message.error` and hides no other. A
  failure of the key service that concerns no single record ends the list.
- A list is in order of creation and shows each message once; messages created while it is read are not in it. A list of
  any length takes bounded memory: batches of LIST_MESSAGES_MAX and LIST_BYTES_MAX, the next of which is read and sent
  to the key service while the one before is answered. The records of a batch are read in one pass.
- Between two chunks, a list gives an empty one where the next one has to wait for the key service.
- Single versions beyond READ_UNCOUNTED_BYTES_MAX are read LONG_READS_COUNT_MAX at a time. What waits holds no content.
- The versions of a message come in pieces of SHOWN_BYTES_MAX, exceeded by one version at most, also where many versions
  share one large content, which is then opened once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple, TypeVar

import msgspec

from minikms.api.errors import KmsRefusedError
from minikms.client import DecryptItem
from minikms.client.items import SEALED_BYTES_MAX
from progressdb_server.conversations.validators import Validators
from progressdb_server.store import keyspace, record
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Reads
from progressdb_server.store.keyspace import OrderEntry, Stamp
from progressdb_server.store.model import (
    NOT_OPENED,
    RECORD_MALFORMED,
    RECORD_MISSING,
    AmbiguousTimeError,
    Message,
    MessageNotFoundError,
    MessageRange,
    RecordUnreadableError,
    StoredVersion,
    StoreUnavailableError,
    VersionList,
)
from progressdb_server.store.sealer import Sealer, store_error

T = TypeVar("T")

LIST_MESSAGES_MAX: Final = 256
"""The messages in one batch of a list or of a message's versions."""
LIST_MESSAGES_FIRST: Final = 128
"""The messages in the first batch of a list: it is answered while the key service works on the next one."""
LIST_BYTES_MAX: Final = 512 * 1024
"""The bytes of sealed parts in one batch of a list, exceeded by one message at most."""
LIST_BATCHES_AHEAD: Final = 1
VERSIONS_BYTES_MAX: Final = 1024 * 1024
"""The bytes of sealed parts in one batch of a message's versions, exceeded by one version at most."""
SHOWN_BYTES_MAX: Final = 256 * 1024
"""The bytes of one piece of a message's versions, each counted with its content."""
WHOLE: Final = MessageRange()
PAGE_BYTES_MAX: Final = 8 * 1024 * 1024
"""The bytes of a page of the viewer, each version counted with its content; exceeded by one at most."""
READ_UNCOUNTED_BYTES_MAX: Final = 16 * 1024
"""The bytes of a version's sealed parts that are read without a turn. All connections together hold 64 MiB of these."""
LONG_READS_COUNT_MAX: Final = 16
"""Longer versions that are read or changed at a time. Each has up to 2 MiB of sealed parts and about twice that opened.
"""
LONG_READ_WAIT_SECONDS_MAX: Final = 10
LONG_READS_FULL: Final = "too many long messages are being read: ask for this one again later"
LONG_READS_RETRY_SECONDS: Final = 2
_NONE: Final[Mapping[bytes, bytes]] = MappingProxyType({})


class Stored(msgspec.Struct, frozen=True, gc=False):
    """A record as it was read. `header` is None if `error` says why it can't be opened."""

    key: bytes
    header: record.MessageHeader | None
    sealed: bytes
    error: str = ""


class LoadedVersion(msgspec.Struct, frozen=True, gc=False):
    """A version that was read and not opened yet. `content` is the record that has its content, None if it has its own.
    `first`: stamp of the message that it must belong to."""

    own: Stored
    content: Stored | None
    first: str

    @property
    def bytes(self) -> int:
        """The size of the sealed parts."""
        return len(self.own.sealed) + (len(self.content.sealed) if self.content is not None else 0)


class CompleteVersion(NamedTuple):
    """A version that was opened. `content`: the stamp of the version that has its content, perhaps its own; `bytes`: of
    its own sealed part. `before` as in `record.OpenedVersion`."""

    message: Message
    content: str
    bytes: int
    before: record.Before


class Given:
    """What one list has given so far: the keys that opened it, and whether every record opened."""

    __slots__ = ("key_ids", "whole")

    def __init__(self) -> None:
        self.key_ids: set[str] = set()
        self.whole = True


class NotOpened(NamedTuple):
    """Why the record at `key` does not open; `refusal` is that of the key service, None if it opened the record."""

    key: bytes
    code: str
    refusal: KmsRefusedError | None = None


class Reading:
    """Reads messages, and the pages of the viewer."""

    def __init__(self, reads: Reads, sealer: Sealer, validators: Validators) -> None:
        self._reads = reads
        self._sealer = sealer
        self.validators = validators
        self.long_reads = asyncio.Semaphore(LONG_READS_COUNT_MAX)
        """The turns of LONG_READS_COUNT_MAX versions."""

    # --- one version ----------------------------------------------------------------------------------------------
    async def message(self, message_id: str, *, thread_id: str | None = None) -> Message:
        """The latest version, also when deleted. Raises MessageNotFoundError (also when it is in another thread than
        the one named)."""
        thread, place = await self.locate(message_id, thread_id)
        async with self.open_version(thread, place.first, place.latest) as version:
            return version.message

    async def latest_version(self, message_id: str) -> Message:
        """Reads the latest version like `message`, but one that does not open has `error`."""
        thread, place = await self.locate(message_id, None)
        async with self._open_one(thread, place.first, place.latest) as (loaded, version):
            return _listed(thread, loaded, version)

    async def locate(self, message: str, thread: str | None) -> tuple[str, OrderEntry]:
        """The message's thread, and its place there. Raises MessageNotFoundError, also when it is in another thread."""
        stamp = keyspace.parse_message_id(message)
        if stamp is not None:
            first = stamp.raw
            thread_part = await self._reads.get(keyspace.versions(message) + first)
            if thread_part is not None and (thread is None or keyspace.part(thread) == thread_part):
                owner = keyspace.unpart(thread_part)
                key = keyspace.order(owner) + first
                value = await self._reads.get(key)
                if value is None:
                    raise RecordUnreadableError(f"the order entry of message {message} is missing")
                return owner, _place(key, value)
        raise MessageNotFoundError

    @contextlib.asynccontextmanager
    async def open_version(self, thread: str, first: bytes, stamp: bytes) -> AsyncIterator[CompleteVersion]:
        """A long version keeps its turn during the block. Raises StoreUnavailableError, RecordUnreadableError."""
        async with self._open_one(thread, first, stamp) as (_, version):
            if isinstance(version, NotOpened):
                if version.refusal is not None:
                    raise store_error(version.refusal, version.key) from version.refusal
                what = "missing" if version.code == RECORD_MISSING else "malformed, or not what belongs there"
                raise RecordUnreadableError(f"the record {version.key.decode()} is {what}")
            yield version

    @contextlib.asynccontextmanager
    async def _open_one(
        self, thread: str, first: bytes, stamp: bytes
    ) -> AsyncIterator[tuple[LoadedVersion, CompleteVersion | NotOpened]]:
        """Opens a version like `open_version`; raises StoreUnavailableError only."""
        records = keyspace.messages(thread)
        loaded = await self._load(records, stamp, first)
        if loaded.bytes <= READ_UNCOUNTED_BYTES_MAX:
            (version,) = await self._open_each(thread, [loaded])
            yield loaded, version
            return
        del loaded  # what waits for its turn holds nothing
        try:
            async with asyncio.timeout(LONG_READ_WAIT_SECONDS_MAX):
                await self.long_reads.acquire()
        except TimeoutError:
            raise StoreUnavailableError(LONG_READS_FULL, LONG_READS_RETRY_SECONDS) from None
        try:
            loaded = await self._load(records, stamp, first)
            (version,) = await self._open_each(thread, [loaded])
            yield loaded, version
        finally:
            self.long_reads.release()

    # --- records --------------------------------------------------------------------------------------------------
    async def _stored(self, key: bytes, near: Mapping[bytes, bytes] = _NONE) -> Stored:
        """`near`: what was read of the records already."""
        raw = near.get(key) or await self._reads.get(key)
        if raw is None:
            return Stored(key, None, b"", RECORD_MISSING)
        try:
            return Stored(key, *record.unpack_message(raw))
        except record.RecordFormatError:
            return Stored(key, None, b"", RECORD_MALFORMED)

    async def _near(self, records: bytes, stamps: Collection[bytes]) -> dict[bytes, bytes]:
        """The records from the first to the last of these stamps, up to bounds: one pass over neighbours costs much
        less than finding each."""
        lower, upper = records + min(stamps), keyspace.next_key(records + max(stamps))
        return dict(await self._reads.scan(lower, upper, limit=2 * len(stamps), bytes_max=LIST_BYTES_MAX))

    async def _with_far(
        self, records: bytes, stamps: Collection[bytes], near: Mapping[bytes, bytes] = _NONE
    ) -> Mapping[bytes, bytes]:
        """`near`, and what else the versions at these stamps need, their contents too, up to bounds, in two round
        trips. An engine of this process finds each of them as fast."""
        if not self._reads.remote:
            return near
        rows = dict(near)
        own = [records + stamp for stamp in stamps]
        rows |= await self._reads.values([key for key in own if key not in rows], bytes_max=LIST_BYTES_MAX)
        contents = dict.fromkeys(_content_key(records, rows[key]) for key in own if key in rows)
        wanted = [key for key in contents if key and key not in rows]
        return rows | await self._reads.values(wanted, bytes_max=LIST_BYTES_MAX)

    async def _load(
        self,
        records: bytes,
        stamp: bytes,
        first: bytes,
        neighbour: LoadedVersion | None = None,
        near: Mapping[bytes, bytes] = _NONE,
    ) -> LoadedVersion:
        """The version at `stamp` of the message whose first version is at `first`; `records` is the prefix of its
        thread's. What the version shares with `neighbour`, or `near` holds, is not read again."""
        own = await self._stored(records + stamp, near)
        content: Stored | None = None
        if isinstance(own.header, record.LaterHeader) and own.header.content:
            key = records + own.header.content.encode()
            if neighbour is not None:
                content = next((one for one in (neighbour.content, neighbour.own) if one and one.key == key), None)
            content = content or await self._stored(key, near)
        return LoadedVersion(own, content, first.decode())

    async def _answers(
        self, thread: str, batch: Sequence[LoadedVersion], known: Collection[bytes] = (), used: set[str] | None = None
    ) -> dict[bytes, bytes | KmsRefusedError]:
        """What the key service answers for each record of the batch that is not `known`, by storage keys. The ids of
        the keys are added to `used`. Raises StoreUnavailableError."""
        records = [one.own for one in batch] + [one.content for one in batch if one.content is not None]
        wanted = {
            one.key: DecryptItem(key_id=one.header.key_id, ciphertext=one.sealed, aad=one.key, thread_id=thread)
            for one in records
            if one.header is not None and one.key not in known
        }
        if used is not None:
            used.update([item.key_id for item in wanted.values()])
        return dict(zip(wanted, await self._sealer.open_each(list(wanted.values())), strict=True))

    async def _open_each(
        self, thread: str, batch: Sequence[LoadedVersion], known: dict[bytes, record.OpenedVersion] | None = None
    ) -> list[CompleteVersion | NotOpened]:
        """Opens the records in order. `known`: for a batch of one message's versions, the rest of the batch before it,
        by storage keys; it is replaced by the record that has the content of the last version. Raises
        StoreUnavailableError.
        """
        before = {} if known is None else known.copy()
        answers = await self._answers(thread, batch, before)
        opened: dict[tuple[bytes, str], record.OpenedVersion | NotOpened] = {}

        def open_record(one: Stored, first: str) -> record.OpenedVersion | NotOpened:
            version = before.get(one.key) or opened.get((one.key, first))
            if version is None:
                version = opened[one.key, first] = _opened(one, thread, first, answers.get(one.key))
            return version

        versions: list[CompleteVersion | NotOpened] = []
        for loaded in batch:
            own = open_record(loaded.own, loaded.first)
            content = open_record(loaded.content, loaded.first) if loaded.content is not None else None
            versions.append(_version(loaded, own, content))
            if known is not None:
                known.clear()
                last = own if content is None else content
                if isinstance(last, record.OpenedVersion):
                    known[(loaded.content or loaded.own).key] = last
        return versions

    # --- the versions of a message --------------------------------------------------------------------------------
    async def versions(self, message_id: str, *, limit: int | None = None, before: str | None = None) -> VersionList:
        """Empty for an unknown id. `limit` keeps the most recent; `before`, exclusive, is the `older` of another list
        or a `ts`. A version that does not open has `error`. Raises AmbiguousTimeError for a `ts` that several versions
        have, or that none has while they are in several eras."""
        try:
            thread, place = await self.locate(message_id, None)
        except MessageNotFoundError:
            return VersionList(_chunks(), "")
        prefix = keyspace.versions(message_id)
        lower, upper = prefix, keyspace.after(prefix)
        if before is not None:
            upper = prefix + (await self._end_of_page(prefix, place, before)).raw
        newest = await self._reads.keys(lower, upper, limit=1, reverse=True)
        if not newest or limit == 0:
            return VersionList(_chunks(), "")
        upper = keyspace.next_key(newest[0])  # versions that are written later are not in the list
        older = ""
        if limit is not None:
            lower = await self._start_of_last(limit, lower, upper, include_deleted=True)
            if await self._reads.keys(prefix, lower, limit=1, reverse=True):
                older = keyspace.cursor(keyspace.stamp_of(lower))
        return VersionList(self._versions(thread, place.first, prefix, lower, upper), older)

    async def _end_of_page(self, prefix: bytes, place: OrderEntry, before: str) -> Stamp:
        """The stamp that `before` names among the versions of the message at `place`. A time of no version counts too,
        if all of them are in one era, so that it orders them. Raises AmbiguousTimeError."""
        cursor = keyspace.parse_cursor(before)
        if isinstance(cursor, Stamp):
            return cursor
        eras = range(Stamp.parse(place.first.decode()).era, Stamp.parse(place.latest.decode()).era + 1)
        keys: list[bytes] = []
        for era in eras:
            of_time = prefix + b"%020d-" % (era * keyspace.ERA_NS + cursor)
            keys += await self._reads.keys(of_time, keyspace.after(of_time), limit=2)
        if len(keys) == 1:
            return keyspace.stamp_of(keys[0])
        if keys or len(eras) > 1:
            raise AmbiguousTimeError
        return Stamp(eras[0] * keyspace.ERA_NS + cursor, 0)

    async def _versions(
        self, thread: str, first: bytes, prefix: bytes, lower: bytes, upper: bytes
    ) -> AsyncIterator[list[Message]]:
        records = keyspace.messages(thread)
        neighbour: LoadedVersion | None = None
        known: dict[bytes, record.OpenedVersion] = {}
        while entries := await self._reads.scan(lower, upper, limit=LIST_MESSAGES_MAX):
            near = await self._with_far(records, [key[len(prefix) :] for key, _ in entries])
            batch: list[LoadedVersion] = []
            size = 0
            for key, _ in entries:
                lower = keyspace.next_key(key)
                loaded = await self._load(records, key[len(prefix) :], first, neighbour, near)
                shared = neighbour is not None and loaded.content in (neighbour.content, neighbour.own)
                size += len(loaded.own.sealed) if shared else loaded.bytes
                batch.append(loaded)
                neighbour = loaded
                if size > VERSIONS_BYTES_MAX:
                    break
            versions = await self._open_each(thread, batch, known)
            piece: list[Message] = []
            size = 0
            for loaded, one in zip(batch, versions, strict=True):
                piece.append(_listed(thread, loaded, one))
                size += loaded.bytes
                if size > SHOWN_BYTES_MAX:
                    yield piece
                    piece, size = [], 0
                    await asyncio.sleep(0)
            if piece:
                yield piece

    # --- lists ----------------------------------------------------------------------------------------------------
    async def messages(
        self, thread_id: str, *, range_: MessageRange = WHOLE, tag: str | None = None
    ) -> AsyncIterator[list[Message]]:
        """Chunks, in order of creation, latest version of each; one that does not open has `error`. An unknown thread
        yields nothing. An empty chunk says that the next one has to wait. `tag`: the `list_tag` of what is asked, for
        `list_unchanged`."""
        prefix = keyspace.order(thread_id)
        lower, upper = prefix, keyspace.after(prefix)
        if range_.after is not None:
            lower = keyspace.next_key(prefix + _first_stamp(range_.after))
        if range_.before is not None:
            upper = prefix + _first_stamp(range_.before)
        newest = await self._reads.keys(lower, upper, limit=1, reverse=True)
        if not newest or range_.limit == 0:
            return
        upper = keyspace.next_key(newest[0])
        if range_.limit is not None:
            lower = await self._start_of_last(range_.limit, lower, upper, range_.include_deleted)
        loop = asyncio.get_running_loop()
        opening: deque[asyncio.Task[list[Message]]] = deque()
        cursor = Given()
        try:
            async with contextlib.aclosing(self._batches(thread_id, lower, upper, range_.include_deleted)) as batches:
                async for batch in batches:
                    opening.append(loop.create_task(self._list(thread_id, batch, cursor)))
                    if len(opening) > LIST_BATCHES_AHEAD:
                        yield await opening.popleft()
                        yield []  # the next one has to wait for the key service
                    else:
                        await asyncio.sleep(0)  # so that it is on its way while the next one is read
            while opening:
                yield await opening.popleft()
                if opening:
                    yield []
            if tag is not None and cursor.whole and tag == await self.list_tag(thread_id, range_):
                self.validators.remember(tag, cursor.key_ids)
        finally:  # the reader went away, or a batch failed
            await cancel(opening)

    async def _list(self, thread: str, batch: Sequence[LoadedVersion], cursor: Given) -> list[Message]:
        answers = await self._answers(thread, batch, used=cursor.key_ids)
        messages = [_latest(thread, loaded, answers) for loaded in batch]
        if [message for message in messages if message.error]:  # of a thousand, a list is faster than `any`
            cursor.whole = False
        return messages

    async def list_tag(self, thread_id: str, range_: MessageRange) -> str:
        """An opaque text for this list as it is now. It changes with every change of the thread's messages and at each
        start."""
        prefix = keyspace.messages(thread_id)
        newest = await self._reads.keys(prefix, keyspace.after(prefix), limit=1, reverse=True)
        state = await self._sealer.thread(thread_id)
        return self.validators.tag(
            thread_id.encode(),
            newest[0] if newest else None,
            state.key_raw if state is not None else None,
            msgspec.msgpack.encode(range_),
        )

    async def list_unchanged(self, thread_id: str, tag: str) -> bool:
        """Whether the list of this tag, which is its `list_tag` now, was given whole and without an error, and the key
        service still has every key that it needs. Opens no record; false if anything is in doubt."""
        key_ids = self.validators.keys_of(tag)
        state = await self._sealer.thread(thread_id)
        if key_ids is None or state is None:
            return False
        return await self._sealer.has_keys(thread_id, key_ids | {state.key_id})

    async def _batches(
        self, thread: str, lower: bytes, upper: bytes, include_deleted: bool
    ) -> AsyncGenerator[list[LoadedVersion], None]:
        records = keyspace.messages(thread)
        count = LIST_MESSAGES_FIRST
        header: record.MessageHeader | None = None
        before = b""  # how each record with this `header` begins; empty if the last one has none to share
        while entries := await self._reads.scan(lower, upper, limit=count):
            lower = keyspace.next_key(entries[-1][0])
            count = LIST_MESSAGES_MAX
            stamps: list[tuple[bytes, bytes]] = []
            for key, value in entries:
                if value:
                    place = _place(key, value)
                    if include_deleted or not place.deleted:
                        stamps.append((place.latest, place.first))
                else:  # most messages have one version
                    first = key[-keyspace.STAMP_BYTES :]
                    stamps.append((first, first))
            if not stamps:
                continue
            latest_stamps = [latest for latest, _ in stamps]
            near = await self._with_far(records, latest_stamps, await self._near(records, latest_stamps))
            batch: list[LoadedVersion] = []
            size = 0
            for latest, first in stamps:
                key = records + latest
                raw = near.get(key, b"")
                if before and raw.startswith(before) and len(raw) <= SEALED_BYTES_MAX:
                    sealed = raw[len(before) :]
                    loaded = LoadedVersion(Stored(key, header, sealed), None, first.decode())
                    size += len(sealed)
                else:
                    loaded = await self._load(records, latest, first, near=near)
                    header = loaded.own.header
                    before = raw[: -len(loaded.own.sealed)] if type(header) is record.MessageHeader else b""
                    size += loaded.bytes
                batch.append(loaded)
                if size > LIST_BYTES_MAX:
                    lower = keyspace.next_key(keyspace.order(thread) + first)
                    break
            yield batch

    async def _start_of_last(self, limit: int, lower: bytes, upper: bytes, include_deleted: bool) -> bytes:
        """The key of the first of the last `limit` messages."""
        while entries := await self._reads.scan(lower, upper, limit=min(limit + 64, SCAN_ENTRIES_MAX), reverse=True):
            for key, value in entries:
                upper = key
                if include_deleted or not keyspace.is_deleted(value):
                    limit -= 1
                    if limit == 0:
                        return key
            await asyncio.sleep(0)
        return lower

    # --- pages ----------------------------------------------------------------------------------------------------
    async def page(
        self, thread_id: str, *, before: str, after: str, limit: int, versions_max: int, opened: bool = True
    ) -> tuple[list[StoredVersion], bool]:
        """The most recent messages, or those next to a message id, in order of creation, up to a bound of bytes; and
        whether there are more in that direction. A message that does not open has `error`. Without `opened` the key
        service is not asked, and every message has `error`. Raises MessageNotFoundError for a malformed id."""
        prefix = keyspace.order(thread_id)
        lower, upper = prefix, keyspace.after(prefix)
        if before:
            upper = prefix + _first_stamp(before)
        if after:
            lower = keyspace.next_key(prefix + _first_stamp(after))
        entries = await self._reads.scan(lower, upper, limit=limit + 1, reverse=not after)
        more = len(entries) > limit
        entries = entries[:limit]
        places = [_place(key, value) for key, value in entries]
        stamps = [(place.latest, place.first) for place in places]
        versions, all_shown = await self._show(thread_id, stamps, opened)
        if not after:
            versions.reverse()
        return [
            version._replace(versions=await self._count_versions(version.message.id, versions_max))
            for version in versions
        ], more or not all_shown

    async def version_page(
        self, message_id: str, limit: int, *, opened: bool = True
    ) -> tuple[list[StoredVersion], bool]:
        """The newest versions, oldest first, up to a bound of bytes; and whether there are older ones. `opened` as for
        `page`. Raises MessageNotFoundError."""
        thread, place = await self.locate(message_id, None)
        prefix = keyspace.versions(message_id)
        newest = await self._reads.keys(prefix, keyspace.after(prefix), limit=limit + 1, reverse=True)
        stamps = [(key[len(prefix) :], place.first) for key in newest[:limit]]
        versions, all_shown = await self._show(thread, stamps, opened)
        versions.reverse()
        return versions, len(newest) > limit or not all_shown

    async def _show(
        self, thread: str, stamps: Sequence[tuple[bytes, bytes]], opened: bool
    ) -> tuple[list[StoredVersion], bool]:
        """The versions at these stamps, each with the stamp of its message's first version, in order, up to
        PAGE_BYTES_MAX; and whether that is all of them. They are opened in batches of LIST_BYTES_MAX, as lists are."""
        records = keyspace.messages(thread)
        page: list[StoredVersion] = []
        batch: list[LoadedVersion] = []
        size = shown_bytes = 0
        near = await self._with_far(records, [stamp for stamp, _ in stamps])
        for number, (stamp, first) in enumerate(stamps, start=1):
            batch.append(await self._load(records, stamp, first, near=near))
            size += batch[-1].bytes
            shown_bytes += batch[-1].bytes
            is_full = shown_bytes > PAGE_BYTES_MAX
            if size > LIST_BYTES_MAX or is_full or number == len(stamps):
                versions = await self._open_each(thread, batch) if opened else [_not_opened(one) for one in batch]
                for loaded, one in zip(batch, versions, strict=True):
                    key_id = loaded.own.header.key_id if loaded.own.header is not None else ""
                    page.append(StoredVersion(_listed(thread, loaded, one), key_id, len(stamps)))
                batch, size = [], 0
            if is_full:
                break
        return page, len(page) == len(stamps)

    async def _count_versions(self, message: str, versions_max: int) -> int:
        prefix = keyspace.versions(message)
        return len(await self._reads.keys(prefix, keyspace.after(prefix), limit=versions_max))


def _opened(
    one: Stored, thread: str, first: str, answer: bytes | KmsRefusedError | None
) -> record.OpenedVersion | NotOpened:
    """`answer`: of the key service, None if it was not asked."""
    if one.header is None or answer is None:
        return NotOpened(one.key, one.error)
    if isinstance(answer, KmsRefusedError):
        return NotOpened(one.key, answer.code, answer)
    try:
        return record.open_message(one.header, one.key, thread, first, answer)
    except record.RecordFormatError:
        return NotOpened(one.key, RECORD_MALFORMED)


def _not_opened(loaded: LoadedVersion) -> NotOpened:
    """The version without asking the key service."""
    return NotOpened(loaded.own.key, loaded.own.error or NOT_OPENED)


def _version(
    loaded: LoadedVersion, own: record.OpenedVersion | NotOpened, content: record.OpenedVersion | NotOpened | None
) -> CompleteVersion | NotOpened:
    """`content` is the opened `loaded.content`."""
    if isinstance(own, NotOpened):
        return own
    if isinstance(content, NotOpened):
        return content
    size = len(loaded.own.sealed)
    if content is None:
        stamp = loaded.own.key[-keyspace.STAMP_BYTES :].decode()
        return CompleteVersion(own.message, stamp, size, own.before)
    try:
        message = record.with_content(own, content)
    except record.RecordFormatError:
        return NotOpened(loaded.own.key, RECORD_MALFORMED)
    return CompleteVersion(message, own.content, size, own.before)


def _latest(thread: str, loaded: LoadedVersion, answers: Mapping[bytes, bytes | KmsRefusedError]) -> Message:
    """What a list shows of a version, from the answers of the key service by storage keys. As `_listed`."""
    own, content, first = loaded.own, loaded.content, loaded.first
    answer = answers.get(own.key)
    if isinstance(answer, bytes) and type(own.header) is record.MessageHeader:  # most messages have one version
        try:
            return record.open_first(own.header, own.key, thread, first, answer)
        except record.RecordFormatError:
            return _listed(thread, loaded, NotOpened(own.key, RECORD_MALFORMED))
    opened = _opened(own, thread, first, answer)
    version = None if content is None else _opened(content, thread, first, answers.get(content.key))
    return _listed(thread, loaded, _version(loaded, opened, version))


def _listed(thread: str, loaded: LoadedVersion, version: CompleteVersion | NotOpened) -> Message:
    """What a list shows. Of a version that does not open, nothing but its header, which is not verified. Raises
    RecordUnreadableError if the index is malformed."""
    if isinstance(version, CompleteVersion):
        return version.message
    header = loaded.own.header
    try:
        message, ts = keyspace.message_id_of(loaded.first), keyspace.ns_of(loaded.own.key)
    except ValueError as error:
        raise RecordUnreadableError(f"an index leads to {loaded.own.key.decode()}, which names no stamp") from error
    return Message(
        id=message,
        thread=thread,
        author=header.author if header is not None else "",
        ts=ts,
        deleted=header is not None and header.deleted,
        error=version.code,
    )


async def cancel(tasks: deque[asyncio.Task[T]]) -> None:
    """Ends the tasks and forgets them: the traceback of an error of one leads to the frame that has them."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    tasks.clear()


async def _chunks(*chunks: list[Message]) -> AsyncIterator[list[Message]]:
    for chunk in chunks:
        yield chunk


def _place(key: bytes, value: bytes) -> OrderEntry:
    try:
        return OrderEntry.parse(key, value)
    except ValueError as error:
        raise RecordUnreadableError(f"the index entry {key.decode()} is malformed") from error


def _content_key(records: bytes, raw: bytes) -> bytes:
    """The key of the record that has the content of this one; empty if that is the record itself."""
    try:
        header, _ = record.unpack_message(raw)
    except record.RecordFormatError:
        return b""
    return records + header.content.encode() if isinstance(header, record.LaterHeader) and header.content else b""


def _first_stamp(message: str) -> bytes:
    first = keyspace.parse_message_id(message)
    if first is None:
        raise MessageNotFoundError
    return first.raw
