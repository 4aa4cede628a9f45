"""`/encrypt` and `/encrypt_batch` of the key service, alone, audit on.

`/encrypt` is a ratio: the daemon and the Go yardstick, or a peer, in turns, in one run, under the same h2load. A single
figure would say more about the machine than about the daemon.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from bench import load, programs
from bench.calls import Address, Connection, StatusError
from bench.programs import BenchError
from bench.report import Row, figure, say

PLAINTEXT_BYTES = 256
CONNECTIONS_AND_BUDGET = ((64, 1.3, 1.6), (16, 1.05, 1.3), (1, 0.6, 0.75))
PEER_CONNECTIONS = (64, 16, 1)
SEAL_BYTES = 40
"""Nonce (24) and tag (16)."""
PEER_SEAL_BYTES_MIN = 28
"""The nonce of the yardstick is shorter."""
TURNS = 5
REQUESTS_PER_TURN = 120_000
REQUESTS_PER_TURN_OF_ONE = 40_000
"""Of one connection, which does not keep two processors busy."""
REQUESTS_TO_WARM_UP = 20_000

FSYNC_POLICIES = ("never", "interval", "turn")
FSYNC_CONNECTIONS = 64
FSYNC_TURNS = 3
FSYNC_REQUESTS = 60_000

BATCH_ITEMS = 128
BATCH_CONNECTIONS = 4
BATCH_SECONDS = 3.0
BATCH_TURNS = 3
BATCH_BUDGETS = {"msgpack": (450_000, 650_000), "JSON": (200_000, 350_000)}
"""Floor and goal in items per second."""
MSGPACK = "application/msgpack"


@dataclass(frozen=True)
class Target:
    """A service, and the file with the body that is posted to its `/encrypt`."""

    name: str
    address: Address
    body: Path


def target(name: str, address: Address, directory: Path) -> Target:
    """Makes a key in the service, where it has keys, and checks that it encrypts. Raises BenchError."""
    with Connection(address) as connection:
        try:
            key_id = str(connection.call("POST", "/create_dek_for_thread", {"thread_id": "bench"})["key_id"])
        except StatusError as error:
            if error.status != 404:
                raise
            key_id = "bench"  # a service with a single key
        item = _item(key_id)
        sealed = connection.call("POST", "/encrypt", json.loads(item))
    try:
        length = len(base64.b64decode(sealed["ciphertext"], validate=True))
    except (KeyError, TypeError, binascii.Error):
        length = 0
    if length < PLAINTEXT_BYTES + PEER_SEAL_BYTES_MIN:
        raise BenchError(f"{name} answered /encrypt with something other than nonce, ciphertext and tag in base64")
    body = directory / f"{name}.json"
    body.write_bytes(item)
    return Target(name, address, body)


def peer_address(url: str) -> Address:
    """Of `unix:PATH` or `http://HOST:PORT`. Raises ValueError."""
    if url.startswith("unix:") and len(url) > len("unix:"):
        return url.removeprefix("unix:")
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.username:
        raise ValueError("a peer is unix:PATH or http://HOST:PORT")
    return parts.hostname, parts.port or 80


def against_peer(url: str) -> list[Row]:
    """As `encrypt`, with a running service that has the API of the seed in the place of the yardstick."""
    programs.need("h2load")
    address = peer_address(url)
    with programs.workplace() as directory, programs.minikms(directory) as path:
        ours, theirs = target("minikms", path, directory), target("peer", address, directory)
        return [_compared(ours, theirs, connections) for connections in PEER_CONNECTIONS]


def encrypt() -> list[Row]:
    """Ratio of the medians of requests per second, ours to the yardstick's. Raises MissingProgramError."""
    programs.need("go", "h2load")
    with (
        programs.workplace() as directory,
        programs.minikms(directory) as ours,
        programs.yardstick(directory) as theirs,
    ):
        both = target("minikms", ours, directory), target("Go", theirs, directory)
        return [_compared(*both, connections, *budget) for connections, *budget in CONNECTIONS_AND_BUDGET]


def encrypt_fsync() -> list[Row]:
    """Requests per second under each policy of when audit lines are synced, the daemons in turns."""
    programs.need("h2load")
    with contextlib.ExitStack() as started:
        targets: dict[str, Target] = {}
        for policy in FSYNC_POLICIES:
            own = started.enter_context(programs.workplace())
            path = started.enter_context(programs.minikms(own, "--audit-fsync", policy))
            targets[policy] = target(policy, path, own)
            rate(targets[policy], FSYNC_CONNECTIONS, REQUESTS_TO_WARM_UP)
        turns: dict[str, list[float]] = {policy: [] for policy in FSYNC_POLICIES}
        for turn in range(FSYNC_TURNS):
            for policy, one in targets.items():
                turns[policy].append(rate(one, FSYNC_CONNECTIONS, FSYNC_REQUESTS))
            rates = ", ".join(f"{policy} {figure(rates[-1])}/s" for policy, rates in turns.items())
            say(f"encrypt by fsync policy, turn {turn + 1}: {rates}")
    what = f"`/encrypt`, {PLAINTEXT_BYTES} B, {FSYNC_CONNECTIONS} connections, `--audit-fsync"
    note = f"median of {FSYNC_TURNS} turns"
    return [
        Row(f"{what} {policy}`", statistics.median(rates), "requests/s", note=note) for policy, rates in turns.items()
    ]


