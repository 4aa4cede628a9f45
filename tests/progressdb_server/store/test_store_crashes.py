"""Killed at random, disks that fail or fill up: what was acknowledged reads back, nothing half-written is visible,
and the store recovers by itself."""

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from progressdb_server.store.check import Checker
from progressdb_server.store.model import Message, NewMessage, StoreUnavailableError, json_text
from progressdb_server.store.offline import LocalView
from progressdb_server.store.rocks.engine import RocksEngine
from tests import needs
from tests.harness.scripts import interpreter_words
from tests.progressdb_server.store.keyfile_provider import KeyFileProvider
from tests.progressdb_server.store.opened_store import disk, messages_of, opened, threads_of, versions_of

WRITER = interpreter_words("tests.progressdb_server.store.crashing_writer")
Acknowledged = dict[str, list[Message]]
LINES_MIN, LINES_MAX = 30, 400


def start(directory: Path, workers: int, *prefix: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*prefix, sys.executable, *WRITER, str(directory), str(workers)], stdout=subprocess.PIPE)


def lines(child: subprocess.Popen[bytes]) -> Iterator[bytes]:
    assert child.stdout is not None
    yield from (line for line in child.stdout if line.endswith(b"\n"))


def note(line: bytes, acknowledged: Acknowledged) -> None:
    message = msgspec.json.decode(line, type=Message)
    message.body = json_text(message.body)
    acknowledged[message.id].append(message)


async def verify(directory: Path, acknowledged: Acknowledged, refused: int = 0) -> None:
    """Every version that was acknowledged is there, in order. Of a message, at most one more may be there at the end,
    which was being written, and one for each refusal, which may or may not have reached the disk."""
    provider = KeyFileProvider(str(directory / "keys"))
    async with opened(RocksEngine(str(directory / "db")), provider) as store:
        findings = [finding async for finding in Checker(LocalView(disk(store)), provider).run()]
        assert findings == []
        for message, versions in acknowledged.items():
            stored = await versions_of(store, message)
            if not refused:
                assert stored[: len(versions)] == versions
            times = {version.ts for version in versions}
            assert [version for version in stored if version.ts in times] == versions
            assert len(stored) <= len(versions) + 1 + refused
        listed: dict[str, Message] = {}
        for thread in await threads_of(store, None):
            found = await messages_of(store, thread.id, include_deleted=True)
            assert [m.id for m in found] == sorted({m.id for m in found})
            listed.update({m.id: m for m in found})
        for message, versions in acknowledged.items():
            assert listed[message].ts >= versions[-1].ts
        assert (await store.stats())["messages"] == sum([len(await versions_of(store, m)) for m in listed])


def kill_and_verify(directory: Path, kills: int) -> None:
    """Kill the writer after a random number of acknowledgements, so that a slow disk gives as many of them."""
    acknowledged: Acknowledged = defaultdict(list)
    for _ in range(kills):
        child = start(directory, 12)
        try:
            reading = lines(child)
            assert b"ready" in next(reading)
            for line in itertools.islice(reading, random.randint(LINES_MIN, LINES_MAX)):
                note(line, acknowledged)
            child.kill()
            for line in reading:  # what it had said before it died counts
                note(line, acknowledged)
        finally:
            child.kill()
            assert child.wait() == -signal.SIGKILL
            assert child.stdout is not None
            child.stdout.close()
        asyncio.run(verify(directory, acknowledged))
    assert sum(len(versions) for versions in acknowledged.values()) >= LINES_MIN * kills


def test_a_writer_killed_under_mixed_load_loses_nothing_acknowledged(tmp_path: Path) -> None:
    kill_and_verify(tmp_path, 4)


@pytest.mark.torture
@pytest.mark.parametrize("round_number", range(20))
def test_a_hundred_kills_under_mixed_load_lose_nothing(tmp_path: Path, round_number: int) -> None:
    """Five kills a round; each round begins anew, or checking what came before would take most of the time."""
    kill_and_verify(tmp_path, 5)


@pytest.mark.parametrize("call", ["fdatasync", "write"])
def test_a_disk_error_is_reported_and_the_store_recovers(tmp_path: Path, call: str) -> None:
    """The 40th such call on the write-ahead log fails under the real engine; later acknowledgements show that the store
    came back by itself."""
    log = tmp_path / "db" / "000004.log"  # RocksDB's first
    fault = ("-P", str(log), "-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when=40")
    acknowledged: Acknowledged = defaultdict(list)
    child = start(tmp_path, 4, needs.program("strace"), "-f", "-qq", "-o", "/dev/null", *fault)
    refused, after = 0, 0
    try:
        reading = lines(child)
        writer = msgspec.json.decode(next(reading))["ready"]
        for line in reading:
            if b"refused" in line:
                refused += 1
                continue
            note(line, acknowledged)
            after += refused > 0
            if after > 100:
                break
        os.kill(writer, signal.SIGKILL)
        for line in reading:
            note(line, acknowledged)
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert refused
    assert after > 100
    asyncio.run(verify(tmp_path, acknowledged, refused))


def test_no_acknowledgement_leaves_before_the_log_is_on_the_disk(tmp_path: Path) -> None:
    """Told by the system calls of one writer: between two acknowledgements the log was synced."""
    trace = tmp_path / "trace"
    watch = ("-f", "-qq", "-o", str(trace), "-e", "trace=fdatasync,write", "-e", "signal=none", "-s", "8")
    child = start(tmp_path, 1, needs.program("strace"), *watch)
    acknowledged: Acknowledged = defaultdict(list)
    try:
        reading = lines(child)
        writer = msgspec.json.decode(next(reading))["ready"]
        for line in reading:
            note(line, acknowledged)
            if sum(len(versions) for versions in acknowledged.values()) >= 50:
                break
        os.kill(writer, signal.SIGKILL)
        child.wait()
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    synced, told = False, 0
    for call in trace.read_text().splitlines():
        if "fdatasync" in call and "= 0" in call:
            synced = True
        elif 'write(1, "{\\"id' in call:
            assert synced, call
            synced, told = False, told + 1
    assert told >= 50


def test_on_a_full_disk_reads_work_and_freed_space_restores_writes(tmp_path: Path) -> None:
    needs.root()
    mount, umount = needs.program("mount"), needs.program("umount")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run([mount, "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)

    async def run() -> None:
        provider = KeyFileProvider(str(tmp_path / "keys"))
        acknowledged: Acknowledged = defaultdict(list)
        async with opened(RocksEngine(str(small / "db")), provider, now_ns=time.time_ns) as store:
            new = NewMessage(author="ann", thread="t", body=os.urandom(8000).hex())
            with pytest.raises(StoreUnavailableError):
                for _ in range(5000):
                    message = await store.messages.create(new)
                    acknowledged[message.id].append(message)
            await asyncio.sleep(0.5)
            assert [store.writer.available] == [False]
            with pytest.raises(StoreUnavailableError):
                await store.messages.create(new)
            for message_id, versions in acknowledged.items():
                assert await store.reading.message(message_id) == versions[0]
            subprocess.run([mount, "-o", "remount,size=200m", str(small)], check=True)
            while not store.writer.available:
                await asyncio.sleep(0.05)
            for _ in range(20):
                message = await store.messages.create(new)
                acknowledged[message.id].append(message)
            (tmp_path / "db").symlink_to(small / "db")
        await verify(tmp_path, acknowledged)

    try:
        asyncio.run(run())
    finally:
        subprocess.run([umount, "-l", str(small)], check=True)
