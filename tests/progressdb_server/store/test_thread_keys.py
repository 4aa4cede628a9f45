"""One key per thread: races, switches, retired keys; and the memory of the key service's epoch."""

import asyncio
import json
from collections.abc import Iterable

import pytest
from msgspec.structs import replace

from minikms import api
from minikms.api.errors import KmsRefusedError, KmsUnavailableError, refusal
from minikms.client import EncryptItem
from progressdb_server.conversations import whole as room
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import keyspace, record
from progressdb_server.store import sealer as sealing
from progressdb_server.store import writer as writing
from progressdb_server.store.check import repair
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.epoch import EpochMemory, RestoredError, SeenState, audit_head, seen_state
from progressdb_server.store.model import (
    KeyServiceRefusedError,
    NewMessage,
    RecordUnreadableError,
    StoreUnavailableError,
    ThreadKeyDestroyedError,
)
from progressdb_server.store.offline import LocalEntries
from tests.progressdb_server.store.memory_engine import MemoryEngine
from tests.progressdb_server.store.opened_store import becomes, disk, keys_of, messages_of, opened, with_store
from tests.progressdb_server.store.sealing_provider import SealingProvider, to_seal


async def seen(store: Conversations) -> SeenState:
    """What the store remembers of the key service."""
    found = await seen_state(store.reads)
    assert found is not None
    return found


def new(body: object, thread: str = "t") -> NewMessage:
    return NewMessage(author="ann", thread=thread, body=body)


async def switch_key(store: Conversations, provider: SealingProvider, thread: str) -> str:
    """What a rotation does first: a new key that replaces the old one, then the map."""
    old = disk(store).get(keyspace.key_map(thread))
    assert old is not None
    handle = await provider.create_dek_for_thread(thread, replaces=old.decode())
    await store.writer.commit(
        Write([(keyspace.key_map(thread), handle.key_id.encode())], [(keyspace.key_map(thread), old)])
    )
    return handle.key_id


async def test_a_burst_of_first_messages_makes_one_key() -> None:
    provider = SealingProvider()
    provider.delay_s = 0.005
    async with opened(provider=provider) as store:
        await asyncio.gather(*[store.messages.create(new(n)) for n in range(30)])
        assert provider.calls["create"] == 1
        assert len(await messages_of(store, "t")) == 30
        assert await keys_of(store, "kms:map:") == ["kms:map:thread:t"]


async def test_the_loser_of_a_race_retires_its_key_and_writes_under_the_winners() -> None:
    class Overtaken(SealingProvider):
        """Somebody else founds the thread while our key is being made."""

        async def create_dek_for_thread(
            self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
        ) -> api.CreateDekAnswer:
            handle = await super().create_dek_for_thread(thread_id)
            if len(self.keys) == 1:
                await rival.messages.create(new("winner", thread_id))
            return handle

    provider = Overtaken()
    rival: Conversations
    async with opened(provider=provider) as store:
        rival = Conversations(disk(store), provider)
        await store.messages.create(new("loser"))
        await rival.writer.close()
        assert sorted(m.value for m in await messages_of(store, "t")) == ["loser", "winner"]
        assert provider.keys_of("t") == [(disk(store).get(b"kms:map:thread:t") or b"").decode()]
        assert len(provider.retired) == 1


class FullDisk(MemoryEngine):
    """Opens, reads and reopens, but takes no write while it is `full`."""

    full = False

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        if self.full:
            raise EngineUnavailableError
        super().write(puts)


@pytest.mark.parametrize("thread", ["", "t"], ids=["new thread", "named thread"])
async def test_refused_creates_leave_no_key_that_nobody_uses(thread: str) -> None:
    """The one exception: the write that finds the disk full may have been stored, so its key stays."""
    provider, engine = SealingProvider(), FullDisk()
    async with opened(engine, provider) as store:
        engine.full = True
        for _ in range(30):
            with pytest.raises(StoreUnavailableError):
                await store.messages.create(new("refused", thread))
            with pytest.raises(StoreUnavailableError):
                await store.threads.create(author="ann", title="refused")
            async with asyncio.timeout(60):
                while not store.writer.available:
                    await asyncio.sleep(0.001)
        assert len(provider.keys) == 1
        engine.full = False
        await store.messages.create(new("taken", thread))
        assert len(provider.keys) == 2


