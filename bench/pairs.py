"""The key service against that of another checkout of this project: two daemons take turns in one run, and each turn is
compared with the one beside it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from bench import keys, load, programs
from bench.calls import Connection
from bench.report import Row, figure, say

TURNS = 9
SECONDS = 1.5
"""Of each turn."""
CONNECTIONS = (64, 16, 1)
BATCH_ITEMS = 128
BATCH_CONNECTIONS = 4
RUNS = 1000
"""Records of which each was encrypted in another run of the daemon."""
ROTATED_KEYS = 100_000
ROTATION_TURNS = 3
FLOOR = 0.97
FOREIGN_FLOOR = 0.85
FOREIGN_BATCH_FLOOR = 0.5
"""Each item has a key of its own to derive or to expand."""
_EACH_RECORD_IN_A_RUN_OF_ITS_OWN: Final = """
import sys
from minikms.cli import main
try:
    from minikms.crypto import records
    records.RECORDS_PER_PREFIX = 1
except ImportError:  # before XAES-256-GCM all runs were equal
    pass
sys.argv = ["minikms", *sys.argv[1:]]
main()
"""

Requests = Sequence[Sequence[bytes]]
"""Of each connection, in turn and then again."""


def verbs(checkout: Path) -> list[Row]:
    """`/encrypt`, `/decrypt` and their batches."""
    with contextlib.ExitStack() as started:
        daemons = []
        for place in (None, checkout):
            directory = started.enter_context(programs.workplace())
            foreign = _foreign_records(directory, place)
            path = started.enter_context(programs.minikms(directory, checkout=place))
            daemons.append((path, keys.wait_for_index(path), _requests(path, *foreign)))
        return [
            _compared(
                f"{name}, answers a second of the daemon's processor time",
                [partial(_answers_per_second, path, pid, asked[name]) for path, pid, asked in daemons],
                TURNS,
                _floor(name),
            )
            for name in daemons[0][2]
        ]


def _floor(name: str) -> float:
    if "other runs" not in name:
        return FLOOR
    return FOREIGN_BATCH_FLOOR if "_batch" in name else FOREIGN_FLOOR


def _answers_per_second(path: str, pid: int, requests: Requests) -> float:
    """Of processor time of the daemon's event loop, so that neither the load generator nor other programs count."""
    before = processor_seconds(pid)
    answers = sum(load.generate(path, requests, SECONDS).answers)
    return answers / (processor_seconds(pid) - before)


def processor_seconds(pid: int) -> float:
    """Of the first thread of a process."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9


def rotation(checkout: Path) -> list[Row]:
    """A KEK rotation, nothing else being asked."""
    with contextlib.ExitStack() as started:
        paths = []
        for place in (None, checkout):
            path = started.enter_context(programs.minikms(started.enter_context(programs.workplace()), checkout=place))
            keys.make(path, ROTATED_KEYS)
            paths.append(path)
        rates = [partial(_rotated_per_second, path) for path in paths]
        return [_compared(f"KEK rotation of {ROTATED_KEYS:,} DEKs, keys a second", rates, ROTATION_TURNS, FLOOR)]


def _rotated_per_second(path: str) -> float:
    return ROTATED_KEYS / keys.rotate_idle(path, ROTATED_KEYS)


def _compared(what: str, rates: Sequence[Callable[[], float]], turns: int, floor: float) -> Row:
    """`rates` measure this checkout and the other one."""
    found: list[tuple[float, float]] = []
    for turn in range(turns + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        rate = {number: rates[number]() for number in order}
        if turn:  # the one before the first warms up
            found.append((rate[0], rate[1]))
            say(f"{what}, turn {turn}: {figure(rate[0])}, the other {figure(rate[1])}")
    ours, others = (statistics.median(each) for each in zip(*found, strict=True))
    ratio = statistics.median(mine / other for mine, other in found)
    note = f"median of {turns} pairs of turns; {figure(ours)} to {figure(others)}"
    return Row(f"{what}, of that of another checkout", ratio, "×", floor, note=note)


def _foreign_records(directory: Path, checkout: Path | None) -> tuple[str, list[str]]:
    """A key, and records under it of RUNS runs of the daemon."""
    with programs.minikms(directory, checkout=checkout, code=_EACH_RECORD_IN_A_RUN_OF_ITS_OWN) as path:
        with Connection(path) as connection:
            key_id: str = connection.call("POST", "/create_dek_for_thread", {"thread_id": "bench"})["key_id"]
        return key_id, [keys.sealed_sample(path, key_id) for _ in range(RUNS)]


def _requests(path: str, key_id: str, foreign: list[str]) -> dict[str, Requests]:
    """By the row that they are for."""
    plaintexts = [{"key_id": key_id, "plaintext": keys.SAMPLE}] * BATCH_ITEMS
    own = [keys.sealed_sample(path, key_id) for _ in range(BATCH_ITEMS)]
    encrypt = _post("/encrypt", plaintexts[0])
    asked: dict[str, Requests] = {
        f"`/encrypt`, {connections} connections": [[encrypt]] * connections for connections in CONNECTIONS
    }
    batches = {
        "`/encrypt_batch`": ("/encrypt_batch", [plaintexts]),
        "`/decrypt_batch`, records of this run": ("/decrypt_batch", [_ciphertexts(key_id, own)]),
        f"`/decrypt_batch`, records of {RUNS:,} other runs": (
            "/decrypt_batch",
            [_ciphertexts(key_id, foreign[start : start + BATCH_ITEMS]) for start in range(0, RUNS, BATCH_ITEMS)],
        ),
    }
    for name, (target, lists) in batches.items():
        asked[f"{name}, {BATCH_ITEMS} items"] = [[_post(target, {"items": each}) for each in lists]] * BATCH_CONNECTIONS
    for name, records in (("records of this run", own), (f"records of {RUNS:,} other runs", foreign)):
        single = [_post("/decrypt", each) for each in _ciphertexts(key_id, records)]
        asked[f"`/decrypt`, {name}, {CONNECTIONS[1]} connections"] = [single] * CONNECTIONS[1]
    return asked


def _ciphertexts(key_id: str, records: list[str]) -> list[dict[str, str]]:
    return [{"key_id": key_id, "ciphertext": each} for each in records]


def _post(target: str, body: object) -> bytes:
    return load.post(target, json.dumps(body).encode())
