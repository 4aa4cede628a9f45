"""The rotation of a long thread's key: records a second, memory, and what requests feel of it meanwhile.

The thread is built through the store's own parts, since a million requests would take most of the time. Unbounded, the
store and its jobs run in this process with the key service as another one; what is measured is a whole job: key,
re-encryption with backups, census and reading back. With a bounded rate it is the server as it comes, under load.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import uvloop

from bench import keys, load, programs
from bench.programs import ADMIN_KEY, BACKEND_KEY, BenchError
from bench.report import Row, figure, say
from minikms.api.errors import KmsRefusedError
from minikms.client import EncryptItem
from minikms.platform.logs import log_to
from progressdb_server.config import Retention, RotationSection
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.rotation import Due
from progressdb_server.jobs.service import Jobs
from progressdb_server.kms.provider import RemoteProvider
from progressdb_server.store import drafts, keyspace
from progressdb_server.store.engine import EngineBusyError
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import NewMessage
from progressdb_server.store.rocks.engine import RocksEngine

RECORDS = 1_000_000
RECORD_BYTES = 512
THREAD = "long"
BUILT_AT_ONCE = 1024
FOREGROUND_RECORDS = 200_000
FOREGROUND_RATE = 12_000
"""Above the default of 10,000, which the budget names."""
CLIENTS = 8
LOAD_SECONDS = 5.0
WARM_UP_SECONDS = 1.0
SIZES = (1_000, 10_000, 100_000)
BUILDERS = 64
ROTATED = 500
"""Threads of each size whose rotations are measured, after some others."""
PURGED = 200
"""Threads of each size that are deleted and purged."""
SOON = Retention(deleted_after="1s", rotation_backups_after="never")


def rotation() -> list[Row]:
    """Records a second of one unbounded job, and how much this process grew."""
    with programs.workplace() as directory, programs.minikms(directory) as socket:
        seconds, grown_mib, built_s = uvloop.run(_rotate(directory, socket))
    say(f"rotation: {figure(RECORDS / seconds)} records/s, {figure(grown_mib)} MiB; built in {figure(built_s)} s")
    what = f"DEK rotation of a thread of {RECORDS:,} records of {RECORD_BYTES} B"
    note = "one job: re-encryption with backups, census, reading back"
    return [
        Row(what, RECORDS / seconds, "records/s", 60_000, 100_000, note=note),
        Row("resident memory growth of the server meanwhile", grown_mib, "MiB", 64, 32, less_is_better=True),
    ]


def growth() -> list[Row]:
    """What a rotation and a purge of one of many small threads cost, by their number."""
    with programs.workplace() as directory, programs.minikms(directory) as socket:
        return uvloop.run(_grow(directory, socket, keys.wait_for_index(socket)))


class _Counting(RemoteProvider):
    """Counts rotations: a small thread is read back in one batch."""

    rotated = 0

    async def check_batch(self, *given: Any, **named: Any) -> Any:
        self.rotated += 1
        return await super().check_batch(*given, **named)


async def _grow(directory: Path, socket: str, pid: int) -> list[Row]:
    provider = _Counting(socket)
    store = Conversations(RocksEngine(str(directory / "store")), provider)
    jobs = Jobs(store, provider, RotationSection(records_per_second=0), SOON, exclusive=True)
    rows: list[Row] = []
    numbers, going = itertools.count(), itertools.count()
    log_to(sys.stderr, "console", "warning")

    async def write(below: int) -> None:
        while (await store.stats())["threads"] <= below - BUILDERS:
            number = next(numbers)
            await store.messages.create(NewMessage(author=f"u{number % 251}", thread=f"t{number:06}", body="x" * 256))

    async def rotated(count: int) -> None:
        until = provider.rotated + count
        while provider.rotated < until:  # noqa: ASYNC110  nobody wakes it
            await asyncio.sleep(0.01)

    async def purge() -> float:
        """Seconds, with the walk over all threads that finds the deleted ones."""
        left = (await store.stats())["threads"] - PURGED
        for number in itertools.islice(going, PURGED):
            await store.threads.delete(f"t{number:06}", author=f"u{number % 251}", by="bench")
        await asyncio.sleep(1)
        began = time.perf_counter()
        await jobs.purge.begin()
        while (await store.stats())["threads"] > left:  # noqa: ASYNC110  nobody wakes it
            await asyncio.sleep(0.01)
        return time.perf_counter() - began

    try:
        await jobs.start()
        for size in SIZES:
            await asyncio.gather(*[write(size) for _ in range(BUILDERS)])
            walk = await jobs.many.rotate(Due())
            await rotated(ROTATED // 5)
            before = time.perf_counter(), time.process_time(), _cpu_s(pid)
            await rotated(ROTATED)
            now = time.perf_counter(), time.process_time(), _cpu_s(pid)
            await jobs.cancel(walk.id)
            wall_s, own_s, kms_s = ((end - begin) / ROTATED for begin, end in zip(before, now, strict=True))
            note = f"processor time: {figure(own_s * 1000)} ms in the server, {figure(kms_s * 1000)} in the key service"
            say(f"growth_rotations: {size:,} threads: {figure(1 / wall_s)}/s, {note}")
            rows.append(Row(f"rotations of small threads, among {size:,}", 1 / wall_s, "rotations/s", note=note))
            purged_s = await purge()
            say(f"growth_rotations: {size:,} threads: {figure(PURGED / purged_s)} purges/s")
            rows.append(Row(f"purges of small threads, among {size:,}", PURGED / purged_s, "purges/s"))
    finally:
        await jobs.close()
        await store.close()
        await provider.close()
    return rows


def _cpu_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def foreground() -> list[Row]:
    """What appends and reads wait for while a job works at a bounded rate, against the same load without one."""
    with programs.workplace() as directory, programs.minikms(directory) as socket:
        uvloop.run(_build_alone(directory / "db" / "store", socket))
        with programs.progressdb(directory) as address:  # which finds the key service there
            requests = [_append(n) for n in range(CLIENTS // 2)] + [_read()] * (CLIENTS // 2)
            load.generate(address, requests, WARM_UP_SECONDS)
            without = _p99_ms(load.generate(address, requests, LOAD_SECONDS))
            asked = {"thread_id": THREAD, "records_per_second": FOREGROUND_RATE}
            job = _call(address, "POST", "/admin/rotate_thread_dek", asked)["job_id"]
            started = time.perf_counter()
            beside = _p99_ms(load.generate(address, requests, LOAD_SECONDS))
            now = _call(address, "GET", f"/admin/jobs/{job}")
            rate = now["done"] / (time.perf_counter() - started)
            if now["status"] != "running":
                raise BenchError(f"the job is {now['status']}: it has to work all the time that is measured")
    say(f"foreground: p99 {figure(without)} ms, {figure(beside)} ms beside a job at {figure(rate)} records/s")
    what = f"99th percentile of {CLIENTS} clients' appends and reads beside a job, against none"
    note = f"{figure(beside)} ms against {figure(without)} ms; the job re-encrypted {figure(rate)} records/s"
    return [Row(what, beside / without, "×", 4.0, 2.0, less_is_better=True, note=note)]


async def _build_alone(path: Path, socket: str) -> None:
    path.parent.mkdir(mode=0o700)
    provider = RemoteProvider(socket)
    engine = RocksEngine(str(path))
    store = Conversations(engine, provider)
    await build(store, engine, provider, FOREGROUND_RECORDS)
    await store.close()
    await provider.close()


def _append(number: int) -> bytes:
    body = {"thread": f"foreground-{number}", "author": "bench", "body": {"text": "x" * 256}}
    return load.post("/v1/messages", json.dumps(body).encode(), {"X-API-Key": BACKEND_KEY, "X-User-ID": "bench"})


def _read() -> bytes:
    head = f"GET /v1/messages?thread={THREAD}&limit=20 HTTP/1.1\r\nHost: bench\r\nX-API-Key: {BACKEND_KEY}\r\n\r\n"
    return head.encode()


def _p99_ms(run: load.Load) -> float:
    latencies = sorted(run.latencies_ms)
    return latencies[len(latencies) * 99 // 100]


def _call(address: tuple[str, int], method: str, target: str, body: object = None) -> Any:
    connection = http.client.HTTPConnection(*address, timeout=30)
    try:
        connection.request(method, target, json.dumps(body) if body else None, {"X-API-Key": ADMIN_KEY})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


async def _rotate(directory: Path, socket: str) -> tuple[float, float, float]:
    provider = RemoteProvider(socket)
    engine = RocksEngine(str(directory / "store"))
    store = Conversations(engine, provider)
    jobs = Jobs(store, provider, RotationSection(records_per_second=0), exclusive=True)
    try:
        begun = time.perf_counter()
        await build(store, engine, provider, RECORDS)
        await jobs.start()
        before, started = _resident_mib(), time.perf_counter()
        watching = asyncio.create_task(_most_resident())
        job = await jobs.wait((await jobs.rotation.rotate(THREAD)).id)
        seconds = time.perf_counter() - started
        watching.cancel()
        (most,) = await asyncio.gather(watching, return_exceptions=False)
        if job.state != "done" or job.done < RECORDS or job.verified < RECORDS:
            raise BenchError(f"the job is {job.state} ({job.reason}) after {job.done} records")
        return seconds, most - before, started - begun
    finally:
        await jobs.close()
        await store.close()
        await provider.close()


async def build(store: Conversations, engine: RocksEngine, provider: RemoteProvider, records: int) -> None:
    """The thread, with as many messages."""
    first = await store.messages.create(NewMessage(author="bench", thread=THREAD, body=""))
    key_id = await store.rekeying.key_of_thread(THREAD) or ""
    new = NewMessage(author="bench", thread=THREAD, body={"text": secrets.token_hex(RECORD_BYTES // 2)[:-60]})
    for start in range(first.ts + 1, first.ts + 1 + records, BUILT_AT_ONCE):
        versions: list[drafts.Draft] = []
        for ns in range(start, min(start + BUILT_AT_ONCE, first.ts + 1 + records)):
            stamp = Stamp(ns, 0)
            message = new.first_version(keyspace.message_id(stamp), THREAD, ns)
            versions.append(drafts.first_version(message, stamp, key_id))
        items = [
            EncryptItem(key_id=key_id, plaintext=plaintext, aad=key, thread_id=THREAD)
            for version in versions
            for key, _, plaintext in version.records
        ]
        puts: list[tuple[bytes, bytes | None]] = []
        for version, sealed in zip(versions, await provider.encrypt_batch(items), strict=True):
            if isinstance(sealed, KmsRefusedError):
                raise sealed
            puts += version.sealed([sealed]).puts
        await _written(engine, puts)


async def _written(engine: RocksEngine, puts: list[tuple[bytes, bytes | None]]) -> None:
    while True:
        try:
            engine.write(puts)
            return
        except EngineBusyError:
            await asyncio.sleep(0.01)


async def _most_resident() -> float:
    most = 0.0
    try:
        while True:
            most = max(most, _resident_mib())
            await asyncio.sleep(0.05)
    except asyncio.CancelledError:
        return most


def _resident_mib() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