async def test_a_create_that_the_queue_refuses_makes_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        monkeypatch.setattr(writing, "QUEUE_WRITES_MAX", 0)
        with pytest.raises(StoreUnavailableError, match="too many writes"):
            await store.messages.create(new("refused"))
        assert not provider.keys


async def test_a_key_that_is_made_before_the_queue_refuses_is_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    class FillsTheQueue(SealingProvider):
        async def create_dek_for_thread(
            self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
        ) -> api.CreateDekAnswer:
            monkeypatch.setattr(writing, "QUEUE_WRITES_MAX", 0)
            return await super().create_dek_for_thread(thread_id)

    provider = FillsTheQueue()
    async with opened(provider=provider) as store:
        with pytest.raises(StoreUnavailableError, match="too many writes"):
            await store.messages.create(new("refused"))
        assert provider.keys_of("t", active=False)
        assert not provider.keys_of("t")


class SlowAnswers(SealingProvider):
    """Seals at once and answers later: what changes in between is not the provider's to notice."""

    async def encrypt(
        self, key_id: str, plaintext: bytes, *, aad: bytes, thread_id: str | None, request_id: str | None = None
    ) -> bytes:
        sealed = self._seal(to_seal(key_id, plaintext, aad, thread_id or ""))
        await self._answer("encrypt")
        return sealed


@pytest.mark.parametrize("provider", [SealingProvider(), SlowAnswers()], ids=["refused", "sealed before"])
async def test_no_record_is_stored_under_a_key_switched_while_it_was_sealed(provider: SealingProvider) -> None:
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        provider.holds = {"encrypt"}
        writing = [asyncio.create_task(store.messages.create(new(n))) for n in range(1, 6)]
        while provider.held < 5:
            await asyncio.sleep(0)
        provider.holds = set()
        current = await switch_key(store, provider, "t")
        provider.go_on.set()
        await asyncio.gather(*writing)
        keys = await keys_of(store, "thread:t:msg:")
        used = [record.unpack_sealed(disk(store).get(key.encode()) or b"")[0] for key in keys]
        assert used[1:] == [current] * 5
        assert sorted(m.value for m in await messages_of(store, "t")) == list(range(6))


async def test_writes_wait_from_the_old_keys_retirement_to_the_switch() -> None:
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        old = provider.keys_of("t")[0]
        with store.sealer.switching("t"):
            handle = await provider.create_dek_for_thread("t", replaces=old)
            writing = asyncio.create_task(store.messages.create(new(1)))
            await asyncio.sleep(0.05)
            assert not writing.done()
            await store.writer.commit(Write([(keyspace.key_map("t"), handle.key_id.encode())]))
        await writing
        assert [m.value for m in await messages_of(store, "t")] == [0, 1]
        assert store.metrics.key_waits > 0
        assert provider.keys_of("t") == [handle.key_id], "no other key was made"


