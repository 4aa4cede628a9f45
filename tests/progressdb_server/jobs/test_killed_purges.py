"""Real processes: a server that is killed at every step of the purge of a thread. The next one goes on by itself."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec
import pytest

from minikms.api.errors import KeyDestroyedError
from progressdb_server.kms.provider import RemoteProvider
from progressdb_server.store.check import Checker
from progressdb_server.store.model import Message
from progressdb_server.store.offline import LocalView
from tests.harness.live_daemon import LiveDaemon
from tests.progressdb_server.jobs.rotating import write
from tests.progressdb_server.jobs.test_killed_rotations import SERVER, served
from tests.progressdb_server.jobs.test_rotations_of_many import all_jobs
from tests.progressdb_server.store.opened_store import disk, keys_of, messages_of

STEPS_MAX = 20
"""More than a purge has."""
WHEN = ("before", "after")


async def fill(daemon: LiveDaemon, directory: Path, threads: list[str]) -> list[Message]:
    """Deleted threads with an edit, a member and the backups of a rotation; and one that stays, with these messages."""
    async with served(directory, daemon.socket) as (store, jobs):
        await jobs.start()
        stays = await write(store, 3, "stays")
        for thread in threads:
            first, *_ = await write(store, 3, thread)
            await store.messages.update(first.id, author="ann", body="edited", role=None, reply_to=None)
            await store.members.add(thread, ["bob"])
            await jobs.wait((await jobs.rotation.rotate(thread)).id)
            await store.threads.delete(thread, author="ann", by="ann")
        await asyncio.sleep(1)  # `killed_server.SOON`
        return stays


async def verify(daemon: LiveDaemon, directory: Path, stays: list[Message]) -> None:
    provider = RemoteProvider(daemon.socket)
    async with served(directory, daemon.socket) as (store, jobs):
        for job in await all_jobs(jobs):
            if job.kind == "purge":
                assert job.state == "done"
                assert len(job.sources) == 2
                for key in job.sources:
                    assert key in job.receipt
                    with pytest.raises(KeyDestroyedError):
                        await provider.get_key(key)
                names = [key for key in await keys_of(store) if not key.startswith("job:")]
                assert not [key for key in names if job.thread in key]
        assert await messages_of(store, "stays") == stays
        assert [finding async for finding in Checker(LocalView(disk(store)), provider).run()] == []
    await provider.close()


def is_killed(orders: IO[bytes], answers: IO[bytes], order: str) -> bool:
    """Whether a server was killed; otherwise it has purged the thread."""
    orders.write(order.encode() + b"\n")
    orders.flush()
    told = [msgspec.json.decode(answers.readline())]
    if told == [{"ended": -signal.SIGKILL}]:
        return True
    told.append(msgspec.json.decode(answers.readline()))
    assert told == [{"state": "done"}, {"ended": 0}]
    return False


def kill_at_steps(directory: Path, step: int) -> int:
    """At every `step`th step, before and after it; how many steps a purge has."""
    orders = [(when, number, f"{when}-{number:02}") for number in range(1, STEPS_MAX, step) for when in WHEN]
    with LiveDaemon(directory) as daemon:
        stays = asyncio.run(fill(daemon, directory, [thread for *_, thread in orders]))
        command = [sys.executable, *SERVER, str(directory), str(daemon.socket), "2"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as zygote:
            assert zygote.stdin is not None and zygote.stdout is not None
            for when, number, thread in orders:
                if not is_killed(zygote.stdin, zygote.stdout, f"{when} {number} {thread}"):
                    break
                assert not is_killed(zygote.stdin, zygote.stdout, f"never 0 {thread}")
            zygote.stdin.close()
            assert zygote.wait() == 0
        asyncio.run(verify(daemon, directory, stays))
    return number


def test_a_server_killed_at_some_steps_of_a_purge_goes_on(tmp_path: Path) -> None:
    assert kill_at_steps(tmp_path, 4) > 12


@pytest.mark.torture
def test_a_server_killed_at_each_step_of_a_purge_goes_on(tmp_path: Path) -> None:
    assert kill_at_steps(tmp_path, 1) > 12
