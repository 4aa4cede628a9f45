"""Real processes: a server that is killed at every write of its job, a key service that is killed meanwhile; writers,
editors and readers go on. In the end every version that was acknowledged is there, in order, none twice."""

import asyncio
import random
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from progressdb_server.config import RotationSection
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs import rotation
from progressdb_server.jobs.service import Jobs
from progressdb_server.kms.provider import RemoteProvider
from progressdb_server.store import keyspace
from progressdb_server.store.check import Checker
from progressdb_server.store.model import Message, NewMessage, StoreUnavailableError, json_text
from progressdb_server.store.offline import LocalView
from progressdb_server.store.rocks.engine import RocksEngine
from tests.harness.live_daemon import LiveDaemon
from tests.harness.scripts import interpreter_words
from tests.progressdb_server.jobs.killed_server import THREAD
from tests.progressdb_server.jobs.rotating import backups_of, keys_of_records, mapped
from tests.progressdb_server.store.opened_store import disk, messages_of, versions_of

SERVER = interpreter_words("tests.progressdb_server.jobs.killed_server")
Acknowledged = dict[str, list[Message]]


@asynccontextmanager
async def served(directory: Path, socket: Path, rate: int = 0) -> AsyncIterator[tuple[Conversations, Jobs]]:
    """The store and its jobs in this process."""
    provider = RemoteProvider(socket)
    store = Conversations(RocksEngine(str(directory / "db")), provider)
    jobs = Jobs(store, provider, RotationSection(records_per_second=rate), exclusive=True)
    try:
        yield store, jobs
    finally:
        await jobs.close()
        await store.close()
        await provider.close()


async def fill(directory: Path, socket: Path, records: int) -> Acknowledged:
    acknowledged: Acknowledged = defaultdict(list)
    async with served(directory, socket) as (store, _):
        for start in range(0, records, 100):
            new = [NewMessage("ann", THREAD, body={"n": n}) for n in range(start, min(start + 100, records))]
            for made in await asyncio.gather(*[store.messages.create(message) for message in new]):
                acknowledged[made.id].append(made)
    return acknowledged


async def verify(directory: Path, socket: Path, acknowledged: Acknowledged) -> None:
    async with served(directory, socket) as (store, jobs):
        listed = await messages_of(store, THREAD, include_deleted=True)
        assert [message.id for message in listed] == sorted({message.id for message in listed})
        assert acknowledged.keys() <= {message.id for message in listed}
        for message, versions in acknowledged.items():
            stored = await versions_of(store, message)
            assert stored[: len(versions)] == versions
            assert len(stored) <= len(versions) + 1, "one more may have been on its way"

        provider = RemoteProvider(socket)
        assert [finding async for finding in Checker(LocalView(disk(store)), provider).run()] == []
        active = await provider.list_keys(thread_id=THREAD, state="active")
        await provider.close()
        (job,) = [job async for page in jobs.table.pages() for job in page]
        assert (job.state, job.failed) == ("done", 0)
        assert [key.key_id for key in active.keys] == [job.new_key]
        assert set((await keys_of_records(store, THREAD)).values()) == {mapped(store, THREAD)} == {job.new_key}
        kept = backups_of(store, job)
        assert len(kept) == job.backups == job.done
        lower, upper = keyspace.records(THREAD)
        assert all(lower <= key.encode() < upper for key in kept)


def kill_at_every_write(directory: Path, records: int, chunk: int) -> int:
    """How many servers were killed."""
    with LiveDaemon(directory) as daemon:
        acknowledged = asyncio.run(fill(directory, daemon.socket, records))
        command = [sys.executable, *SERVER, str(directory), str(daemon.socket), str(chunk)]
        killed = 0
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as zygote:
            assert zygote.stdin is not None and zygote.stdout is not None
            done = False
            while not done:
                # Each write is made once, and each is once the last thing a server does, or does not come to.
                for order in ("before 1", "after 1"):
                    zygote.stdin.write(order.encode() + b"\n")
                    zygote.stdin.flush()
                    for line in zygote.stdout:
                        told = msgspec.json.decode(line)
                        if "id" in told:
                            message = msgspec.convert(told, Message)
                            message.body = json_text(message.body)
                            acknowledged[message.id].append(message)
                        elif "state" in told:
                            assert told["state"] == "done"
                            done = True
                        else:
                            assert told["ended"] == (0 if done else -signal.SIGKILL)
                            killed += not done
                            break
                    if done:
                        break
            zygote.stdin.close()
            assert zygote.wait() == 0
        asyncio.run(verify(directory, daemon.socket, acknowledged))
    return killed