async def test_a_switch_that_does_not_end_is_reported_as_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has failed, the next write gives the thread another key."""
    monkeypatch.setattr(sealing, "KEY_SWITCH_S_MAX", 0.05)
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        with store.sealer.switching("t"):
            provider.retired.update(provider.keys)
            with pytest.raises(StoreUnavailableError):
                await store.messages.create(new(1))
            assert len(provider.keys) == 1
        await store.messages.create(new(2))
        assert [m.value for m in await messages_of(store, "t")] == [0, 2]


async def test_a_destroyed_key_makes_its_records_unreadable_and_no_others() -> None:
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        gone = await store.messages.create(new(0))
        other = await store.messages.create(new(1, "other"))
        provider.destroyed.update(provider.keys_of("t"))
        with pytest.raises(RecordUnreadableError):
            await store.reading.message(gone.id)
        assert [message.error for message in await messages_of(store, "t")] == ["key_destroyed"]
        with pytest.raises(ThreadKeyDestroyedError):
            await store.messages.create(new(2))
        assert await store.reading.message(other.id) == other
        assert len(provider.keys) == 2, "no other key is made for a destroyed one"


@pytest.mark.parametrize(("code", "stays"), [("forbidden", True), ("key_not_found", True), ("key_unreadable", False)])
async def test_a_refusal_that_stays_is_no_unavailable_key_service(code: str, stays: bool) -> None:
    """A client that is sent a 503 tries for ever what an operator has to mend."""

    class Refusing(SealingProvider):
        refused = False

        def _seal(self, item: EncryptItem) -> bytes:
            if self.refused:
                raise refusal(code, "no")
            return super()._seal(item)

    provider = Refusing()
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        provider.refused = True
        with pytest.raises(KeyServiceRefusedError if stays else StoreUnavailableError, match=code):
            await store.messages.create(new(1))


async def test_a_key_whose_sealing_fails_is_retired_and_leaves_nothing() -> None:
    class Refusing(SealingProvider):
        async def encrypt_batch(self, items: object) -> list[bytes | KmsRefusedError]:
            return [refusal("key_unreadable", "damaged")] * 2

    provider = Refusing()
    async with opened(provider=provider) as store:
        with pytest.raises(StoreUnavailableError):
            await store.messages.create(new(0))
        assert provider.keys_of("t") == []
        assert await keys_of(store, "thread:") == []


async def test_the_cache_of_threads_is_bounded_and_an_evicted_one_is_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sealing, "THREADS_CACHED_MAX", 3)
    monkeypatch.setattr(sealing, "WRITERS_CACHED_MAX", 2)
    async with opened() as store:
        for thread in range(6):
            for author in range(4):
                await store.messages.create(NewMessage(author=f"u{author}", thread=f"t{thread}", body=1))
        misses = store.metrics.cache_misses
        for thread in (3, 4, 5):
            state = await store.sealer.thread(f"t{thread}")
            assert state is not None and len(state.writers) <= 2
        assert store.metrics.cache_misses == misses
        assert await store.sealer.thread("t2") is not None
        assert store.metrics.cache_misses == misses + 1
        assert len(await keys_of(store, "index:writer:")) == 24


# --- the epoch of the key service ---------------------------------------------------------------------------------
def status(epoch: int, seq: int, sig: str = "", keyring: str = "one", durable: int | None = None) -> api.StatusAnswer:
    """`durable`: the last line on the disk; by default the head."""
    last = seq if durable is None else durable
    on_disk = api.DurableStatus(last, sig or f"s{last}")
    audit = api.AuditStatus(head=api.HeadStatus(seq, sig or f"s{seq}"), durable=on_disk)
    return api.StatusAnswer(status="ok", epoch=epoch, keyring_id=keyring, audit=audit)


async def judge(memory: EpochMemory, answer: api.StatusAnswer, *, accept_restore: bool = False) -> None:
    async def ask() -> api.StatusAnswer:
        return answer

    await memory.observe(ask, accept_restore=accept_restore)


async def test_an_answer_that_another_server_overtakes_is_not_an_older_one() -> None:
    async with opened() as store:
        one, another = EpochMemory(store.reads, store.writer), EpochMemory(store.reads, store.writer)
        await judge(one, status(5, 100))

        async def ask() -> api.StatusAnswer:
            await judge(another, status(6, 101))
            return status(5, 100)

        await one.observe(ask)
        assert (await seen(store)).epoch == 6


async def test_an_older_key_service_is_refused_unless_the_restore_is_accepted() -> None:
    async with opened() as store:
        memory = EpochMemory(store.reads, store.writer)
        await judge(memory, status(5, 100))
        await judge(memory, status(6, 200, durable=90))
        await judge(memory, status(6, 150, durable=100))
        for older, why in [
            (status(5, 300), "epoch 5, this store has seen 6"),
            (status(6, 99), "ends at line 99, this store has seen line 100"),
            (status(6, 100, "other"), "removed or replaced"),
            (status(7, 300, keyring="two"), "another keyring"),
        ]:
            with pytest.raises(RestoredError, match=why) as refused:
                await judge(memory, older)
            assert "--accept-restore" in str(refused.value)
        assert (await seen(store)).epoch == 6
        await judge(memory, status(3, 10), accept_restore=True)
        await judge(memory, status(3, 11))
        assert (await seen(store)).epoch == 3


async def test_an_audit_line_counts_only_once_it_is_on_the_disk() -> None:
    """The key service may lose its newest lines with the machine's power; that is not a truncated log."""
    async with opened() as store:
        memory = EpochMemory(store.reads, store.writer)
        await judge(memory, status(5, 200, durable=90))
        await judge(memory, status(6, 90))
        with pytest.raises(RestoredError):
            await judge(memory, status(7, 89))


