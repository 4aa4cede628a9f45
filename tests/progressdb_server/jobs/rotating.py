"""Jobs over a store for a test, and what must hold of a thread after a rotation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import msgspec
import pytest

from minikms.api.errors import KmsRefusedError
from minikms.client import ReencryptItem
from progressdb_server.config import Retention, RotationSection
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import rotation
from progressdb_server.jobs.rotation import KeyRotation
from progressdb_server.jobs.runner import Kind
from progressdb_server.jobs.service import KEEP_ALL, Jobs, OldRows
from progressdb_server.jobs.states import Job
from progressdb_server.kms.provider import Provider
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Engine
from progressdb_server.store.model import Message, NewMessage, RegisteredBackup
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import TickingClock, disk, messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider

UNBOUNDED = RotationSection(records_per_second=0)


@dataclass
class Place:
    """What outlives a start of the server: the disk and the key service."""

    engine: Engine = field(default_factory=MemoryEngine)
    provider: Provider = field(default_factory=SealingProvider)
    clock: TickingClock = field(default_factory=TickingClock)
    boot: Callable[[], int] | None = None
    """The clock that nobody sets; None: `clock`, so that a test may let days pass."""
    settings: RotationSection = UNBOUNDED
    retention: Retention = KEEP_ALL
    exclusive: bool = True

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[tuple[Conversations, Jobs]]:
        async with opened(self.engine, self.provider, self.clock) as store:
            given = store, self.provider, self.settings, self.retention
            jobs = Jobs(*given, exclusive=self.exclusive, now_ns=self.clock, boot_ns=self.boot or self.clock)
            await jobs.start()
            try:
                yield store, jobs
            finally:
                await jobs.close()

    def run(self, body: Callable[[Conversations, Jobs], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with self.opened() as (store, jobs):
                await body(store, jobs)

        asyncio.run(whole())

    @property
    def keys(self) -> SealingProvider:
        assert isinstance(self.provider, SealingProvider)
        return self.provider


@contextmanager
def chunks_of(records: int) -> Iterator[None]:
    """Small chunks, so that a short thread has many."""
    before = rotation.CHUNK_RECORDS_MAX
    rotation.CHUNK_RECORDS_MAX = records  # type: ignore[misc]  # final in production
    try:
        yield
    finally:
        rotation.CHUNK_RECORDS_MAX = before  # type: ignore[misc]  # as above


async def write(store: Conversations, count: int, thread: str = "t") -> list[Message]:
    new = [NewMessage(author="ann", thread=thread, body={"n": n}) for n in range(count)]
    return [await store.messages.create(message) for message in new]


async def keys_of_records(store: Conversations, thread: str = "t") -> dict[str, str]:
    """Storage key → key id, of every record of the thread."""
    return {found.name: found.key_id async for chunk in store.rekeying.chunks(thread, 100) for found in chunk.records}


def record_key(message: str, thread: str = "t") -> bytes:
    """The storage key of the message's first version."""
    stamp = keyspace.parse_message_id(message)
    assert stamp is not None
    return keyspace.messages(thread) + stamp.raw


def mapped(store: Conversations, thread: str = "t") -> str:
    raw = disk(store).get(keyspace.key_map(thread))
    assert raw is not None
    return raw.decode()


def backups_of(store: Conversations, job: Job) -> dict[str, bytes]:
    """The records that the job kept, by their storage keys. A scan returns a bounded number of entries."""
    prefix = keyspace.replaced_records(job.id)
    kept: dict[str, bytes] = {}
    lower = prefix
    while entries := disk(store).scan(lower, keyspace.after(prefix), limit=SCAN_ENTRIES_MAX):
        kept |= {key[len(prefix) :].decode(): raw for key, raw in entries}
        lower = entries[-1][0] + b"\0"
    return kept


async def register(store: Conversations, path: str, created_ns: int) -> bytes:
    """A backup of the store that was begun at that time; the storage key of its entry."""
    key = keyspace.backup(created_ns)
    await store.writer.commit(Write([(key, msgspec.json.encode(RegisteredBackup(path, created_ns)))]))
    return key


async def check(store: Conversations, provider: Provider, expected: Sequence[Message], thread: str = "t") -> None:
    """Everything reads back as it was, none twice; everything is under the thread's key, the only active one."""
    assert await messages_of(store, thread, include_deleted=True) == list(expected)
    assert set((await keys_of_records(store, thread)).values()) == {mapped(store, thread)}
    page = await provider.list_keys(thread_id=thread, state="active", cursor=None, limit=None)
    assert [key.key_id for key in page.keys] == [mapped(store, thread)]


def begin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is due begins within milliseconds."""
    for kind in (Kind, KeyRotation, OldRows):
        monkeypatch.setattr(kind, "first_s", 0.01)
        monkeypatch.setattr(kind, "every_s", 0.01)


class Gate:
    """Holds a provider's re-encryption back, from its nth batch on."""

    def __init__(self, provider: SealingProvider, batches: int) -> None:
        self.reached = asyncio.Event()
        self._open = asyncio.Event()
        self._left = batches
        self._real = provider.reencrypt_batch
        provider.reencrypt_batch = self._reencrypt_batch  # type: ignore[method-assign]  # the hook

    async def _reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[bytes | KmsRefusedError]:
        if self._left <= 0:
            self.reached.set()
            await self._open.wait()
        self._left -= 1
        return await self._real(from_key_id, to_key_id, items, request_id=request_id)

    def open(self) -> None:
        self._open.set()
