"""`/encrypt` and `/encrypt_batch` of the key service, alone, audit on.

`/encrypt` is a ratio: the daemon and the Go yardstick in turns, in one run, under the same h2load. A single figure
would say more about the machine than about the daemon.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import statistics
import subprocess
from pathlib import Path

from bench import load, programs
from bench.calls import Connection
from bench.programs import BenchError
from bench.report import Row, figure, say

PLAINTEXT_BYTES = 256
CONNECTIONS_AND_BUDGET = ((64, 1.2, 1.5), (16, 1.0, 1.3))
TURNS = 5
REQUESTS_PER_TURN = 120_000
REQUESTS_TO_WARM_UP = 20_000

FSYNC_POLICIES = ("never", "interval", "turn")
FSYNC_CONNECTIONS = 64
FSYNC_TURNS = 3
FSYNC_REQUESTS = 60_000

BATCH_ITEMS = 128
BATCH_CONNECTIONS = 4
BATCH_SECONDS = 3.0
BATCH_TURNS = 3


def encrypt() -> list[Row]:
    """Ratio of the medians of requests per second, ours to the yardstick's. Raises MissingProgramError."""
    programs.need("go", "h2load")
    with (
        programs.workplace() as directory,
        programs.minikms(directory) as ours,
        programs.yardstick(directory) as theirs,
    ):
        body = directory / "body.json"
        body.write_bytes(_item(_new_key(ours)))
        return [_compared(ours, theirs, body, *row) for row in CONNECTIONS_AND_BUDGET]


def encrypt_fsync() -> list[Row]:
    """Requests per second under each policy of when audit lines are synced, the daemons in turns."""
    programs.need("h2load")
    with contextlib.ExitStack() as started:
        bodies: dict[str, tuple[str, Path]] = {}
        for policy in FSYNC_POLICIES:
            own = started.enter_context(programs.workplace())
            path = started.enter_context(programs.minikms(own, "--audit-fsync", policy))
            body = own / "body.json"
            body.write_bytes(_item(_new_key(path)))
            _requests_per_second(path, body, FSYNC_CONNECTIONS, REQUESTS_TO_WARM_UP)
            bodies[policy] = path, body
        turns: dict[str, list[float]] = {policy: [] for policy in FSYNC_POLICIES}
        for turn in range(FSYNC_TURNS):
            for policy, (path, body) in bodies.items():
                turns[policy].append(_requests_per_second(path, body, FSYNC_CONNECTIONS, FSYNC_REQUESTS))
            rates = ", ".join(f"{policy} {figure(rates[-1])}/s" for policy, rates in turns.items())
            say(f"encrypt by fsync policy, turn {turn + 1}: {rates}")
    what = f"`/encrypt`, {PLAINTEXT_BYTES} B, {FSYNC_CONNECTIONS} connections, `--audit-fsync"
    note = f"median of {FSYNC_TURNS} turns"
    return [
        Row(f"{what} {policy}`", statistics.median(rates), "requests/s", note=note) for policy, rates in turns.items()
    ]


def encrypt_batch() -> list[Row]:
    """Items per second of one daemon."""
    with programs.workplace() as directory, programs.minikms(directory) as path:
        item = json.loads(_item(_new_key(path)))
        items = {"items": [item] * BATCH_ITEMS}
        with Connection(path) as connection:
            answer = connection.call("POST", "/encrypt_batch", items)
        if sum("ciphertext" in one for one in answer["items"]) != BATCH_ITEMS:
            raise BenchError(f"/encrypt_batch refused items: {answer['items'][:2]}")
        request = load.post("/encrypt_batch", json.dumps(items).encode())
        turns = []
        for turn in range(BATCH_TURNS):
            done = load.generate(path, [request] * BATCH_CONNECTIONS, BATCH_SECONDS)
            turns.append(done.per_second * BATCH_ITEMS)
            say(f"encrypt_batch, turn {turn + 1}: {figure(turns[-1])} items/s")
    what = f"`/encrypt_batch`, {BATCH_ITEMS} × {PLAINTEXT_BYTES} B"
    note = f"median of {BATCH_TURNS} turns, {BATCH_CONNECTIONS} connections"
    return [Row(what, statistics.median(turns), "items/s", 200_000, 350_000, note=note)]


def _new_key(path: str) -> str:
    with Connection(path) as connection:
        key_id: str = connection.call("POST", "/create_dek_for_thread", {"thread_id": "bench"})["key_id"]
    return key_id


def _item(key_id: str) -> bytes:
    plaintext = base64.b64encode(os.urandom(PLAINTEXT_BYTES)).decode()
    return json.dumps({"key_id": key_id, "plaintext": plaintext}).encode()


def _compared(ours: str, theirs: str, body: Path, connections: int, floor: float, goal: float) -> Row:
    for path in (ours, theirs):
        _requests_per_second(path, body, connections, REQUESTS_TO_WARM_UP)
    turns: dict[str, list[float]] = {ours: [], theirs: []}
    for turn in range(TURNS):
        for path in (ours, theirs):
            turns[path].append(_requests_per_second(path, body, connections, REQUESTS_PER_TURN))
        say(
            f"encrypt, {connections} connections, turn {turn + 1}: "
            f"{figure(turns[ours][-1])}/s, yardstick {figure(turns[theirs][-1])}/s"
        )
    median_ours, median_theirs = statistics.median(turns[ours]), statistics.median(turns[theirs])
    return Row(
        f"`/encrypt`, {PLAINTEXT_BYTES} B, {connections} connections, against Go",
        median_ours / median_theirs,
        "×",
        floor,
        goal,
        note=f"{figure(median_ours)}/s to {figure(median_theirs)}/s, medians of {TURNS} turns",
    )


def _requests_per_second(path: str, body: Path, connections: int, requests: int) -> float:
    command = ["h2load", "--h1", "-n", str(requests), "-c", str(connections), "-t", "1", "-d", str(body)]
    command += ["-H", "content-type: application/json", f"--base-uri=unix:{path}", "http://bench/encrypt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    rate = re.search(r"finished in .*?, ([0-9.]+) req/s", done.stdout)
    succeeded = re.search(r"status codes: (\d+) 2xx", done.stdout)
    if rate is None or succeeded is None or int(succeeded[1]) != requests:
        raise BenchError(
            f"not every request of h2load was answered with 2xx:\n{done.stdout[-600:]}{done.stderr[-600:]}"
        )
    return float(rate[1])