async def test_the_last_durable_line_is_remembered_at_a_clean_stop() -> None:
    """So nobody cuts the lines since the last look unseen. A key service that has ended first holds nothing up."""

    class Going(SealingProvider):
        answer = status(5, 100)

        async def status(self) -> api.StatusAnswer:
            if self.answer.status == "away":
                raise KmsUnavailableError("away")
            return self.answer

    for last, line in (status(5, 130, durable=129), 129), (replace(status(5, 200), status="away"), 100):
        engine, provider = MemoryEngine(), Going()
        async with opened(engine, provider) as store:
            await store.start()
            provider.answer = last
        remembered = engine.get(keyspace.EPOCH)
        assert remembered is not None and json.loads(remembered)["head_seq"] == line


async def test_the_remembered_line_has_the_form_that_the_key_service_accepts() -> None:
    async with opened() as store:
        assert await audit_head(store.reads) == ""
        await judge(EpochMemory(store.reads, store.writer), status(5, 100, "sig"))
        assert await audit_head(store.reads) == "100:sig"


async def test_what_is_remembered_but_can_not_be_read_or_compared_is_refused_too() -> None:
    """A memory that is damaged, and a key service that no longer tells its epoch, pass nobody off as the right one."""
    async with opened() as store:
        memory = EpochMemory(store.reads, store.writer)
        await judge(memory, api.StatusAnswer(status="ok"))
        await judge(memory, status(5, 100))
        with pytest.raises(RestoredError, match="does not report its epoch"):
            await judge(memory, api.StatusAnswer(status="ok"))
        disk(store).write([(keyspace.EPOCH, b'{"keyring_id":"\xff"}')])
        for ask in (lambda: judge(memory, status(5, 100)), lambda: audit_head(store.reads)):
            with pytest.raises(RestoredError, match="damaged"):
                await ask()
        await judge(memory, status(5, 100), accept_restore=True)
        assert (await seen(store)).epoch == 5


async def test_a_restored_key_service_stops_the_start() -> None:
    """A provider without epochs is not judged."""
    engine, provider = MemoryEngine(), SealingProvider()
    answer = api.StatusAnswer(status="ok")

    async def answers() -> api.StatusAnswer:
        return answer

    provider.status = answers  # type: ignore[method-assign]  # what a key service of another age says

    for known in (answer, status(5, 1)):
        answer = known
        async with opened(engine, provider) as store:
            await store.start()
    answer = status(4, 1)
    async with opened(engine, provider) as store:
        with pytest.raises(RestoredError):
            await store.start()
        await store.start(accept_restore=True)
        await store.messages.create(new(1))


async def test_an_older_key_service_that_appears_later_gets_nothing_to_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "EPOCH_S", 0.01)
    provider = SealingProvider()
    answer = status(5, 1)

    async def answers() -> api.StatusAnswer:
        return answer

    provider.status = answers  # type: ignore[method-assign]  # what a key service of another age says
    async with opened(provider=provider) as store:
        await store.start()
        await store.messages.create(new(1))
        answer = status(4, 1)
        await becomes(lambda: store.sealer.halted is not None)
        calls = provider.calls.total()
        for thread in ("t", "another"):
            with pytest.raises(StoreUnavailableError, match="restart the server once with --accept-restore"):
                await store.messages.create(new(2, thread))
        assert provider.calls.total() == calls
        answer = status(6, 1)
        await becomes(lambda: store.sealer.halted is None)
        await store.messages.create(new(3))


# --- retired keys -----------------------------------------------------------------------------------------------


async def test_a_thread_whose_key_is_retired_gets_another_at_its_next_write() -> None:
    """The writes of one moment share the new key, and what the old one sealed stays readable."""
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        old = provider.keys_of("t")[0]
        provider.retired.add(old)
        provider.delay_s = 0.002
        await asyncio.gather(*(store.messages.create(new(number)) for number in range(1, 20)))
        [renewed] = provider.keys_of("t")
        assert renewed != old
        assert disk(store).get(keyspace.key_map("t")) == renewed.encode()
        assert sorted(m.value for m in await messages_of(store, "t")) == list(range(20))
        assert store.metrics.keys_renewed == 1


async def test_an_interrupted_renewal_is_made_at_the_next_write() -> None:
    class Interrupted(SealingProvider):
        async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
            raise KmsUnavailableError("the key service is down")

    provider = Interrupted()
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        old = provider.keys_of("t")[0]
        provider.retired.add(old)
        create, provider.down = store.messages.create, True
        with pytest.raises(StoreUnavailableError):
            await create(new(1))
        provider.down = False
        await create(new(2))
        await create(new(3))
        assert [m.value for m in await messages_of(store, "t")] == [0, 2, 3]
        assert len(provider.keys_of("t")) == 1