def encrypt_batch() -> list[Row]:
    """Items per second of one daemon, with MessagePack and with JSON in turns."""
    with programs.workplace() as directory, programs.minikms(directory) as path:
        item = json.loads(_item(_new_key(path)))
        items = {"items": [item] * BATCH_ITEMS}
        array = [[[item["key_id"], base64.b64decode(item["plaintext"])]] * BATCH_ITEMS]
        with Connection(path) as connection:
            answer = connection.call("POST", "/encrypt_batch", items)
        if sum("ciphertext" in one for one in answer["items"]) != BATCH_ITEMS:
            raise BenchError(f"/encrypt_batch refused items: {answer['items'][:2]}")
        _check_array_answer(path, array)
        requests = {
            "msgpack": load.post("/encrypt_batch", msgspec.msgpack.encode(array), {"Content-Type": MSGPACK}),
            "JSON": load.post("/encrypt_batch", json.dumps(items).encode()),
        }
        turns: dict[str, list[float]] = {form: [] for form in requests}
        for turn in range(BATCH_TURNS):
            for form, request in requests.items():
                done = load.generate(path, [request] * BATCH_CONNECTIONS, BATCH_SECONDS)
                turns[form].append(done.per_second * BATCH_ITEMS)
            rates = ", ".join(f"{form} {figure(rates[-1])} items/s" for form, rates in turns.items())
            say(f"encrypt_batch, turn {turn + 1}: {rates}")
    what = f"`/encrypt_batch`, {BATCH_ITEMS} × {PLAINTEXT_BYTES} B"
    note = f"median of {BATCH_TURNS} turns, {BATCH_CONNECTIONS} connections"
    return [
        Row(f"{what}, {form}", statistics.median(turns[form]), "items/s", *BATCH_BUDGETS[form], note=note)
        for form in requests
    ]


def _check_array_answer(path: str, array: object) -> None:
    """Raises BenchError unless every item of a batch in MessagePack is encrypted."""
    with Connection(path) as connection:
        connection.request("POST", "/encrypt_batch", msgspec.msgpack.encode(array), {"Content-Type": MSGPACK})
        response = connection.getresponse()
        body = response.read()
    if response.status != 200 or response.headers["Content-Type"] != MSGPACK:
        raise BenchError(f"/encrypt_batch does not answer MessagePack: {response.status} {body[:200]!r}")
    [found] = msgspec.msgpack.decode(body, type=tuple[list[bytes]])
    if [len(one) for one in found] != [PLAINTEXT_BYTES + SEAL_BYTES] * BATCH_ITEMS:
        raise BenchError("/encrypt_batch answered MessagePack without nonce, ciphertext and tag for each item")


def _new_key(path: str) -> str:
    with Connection(path) as connection:
        key_id: str = connection.call("POST", "/create_dek_for_thread", {"thread_id": "bench"})["key_id"]
    return key_id


def _item(key_id: str) -> bytes:
    plaintext = base64.b64encode(os.urandom(PLAINTEXT_BYTES)).decode()
    return json.dumps({"key_id": key_id, "plaintext": plaintext}).encode()


def _compared(
    ours: Target, theirs: Target, connections: int, floor: float | None = None, goal: float | None = None
) -> Row:
    for one in (ours, theirs):
        rate(one, connections, REQUESTS_TO_WARM_UP)
    requests = REQUESTS_PER_TURN if connections > 1 else REQUESTS_PER_TURN_OF_ONE
    turns: dict[Target, list[float]] = {ours: [], theirs: []}
    for turn in range(TURNS):
        for one in (ours, theirs):
            turns[one].append(rate(one, connections, requests))
        say(
            f"encrypt, {_counted(connections)}, turn {turn + 1}: "
            f"{figure(turns[ours][-1])}/s, {theirs.name} {figure(turns[theirs][-1])}/s"
        )
    median_ours, median_theirs = statistics.median(turns[ours]), statistics.median(turns[theirs])
    return Row(
        f"`/encrypt`, {PLAINTEXT_BYTES} B, {_counted(connections)}, against {theirs.name}",
        median_ours / median_theirs,
        "×",
        floor,
        goal,
        note=f"{figure(median_ours)}/s to {figure(median_theirs)}/s, medians of {TURNS} turns",
    )


def _counted(connections: int) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


def rate(one: Target, connections: int, requests: int) -> float:
    """Requests per second of h2load. Raises BenchError unless every one got 2xx."""
    command = ["h2load", "--h1", "-n", str(requests), "-c", str(connections), "-t", "1", "-d", str(one.body)]
    command += ["-H", "content-type: application/json"]
    if isinstance(one.address, str):
        command += [f"--base-uri=unix:{one.address}", "http://bench/encrypt"]
    else:
        host, port = one.address
        command.append(f"http://{f'[{host}]' if ':' in host else host}:{port}/encrypt")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r"finished in .*?, ([0-9.]+) req/s", done.stdout)
    succeeded = re.search(r"status codes: (\d+) 2xx", done.stdout)
    if found is None or succeeded is None or int(succeeded[1]) != requests:
        raise BenchError(
            f"not every request of h2load was answered with 2xx:\n{done.stdout[-600:]}{done.stderr[-600:]}"
        )
    return float(found[1])
