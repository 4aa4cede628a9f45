"""KEK rotation of many DEKs while the daemon serves, and how soon it serves after a start with as many on disk.

`python -m bench.kek_rotation 1000000` measures other numbers of keys than the table's. The keys are made through the
API; the rotation runs while connections encrypt without a pause; every key is counted under the new version at the end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

from bench import keys, load, programs, report
from bench.calls import Connection
from bench.programs import BenchError
from bench.report import Row, figure

KEYS = 100_000
ENCRYPTING_CONNECTIONS = 16
BEFORE_SECONDS = 3.0
SLICE_SECONDS = 0.5
"""Seconds of one share of the load: it ends at most this long after the rotation."""
ROTATION_SECONDS_MAX = 3600.0


def rotation() -> list[Row]:
    """Start, rotation time, memory growth, latency. Raises BenchError when a key is not under the new version."""
    with programs.workplace() as directory:
        kept = keys.stored(directory, KEYS)
        with programs.minikms(directory) as path:
            request = load.post("/encrypt", json.dumps({"key_id": kept.key_id, "plaintext": keys.SAMPLE}).encode())
            return [
                keys.start_row(kept, KEYS, note="; the budget is for 1,000,000 (`--million`)"),
                *_rotate_under_load(path, request),
            ]


def _rotate_under_load(path: str, request: bytes) -> list[Row]:
    with Connection(path) as connection:
        pid = keys.wait_for_index(path)
        requests = [request] * ENCRYPTING_CONNECTIONS
        before = load.generate(path, requests, BEFORE_SECONDS)
        memory_before = keys.resident_mib(pid)
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
            peak = max(peak, keys.resident_mib(pid))
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
            f"KEK rotation of {KEYS:,} DEKs, crash-safe, while serving",
            rotating.seconds,
            "s",
            10,
            6,
            less_is_better=True,
            note=note,
        ),
        Row("`/encrypt` during it, of its rate before", answers / took / before.per_second, "×", 0.35, 0.5),
        Row(
            "resident memory growth during it",
            peak - memory_before,
            "MiB",
            64,
            32,
            less_is_better=True,
            note=f"from {memory_before:.0f} MiB",
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


def main() -> None:
    global KEYS
    rows: list[Row | report.Missing] = []
    for argument in sys.argv[1:] or [str(KEYS)]:
        KEYS = int(argument)
        rows += rotation()
    print(f"{report.heading(os.getloadavg()[0])}\n\n{report.table(rows)}")


if __name__ == "__main__":
    main()
