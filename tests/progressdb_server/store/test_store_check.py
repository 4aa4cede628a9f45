"""`progressdb check` finds what is wrong and `--repair` rebuilds what follows from the records."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.errors import KmsRefusedError, refusal
from minikms.client import DecryptItem
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.table import parse
from progressdb_server.store import keyspace, offline
from progressdb_server.store.check import Checker, Problem, repair
from progressdb_server.store.engine import Counters, Reader
from progressdb_server.store.model import FormatError, Idempotency, NewMessage, StoreUnavailableError
from progressdb_server.store.offline import LocalEntries, LocalView
from progressdb_server.store.rocks.engine import RocksEngine, RocksReader
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import messages_of, opened, threads_of, with_store
from tests.progressdb_server.store.sealing_provider import SealingProvider


async def populate(store: Conversations, name: str = "t") -> None:
    """Something of everything: edits, tombstones, reactions, a deleted thread, odd authors, retried creates."""
    made = []
    for number in range(6):
        new = NewMessage(author=f"a:{number % 3}", thread=f"{name}{number % 2}", body=number)
        made.append(await store.messages.create(new, idempotency=Idempotency("scope", f"{name}{number}")))
    await store.messages.update(made[0].id, author=None, body="new", role=None, reply_to=None)
    await store.messages.set_reaction(made[1].id, "bob", "x")
    await store.messages.delete(made[2].id, author=None)
    await store.threads.create(author="ann", title="empty")
    await store.messages.create(NewMessage(author="ann", body=1))
    await store.threads.delete(f"{name}1", author=None, by="admin")


async def findings(reader: Reader, provider: SealingProvider | None) -> list[Problem]:
    return [finding async for finding in Checker(LocalView(reader), provider, parse).run()]


def populated() -> tuple[MemoryEngine, SealingProvider]:
    engine, provider = MemoryEngine(), SealingProvider()
    with_store(populate, engine, provider)
    engine.reopen()
    return engine, provider


def everything(engine: MemoryEngine) -> dict[bytes, bytes]:
    return dict(engine.scan(b"", b"\xff", limit=4000))


@pytest.mark.parametrize("bytes_max", [1, offline.WALK_BYTES_MAX])
def test_a_sound_store_has_no_findings_and_everything_is_counted(
    monkeypatch: pytest.MonkeyPatch, bytes_max: int
) -> None:
    """Also if each look-up and each page is as short as can be."""
    monkeypatch.setattr(offline, "WALK_BYTES_MAX", bytes_max)
    engine, provider = populated()
    checker = Checker(LocalView(engine), provider)

    async def run() -> list[Problem]:
        return [finding async for finding in checker.run()]

    assert asyncio.run(run()) == []
    assert checker.counts == {
        "threads": 4, "messages": 11, "versions": 11, "order": 8, "indexes": 17, "maps": 4, "idempotency": 6
    }  # fmt: skip


def test_for_a_user_who_may_not_decrypt_no_record_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, provider = populated()

    async def refused(items: Sequence[DecryptItem], *, request_id: str | None = None) -> list[bytes | KmsRefusedError]:
        return [refusal("forbidden", "this principal does not have the role decrypt") for _ in items]

    monkeypatch.setattr(provider, "decrypt_batch", refused)
    with pytest.raises(StoreUnavailableError, match=r"does not let this user decrypt.*the role decrypt"):
        asyncio.run(findings(engine, provider))


def first(engine: MemoryEngine, prefix: str) -> bytes:
    return engine.scan(prefix.encode(), b"\xff", limit=1)[0][0]


Damage = Callable[[MemoryEngine], tuple[bytes, bytes | None]]
DAMAGES: dict[str, tuple[str, Damage]] = {
    "a key of no space": ("unknown", lambda e: (b"foreign:1", b"x")),
    "a thread key of no kind": ("unknown", lambda e: (b"thread:t0:other", b"x")),
    "an index of no kind": ("unknown", lambda e: (b"index:other:t0", b"x")),
    "a record of an unknown version": ("damaged", lambda e: (first(e, "thread:t0:msg:"), b"\x09rest")),
    "a record cut short": ("damaged", lambda e: (k := first(e, "thread:t0:msg:"), (e.get(k) or b"")[:20])),
    "a stamp that is none": ("damaged", lambda e: (b"thread:t0:msg:now", b"x")),
    "a retried create that does not parse": ("damaged", lambda e: (first(e, "idem:"), b"\xff")),
    "a job's row that does not parse": ("damaged", lambda e: (b"job:job-1", b"{")),
    "a flipped bit in a sealed part": (
        "unreadable",
        lambda e: (k := first(e, "thread:t0:msg:"), (v := e.get(k) or b"")[:-1] + bytes((v[-1] ^ 1,))),
    ),
    "metadata of another thread": ("unreadable", lambda e: (b"thread:t0:meta", e.get(b"thread:t1:meta"))),
    "a record copied to another place": (
        "unreadable",
        lambda e: (b"thread:t0:msg:" + b"0" * 20 + b"-000001", e.get(first(e, "thread:t0:msg:"))),
    ),
    "a thread without metadata": ("orphaned", lambda e: (b"thread:t0:meta", None)),
    "a thread without a key map": ("keyless", lambda e: (b"kms:map:thread:t0", None)),
    "a map to a key that the key service does not have": ("keyless", lambda e: (b"kms:map:thread:t0", b"k_gone")),
    "a map that is no text": ("damaged", lambda e: (b"kms:map:thread:t0", b"\xff\xfe")),
    "a memory of the key service that does not parse": ("damaged", lambda e: (keyspace.EPOCH, b"{")),
    "an empty map": ("damaged", lambda e: (b"kms:map:thread:t0", b"")),
    "a version entry that is missing": ("unindexed", lambda e: (first(e, "version:msg:"), None)),
    "an order entry that is missing": ("unindexed", lambda e: (first(e, "index:order:t0:"), None)),
    "a writer entry that is missing": ("unindexed", lambda e: (first(e, "index:writer:t0:"), None)),
    "an author entry that is missing": ("unindexed", lambda e: (first(e, "index:author:"), None)),
    "a created entry that is missing": ("unindexed", lambda e: (first(e, "index:created:"), None)),
    "a deleted thread that is not closed": ("unindexed", lambda e: (b"index:closed:t1", None)),
    "a version entry to nothing": ("dangling", lambda e: (first(e, "version:msg:")[:-1] + b"9", b"t0")),
    "an order entry to an older version": ("dangling", lambda e: (first(e, "index:order:t0:"), b"")),
    "an order entry without a message": ("dangling", lambda e: (b"index:order:t0:" + b"0" * 20 + b"-000001", b"")),
    "an index entry of an unknown thread": ("dangling", lambda e: (b"index:writer:gone:ann", b"")),
    "a living thread that is closed": ("dangling", lambda e: (b"index:closed:t0", b"")),
    "counters that do not parse": ("miscounted", lambda e: (keyspace.STATE, b"\xff")),
    "counters with a stamp of 21 digits": ("miscounted", lambda e: (keyspace.STATE, b"\x95\1\1\0\0\xcc\xc8")),
    "a wrong count": ("miscounted", lambda e: (keyspace.STATE, msgspec.msgpack.encode(Counters(1, 1, 10**19, 0)))),
}
BEYOND_REPAIR = {"unknown", "damaged", "unreadable", "orphaned"}


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_damage_is_found_and_repaired_where_it_can_be(name: str) -> None:
    kind, damage = DAMAGES[name]
    engine, provider = populated()
    sound = everything(engine)
    key, value = damage(engine)
    engine.write([(key, value)])
    found = asyncio.run(findings(engine, provider))
    assert kind in {finding.kind for finding in found}
    if kind in BEYOND_REPAIR or name.startswith("a map to a key"):
        before = everything(engine)
        asyncio.run(repair(LocalEntries(engine)))
        records = [k for k in before if k.startswith((b"thread:", b"kms:map:"))]
        assert {k: engine.get(k) for k in records} == {k: before[k] for k in records}
        return
    fixed, left = asyncio.run(repair(LocalEntries(engine)))
    assert fixed
    assert left == []
    assert asyncio.run(findings(engine, provider)) == []
    if kind != "miscounted":
        assert everything(engine) == sound


@settings(max_examples=30)
@given(st.randoms(use_true_random=False))
def test_every_index_is_rebuilt_from_the_records(random: object) -> None:
    engine, _ = _POPULATED
    sound = everything(engine)
    lost = [k for k in sound if k.startswith((b"index:", b"version:", b"kms:map:"))]
    dropped = random.sample(lost, random.randint(1, len(lost)))  # type: ignore[attr-defined]  # Hypothesis's Random
    try:
        engine.write([(key, None) for key in dropped])
        _, left = asyncio.run(repair(LocalEntries(engine)))
        assert left == []
        assert everything(engine) == sound
    finally:
        engine.write(sound.items())


_POPULATED = populated()


def test_a_repaired_store_serves_as_before() -> None:
    engine, provider = populated()

    async def shown(store: Conversations) -> object:
        return [
            await messages_of(store, "t0", include_deleted=True),
            await threads_of(store, None, include_deleted=True),
            await store.stats(),
        ]

    before = with_store(shown, engine, provider)
    engine.reopen()
    engine.write([(k, None) for k in everything(engine) if k.startswith((b"index:", b"version:"))])
    asyncio.run(repair(LocalEntries(engine)))
    assert with_store(shown, engine, provider) == before


async def test_it_walks_beside_a_running_server_and_sees_one_moment(tmp_path: Path) -> None:
    path, provider = str(tmp_path / "db"), SealingProvider()

    async with opened(RocksEngine(path), provider) as store:
        await populate(store)
        reader = RocksReader(path)
        try:
            walk = Checker(LocalView(reader), provider).run()
            writing = [asyncio.create_task(populate(store, f"n{number}-")) for number in range(5)]
            assert [finding async for finding in walk] == []
            await asyncio.gather(*writing)
            reader.refresh()
            assert await findings(reader, provider) == []
            assert reader.get(b"thread:n4-1:meta") is not None
        finally:
            reader.close()


def test_after_damaged_counters_were_rebuilt_no_stamp_is_given_out_twice() -> None:
    engine, provider = populated()
    engine.write([(keyspace.STATE, b"\xff")])
    engine.sync()
    with pytest.raises(FormatError, match="check --repair"):
        with_store(populate, engine, provider)
    asyncio.run(repair(LocalEntries(engine)))
    newest = max(key[-27:] for key, _ in engine.scan(b"thread:", b"thread;", limit=4000) if b":msg:" in key)

    async def body(store: Conversations) -> None:
        made = await store.messages.create(NewMessage(author="ann", thread="t0", body=1))
        assert made.id > f"msg-{newest.decode().lstrip('0')[:19]}"
        assert await findings(engine, provider) == []

    with_store(body, engine, provider, now_ns=lambda: 7)  # a clock that is far behind
