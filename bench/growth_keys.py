"""How the key service grows with its keys: `python -m bench.growth_keys 1000 10000 …` prints one row for each number.

The service as it comes, audit on, under the generator in Python, over one data directory that grows: the sizes go
upwards. Each row: making the latest of its keys; a start; the memory once all keys are read; encrypting once under each
of many keys that are not in memory, then again and again under a few; a KEK rotation that nothing disturbs.
`--save` puts the rows into docs/benchmarks.md, docs/plots/keys.csv and its plots. `python -m bench growth_keys`
measures starts and the keys of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

from bench import keys, load, plots, programs
from bench.calls import Connection, StatusError
from bench.pairs import used
from bench.report import Row, say
from minikms.custody import kept_index

SIZES = (1_000, 10_000, 100_000, 1_000_000)
CONNECTIONS = 64
MADE_MAX = 20_000
"""The making of this many keys is timed: the latest ones of a size."""
UNCACHED_MAX = 20_000
CACHED_SECONDS = 3.0
THREAD = "one"
LISTS = 200
COLUMNS = (
    "keys",
    "creates/s",
    "start to encrypt (s)",
    "resident (MiB)",
    "first encrypts of a key/s",
    "encrypts of cached keys/s",
    "rotated keys/s",
)


def measure(directory: Path, key_ids: list[str], size: int) -> list[float]:
    """The row of a size. Adds the ids of the keys that it makes to `key_ids`, which has those of the directory."""
    with programs.minikms(directory) as path:
        timed = min(MADE_MAX, size - len(key_ids))
        if untimed := size - timed - len(key_ids):
            key_ids += keys.make(path, untimed)
        began = time.perf_counter()
        key_ids += keys.make(path, timed)
        made_per_second = timed / (time.perf_counter() - began)
        sealed = keys.sealed_sample(path, key_ids[0])
    say(f"{size:,} keys: made")
    seconds_to_serve = keys.median_seconds_to_serve(directory, key_ids[0], sealed)
    with programs.minikms(directory) as path:
        memory_mib = keys.resident_mib(keys.wait_for_index(path))
        sample = random.sample(key_ids, min(UNCACHED_MAX, size))
        first_per_second = len(sample) / keys.encrypt_each(path, sample, CONNECTIONS)
        requests = [
            load.post("/encrypt", json.dumps({"key_id": key_id, "plaintext": keys.SAMPLE}).encode())
            for key_id in sample[-CONNECTIONS:]
        ]
        cached_per_second = load.generate(path, requests, CACHED_SECONDS).per_second
        rotated_per_second = size / keys.rotate_idle(path, size)
    return [
        size,
        made_per_second,
        seconds_to_serve,
        memory_mib,
        first_per_second,
        cached_per_second,
        rotated_per_second,
    ]


def starts() -> list[Row]:
    """Seconds from a start until `get_or_create_dek_for_thread` answers, after a stop and as after a crash, and the
    processor time of listing the only key of a thread.
    """
    rows: list[Row] = []
    made = 1
    with programs.workplace() as directory:
        for size in SIZES[1:]:
            with programs.minikms(directory) as path:
                _get_or_create(path)
                keys.make(path, size - made)
                keys.wait_for_index(path)
            made = size
            kept, _ = _start(directory)
            (directory / "kms" / kept_index.NAME).unlink()
            anew, list_ms = _start(directory)
            rows += [
                Row(f"every verb answers, {size:,} DEKs, after a start", kept, "s", less_is_better=True),
                Row(f"the same after a crash, {size:,} DEKs", anew, "s", less_is_better=True),
                Row(f"list of a thread's key, {size:,} DEKs", list_ms, "ms of processor time", less_is_better=True),
            ]
            say(f"{size:,} keys: {kept:.2f} s, after a crash {anew:.2f} s; a list takes {list_ms:.3f} ms")
    return rows


def _start(directory: Path) -> tuple[float, float]:
    """Of a start: seconds until every verb answers; milliseconds of processor time of a list."""
    began = time.perf_counter()
    with programs.minikms(directory, ready=_get_or_create, poll_seconds=0.002) as path:
        seconds = time.perf_counter() - began
        with Connection(path) as connection:
            pid = connection.call("GET", "/status")["pid"]
            before, _ = used(pid)
            for _ in range(LISTS):
                connection.call("GET", f"/keys?thread_id={THREAD}")
            return seconds, (used(pid)[0] - before) / LISTS / 1e6


def _get_or_create(path: str) -> bool:
    """Whether the service has answered."""
    try:
        with Connection(path) as connection:
            connection.call("POST", "/get_or_create_dek_for_thread", {"thread_id": THREAD})
    except (OSError, StatusError):
        return False
    return True


def main() -> None:
    """Prints the rows as a Markdown table as they come."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth_keys")
    parser.add_argument("sizes", nargs="*", type=int, metavar="KEYS", help="numbers of keys, upwards")
    parser.add_argument("--save", action="store_true", help="write the table, the file and the plots of docs")
    asked = parser.parse_args()
    sizes = asked.sizes or list(SIZES)
    if sizes != sorted(set(sizes)) or sizes[0] < CONNECTIONS:
        parser.error(f"the numbers go upwards, from {CONNECTIONS} at least")
    load_before = os.getloadavg()[0]
    print(plots.head(COLUMNS), flush=True)
    rows: list[list[float]] = []
    key_ids: list[str] = []
    with programs.workplace() as directory:
        for size in sizes:
            rows.append(measure(directory, key_ids, size))
            print(plots.line(rows[-1]), flush=True)
    if asked.save:
        plots.keep(plots.KEYS, COLUMNS, rows, load_before)


if __name__ == "__main__":
    main()
