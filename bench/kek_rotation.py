"""KEK rotation of many DEKs while the daemon serves, and how soon it serves after a start with as many on disk.

`python -m bench.kek_rotation 1000000` measures other numbers of keys than the table's. The keys are made through the
API; the rotation runs while connections encrypt without a pause; every key is counted under the new version at the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from pathlib import Path

import uvloop

from bench import load, programs, report
from bench.calls import Connection
from bench.programs import BenchError
from bench.report import Row, figure, say

KEYS = 100_000
CREATING_CONNECTIONS = 256
ENCRYPTING_CONNECTIONS = 16
STARTS = 5
BEFORE_SECONDS = 3.0
SLICE_SECONDS = 0.5
"""Of load during the rotation: it ends at most so long after it."""
ROTATION_SECONDS_MAX = 3600.0


def rotation() -> list[Row]:
    """Start, rotation time, memory growth, latency. Raises BenchError when a key is not under the new version."""
    with programs.workplace() as directory:
        with programs.minikms(directory) as path:
            say(f"kek_rotation: making {KEYS:,} keys")
            began = time.perf_counter()
            key_id = uvloop.run(_make(path, KEYS))
            made_per_second = KEYS / (time.perf_counter() - began)
            with Connection(path) as connection:
                body = {"key_id": key_id, "plaintext": "A" * 344}
                sealed = connection.call("POST", "/encrypt", body)["ciphertext"]
        seconds_to_serve = sorted(_seconds_to_serve(directory, key_id, sealed) for _ in range(STARTS))[STARTS // 2]
        with programs.minikms(directory) as path:
            request = load.post("/encrypt", json.dumps(body).encode())
            return _rotate_under_load(path, request, seconds_to_serve, made_per_second)


async def _make(path: str, count: int) -> str:
    """Makes `count` keys and returns the id of one."""

    async def one(number: int, share: int) -> str:
        reader, writer = await asyncio.open_unix_connection(path)
        request = load.post("/create_dek_for_thread", b'{"thread_id":"t%d"}' % number)
        body = b""
        for _ in range(share):
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(load._content_length(head.lower()))
            if head[9:10] != b"2":
                raise BenchError(f"a create was answered {body[:200]!r}")
        writer.close()
        return json.loads(body)["key_id"] if body else ""

    connections = min(CREATING_CONNECTIONS, count)
    shares = [count // connections + (number < count % connections) for number in range(connections)]
    return (await asyncio.gather(*(one(number, share) for number, share in enumerate(shares))))[0]


def _seconds_to_serve(directory: Path, key_id: str, sealed: str) -> float:
    """From the start of the process to the answer of a decryption and an encryption."""

    def answers(path: str) -> bool:
        try:
            with Connection(path) as connection:
                connection.call("POST", "/decrypt", {"key_id": key_id, "ciphertext": sealed})
                connection.call("POST", "/encrypt", {"key_id": key_id, "plaintext": ""})
        except OSError:
            return False
        return True

    began = time.perf_counter()
    with programs.minikms(directory, ready=answers, poll_seconds=0.002):
        return time.perf_counter() - began


def _rotate_under_load(path: str, request: bytes, seconds_to_serve: float, made_per_second: float) -> list[Row]:
    with Connection(path) as connection:
        while True:
            told = connection.call("GET", "/status")
            if not told["keys"]["indexing"]:
                break
            time.sleep(0.05)
        pid = told["pid"]
        requests = [request] * ENCRYPTING_CONNECTIONS
        before = load.generate(path, requests, BEFORE_SECONDS)
        memory_before = _resident_bytes(pid)
        rotating = _Rotation(path)
        rotating.start()
        latencies: list[float] = []
        answers = 0
        began = time.perf_counter()
        peak = memory_before
        while rotating.is_alive():
            during = load.generate(path, requests, SLICE_SECONDS)
            latencies += during.latencies_ms
            answers += sum(during.answers)
            peak = max(peak, _resident_bytes(pid))
        took = time.perf_counter() - began
        rotating.join()
        if rotating.error:
            raise BenchError(f"the rotation failed: {rotating.error}")
        told = connection.call("GET", "/status")
    if told["keys"]["by_kek_version"] != {"2": KEYS}:
        raise BenchError(f"not every key is under the new version: {told['keys']}")
    p99_before, p99_during = _p99(before.latencies_ms), _p99(latencies)
    note = (
        f"{ENCRYPTING_CONNECTIONS} connections encrypting meanwhile; p99 of `/encrypt` {p99_before:.1f} ms before, "
        f"{p99_during:.1f} ms during, {figure(before.per_second)}/s before, {figure(answers / took)}/s during"
    )
    return [
        Row(
            f"encrypt and decrypt answer, {KEYS:,} DEKs on disk, after start",
            seconds_to_serve,
            "s",
            0.5,
            0.25,
            less_is_better=True,
            note=f"median of {STARTS} starts; keys were made at {figure(made_per_second)}/s",
        ),
        Row(
            f"KEK rotation of {KEYS:,} DEKs, crash-safe, while serving",
            rotating.seconds,
            "s",
            10,
            6,
            less_is_better=True,
            note=note,
        ),
        Row("`/encrypt` during it, of before", answers / took / before.per_second, "×", 0.35, 0.5),
        Row(
            "resident memory growth during it",
            (peak - memory_before) / 2**20,
            "MiB",
            64,
            32,
            less_is_better=True,
            note=f"from {memory_before / 2**20:.0f} MiB",
        ),
    ]


class _Rotation(threading.Thread):
    """One `/rotate_kek`, waited for."""

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self._path = path
        self.seconds = 0.0
        self.error = ""

    def run(self) -> None:
        began = time.perf_counter()
        try:
            with Connection(self._path) as connection:
                connection.connect()
                connection.sock.settimeout(ROTATION_SECONDS_MAX)
                connection.call("POST", "/rotate_kek", {})
        except (BenchError, OSError) as error:
            self.error = str(error)
        self.seconds = time.perf_counter() - began


def _p99(latencies_ms: list[float]) -> float:
    return sorted(latencies_ms)[int(len(latencies_ms) * 0.99)]


def _resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> None:
    global KEYS
    rows: list[Row | report.Missing] = []
    for argument in sys.argv[1:] or [str(KEYS)]:
        KEYS = int(argument)
        rows += rotation()
    print(f"{report.heading(os.getloadavg()[0])}\n\n{report.table(rows)}")


if __name__ == "__main__":
    main()