def test_a_server_killed_at_every_write_of_a_rotation_loses_nothing(tmp_path: Path) -> None:
    """It repeats nothing either."""
    assert kill_at_every_write(tmp_path, 64, 8) >= 2 * (64 // 8 + 4)


@pytest.mark.torture
def test_a_server_killed_at_every_write_of_a_long_rotation_loses_nothing(tmp_path: Path) -> None:
    """It repeats nothing either."""
    assert kill_at_every_write(tmp_path, 2000, 20) >= 2 * (2000 // 20 + 4)


def kill_the_key_service(directory: Path, records: int, kills: int) -> None:
    async def write(store: Conversations, acknowledged: Acknowledged) -> None:
        while True:
            try:
                made = await store.messages.create(NewMessage("ann", THREAD, body="meanwhile"))
                acknowledged[made.id].append(made)
                edit = store.messages.update(made.id, author="ann", body="edited", role=None, reply_to=None)
                acknowledged[made.id].append(await edit)
            except StoreUnavailableError:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.002)

    async def run(daemon: LiveDaemon) -> Acknowledged:
        acknowledged = await fill(directory, daemon.socket, records)
        async with served(directory, daemon.socket, records // 2) as (store, jobs):
            await jobs.start()
            writing = asyncio.create_task(write(store, acknowledged))
            rotating = asyncio.create_task(jobs.rotation.rotate(THREAD))
            for _ in range(kills):
                await asyncio.sleep(random.uniform(0, 0.3))
                daemon.kill()
                await asyncio.to_thread(daemon.start)
            job = await jobs.wait((await rotating).id)
            assert job.state == "done", job.reason
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        return acknowledged

    with LiveDaemon(directory) as daemon:
        acknowledged = asyncio.run(run(daemon))
        asyncio.run(verify(directory, daemon.socket, acknowledged))


def test_a_key_service_killed_at_random_moments_only_delays_the_rotation(tmp_path: Path) -> None:
    kill_the_key_service(tmp_path, 400, 4)


@pytest.mark.torture
@pytest.mark.parametrize("round_number", range(5))
def test_a_key_service_killed_many_times_only_delays_the_rotation(tmp_path: Path, round_number: int) -> None:
    kill_the_key_service(tmp_path, 2000, 12)


def test_everything_opens_after_a_kek_rotation_in_the_middle_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is paused, so that it can't end before the KEK rotation."""
    monkeypatch.setattr(rotation, "PACED_CHUNK_RECORDS_MAX", 10)

    async def run(daemon: LiveDaemon) -> Acknowledged:
        acknowledged = await fill(tmp_path, daemon.socket, 100)
        async with served(tmp_path, daemon.socket, 50) as (_, jobs):
            await jobs.start()
            begun = await jobs.rotation.rotate(THREAD)
            while not (await jobs.table.get(begun.id)).done:
                await asyncio.sleep(0.01)
            assert 0 < (await jobs.pause(begun.id)).done < 100
            with daemon.client() as kms:
                answer = await asyncio.to_thread(kms.rotate_kek)
            assert answer.rewrapped == 2
            await jobs.resume(begun.id)
            assert (await jobs.wait(begun.id)).state == "done"
        return acknowledged

    with LiveDaemon(tmp_path) as daemon:
        acknowledged = asyncio.run(run(daemon))
        daemon.kill()
        daemon.start()
        asyncio.run(verify(tmp_path, daemon.socket, acknowledged))


def test_the_kill_is_really_at_a_write_of_the_job(tmp_path: Path) -> None:
    """The proof above depends on this: a server that ends before its first row leaves none."""
    with LiveDaemon(tmp_path) as daemon:
        asyncio.run(fill(tmp_path, daemon.socket, 3))
        command = [sys.executable, *SERVER, str(tmp_path), str(daemon.socket), "2"]
        told = subprocess.run(command, input=b"before 1\n", stdout=subprocess.PIPE, check=True).stdout
        assert msgspec.json.decode(told.splitlines()[-1]) == {"ended": -signal.SIGKILL}
        engine = RocksEngine(str(tmp_path / "db"))
        assert engine.scan(b"job:", b"job;", limit=1) == []
        engine.close()