async def test_every_kind_of_write_gives_a_thread_another_key_for_a_retired_one() -> None:
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        message = await store.messages.create(new(0))
        for write in (
            lambda: store.messages.update(message.id, author="ann", body=1, role=None, reply_to=None),
            lambda: store.messages.set_reaction(message.id, "bob", "+"),
            lambda: store.messages.remove_reaction(message.id, "bob"),
            lambda: store.messages.delete(message.id, author="ann"),
            lambda: store.threads.update("t", author="ann", title="new"),
            lambda: store.threads.delete("t", author="ann", by="ann"),
        ):
            provider.retired.update(provider.keys)
            await write()
        assert len(provider.keys_of("t")) == 1
        assert store.metrics.keys_renewed == 6


async def test_an_older_store_whose_keys_were_rotated_since_takes_writes() -> None:
    """The newer key of the thread, which that store never named, encrypts nothing."""
    engine, provider = MemoryEngine(), SealingProvider()
    async with opened(engine, provider) as store:
        await store.messages.create(new(0))
    async with opened(engine, provider) as store:
        old = provider.keys_of("t")[0]
        newer = (await provider.create_dek_for_thread("t", replaces=old)).key_id
        await store.messages.create(new(1))
        assert [m.value for m in await messages_of(store, "t")] == [0, 1]
        assert await store.rekeying.key_of_thread("t") not in (old, newer)


async def test_a_message_into_a_thread_that_has_lost_its_map_is_refused() -> None:
    """It makes one key at most."""
    provider = SealingProvider()
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        await store.writer.commit(Write(((keyspace.key_map("t"), None),)))
        store.sealer.forget()
        async with asyncio.timeout(20):
            with pytest.raises(RecordUnreadableError, match="has no key"):
                await store.messages.create(new(1))
        assert len(provider.keys) <= 2


def test_a_lost_map_that_is_rebuilt_after_a_renewal_takes_writes() -> None:
    engine, provider = MemoryEngine(), SealingProvider()

    async def renewed(store: Conversations) -> None:
        await store.messages.create(new(0))
        provider.retired.update(provider.keys)
        await store.messages.create(new(1))

    async def repaired(store: Conversations) -> None:
        await store.messages.create(new(2))
        assert [m.value for m in await messages_of(store, "t")] == [0, 1, 2]

    with_store(renewed, engine, provider)
    engine.reopen()
    engine.write([(keyspace.key_map("t"), None)])
    engine.sync()
    assert [finding.kind for finding in asyncio.run(repair(LocalEntries(engine)))[0]] == ["keyless"]
    with_store(repaired, engine, provider)


async def test_new_keys_that_are_retired_at_once_are_not_made_for_ever() -> None:
    class Broken(SealingProvider):
        async def create_dek_for_thread(
            self, thread_id: str, *, replaces: str | None = None, request_id: str | None = None
        ) -> api.CreateDekAnswer:
            made = await super().create_dek_for_thread(thread_id, replaces=replaces, request_id=request_id)
            if len(self.keys) > 1:
                self.retired.add(made.key_id)
            return made

    provider = Broken()
    async with opened(provider=provider) as store:
        await store.messages.create(new(0))
        provider.retired.update(provider.keys)
        with pytest.raises(StoreUnavailableError):
            await store.messages.create(new(1))
        assert len(provider.keys) == 1 + sealing.RENEWALS_MAX


async def test_a_faulty_key_service_is_judged_and_its_log_not_remembered() -> None:
    """While it can't write its audit log, the newest lines may never be durable; and a start waits for it."""
    async with opened() as store:
        memory = EpochMemory(store.reads, store.writer)
        await judge(memory, status(5, 100))
        await judge(memory, replace(status(5, 200), status="audit_unavailable", reason="no space"))
        assert (await seen(store)).head_seq == 100
        with pytest.raises(RestoredError):
            await judge(memory, replace(status(4, 200), status="audit_unavailable"))

    class Faulty(SealingProvider):
        async def status(self) -> api.StatusAnswer:
            return api.StatusAnswer(status="audit_unavailable", reason="no space")

    async with opened(provider=Faulty()) as store:
        with pytest.raises(StoreUnavailableError, match="can't serve: no space"):
            await store.start()
