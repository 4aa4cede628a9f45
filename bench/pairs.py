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

import uvloop

from bench import create, keys, load, programs
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
SWITCH = "a voluntary switch of the daemon"
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
from minikms.cli import command
def become_daemon(flags, words):  # here, where the number is set
    from minikms_daemon import serve
    from minikms.processes.flags import write_flags
    sys.argv = ["minikms", str(write_flags(flags)), *words]
    serve.main()
vars(sys.modules["minikms.cli.serve"])["become_daemon"] = become_daemon
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
            row
            for name in daemons[0][2]
            for row in _compared(
                [f"{name}, answers {unit}" for unit in ("a second of the daemon's processor time", "a second", SWITCH)],
                [partial(_answers, path, pid, requests[name]) for path, pid, requests in daemons],
                TURNS,
                _floor(name),
            )
        ]


def _floor(name: str) -> float:
    if "other runs" not in name:
        return FLOOR
    return FOREIGN_BATCH_FLOOR if "_batch" in name else FOREIGN_FLOOR


def _answers(path: str, pid: int, requests: Requests) -> list[float]:
    """The answers by second of the daemon's processor time, in which neither the load generator nor other programs
    count; by second; and by voluntary switch of the daemon.
    """
    before = used(pid)
    turn = load.generate(path, requests, SECONDS)
    seconds, switches = _used_since(pid, before)
    return [sum(turn.answers) / seconds, turn.per_second, sum(turn.answers) / switches]


def creates(checkout: Path) -> list[Row]:
    """Keys that are made through one `AsyncClient`, the same one for both daemons."""
    with contextlib.ExitStack() as started:
        measures = []
        for place in (None, checkout):
            path = started.enter_context(programs.minikms(started.enter_context(programs.workplace()), checkout=place))
            measures.append(partial(_keys_made, path, keys.wait_for_index(path)))
        units = ("a second of the daemon's processor time", "a second", SWITCH)
        what = f"creating DEKs with {create.CONNECTIONS} tasks of one client, keys"
        return _compared([f"{what} {unit}" for unit in units], measures, TURNS, FLOOR)


def _keys_made(path: str, pid: int) -> list[float]:
    """Keys by second of processor time, by second, and by voluntary switch."""
    before = used(pid)
    count, seconds = uvloop.run(create.through_pool(path, SECONDS))
    processor_s, switches = _used_since(pid, before)
    return [count / processor_s, count / seconds, count / switches]


def used(pid: int) -> tuple[int, int]:
    """The nanoseconds of processor time and the voluntary switches of all threads of a process."""
    nanoseconds = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text(encoding="ascii").split()[0])
        status = (task / "status").read_text(encoding="ascii")
        switches += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return nanoseconds, switches


def _used_since(pid: int, before: tuple[int, int]) -> tuple[float, int]:
    """The seconds and switches since `before`, at least one of each unit: a thread that runs is counted at the next
    tick only, so that a short turn may have none.
    """
    nanoseconds, switches = (max(now - then, 1) for now, then in zip(used(pid), before, strict=True))
    return nanoseconds / 1e9, switches


def rotation(checkout: Path) -> list[Row]:
    """A KEK rotation, nothing else being asked."""
    with contextlib.ExitStack() as started:
        paths = []
        for place in (None, checkout):
            path = started.enter_context(programs.minikms(started.enter_context(programs.workplace()), checkout=place))
            keys.make(path, ROTATED_KEYS)
            paths.append(path)
        rates = [partial(_rotated_per_second, path) for path in paths]
        return _compared([f"KEK rotation of {ROTATED_KEYS:,} DEKs, keys a second"], rates, ROTATION_TURNS, FLOOR)


def _rotated_per_second(path: str) -> list[float]:
    return [ROTATED_KEYS / keys.rotate_idle(path, ROTATED_KEYS)]


def _compared(
    names: Sequence[str], measures: Sequence[Callable[[], list[float]]], turns: int, floor: float
) -> list[Row]:
    """A row for each name. `measures`, of this checkout and the other one, return a figure for each name."""
    pairs: list[list[tuple[float, float]]] = [[] for _ in names]
    for turn in range(turns + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        figures = {number: measures[number]() for number in order}
        if turn:  # the one before the first warms up
            for name, each, mine, other in zip(names, pairs, figures[0], figures[1], strict=True):
                each.append((mine, other))
                say(f"{name}, turn {turn}: {figure(mine)}, the other {figure(other)}")
    rows = []
    for name, each in zip(names, pairs, strict=True):
        ours, others = (statistics.median(side) for side in zip(*each, strict=True))
        ratio = statistics.median(mine / other for mine, other in each)
        note = f"median of {turns} pairs of turns; {figure(ours)} to {figure(others)}"
        rows.append(Row(f"{name}, of that of another checkout", ratio, "×", floor, note=note))
    return rows


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
