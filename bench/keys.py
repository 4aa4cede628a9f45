"""Many keys in a key service: how they are made, how soon a start with them serves, and what their rotation takes.

The keys are made through the API. Every figure is checked: a start has to decrypt what was encrypted before it, and
after a rotation every key is counted under the new version.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import uvloop

from bench import load, programs
from bench.calls import Connection
from bench.programs import BenchError
from bench.report import Row, figure, say

CREATING_CONNECTIONS = 256
STARTS = 5
ROTATION_SECONDS_MAX = 3600.0
POLL_SECONDS = 0.05
SAMPLE = base64.b64encode(bytes(256)).decode()
_ID = b'"key_id":"'


def make(path: str, count: int) -> list[str]:
    """Makes `count` keys, and returns their ids."""
    connections = min(CREATING_CONNECTIONS, count)
    shares = [
        itertools.repeat(
            load.post("/create_dek_for_thread", b'{"thread_id":"t%d"}' % number),
            count // connections + (number < count % connections),
        )
        for number in range(connections)
    ]
    answers = uvloop.run(_sent(path, shares))
    return [answer[answer.index(_ID) + len(_ID) :].partition(b'"')[0].decode() for answer in answers]


def encrypt_each(path: str, key_ids: Sequence[str], connections: int) -> float:
    """Seconds in which the sample is encrypted once under each key."""
    bodies = [json.dumps({"key_id": key_id, "plaintext": SAMPLE}).encode() for key_id in key_ids]
    requests = [load.post("/encrypt", body) for body in bodies]
    began = time.perf_counter()
    uvloop.run(_sent(path, [requests[number::connections] for number in range(connections)]))
    return time.perf_counter() - began


async def _sent(path: str, shares: Sequence[Iterable[bytes]]) -> list[bytes]:
    """The bodies of the answers to all requests. Each share has a connection of its own. Raises BenchError."""
    answers: list[bytes] = []

    async def one(share: Iterable[bytes]) -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        for request in share:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(load.content_length(head.lower()))
            if head[9:10] != b"2":
                raise BenchError(f"a request was answered {body[:200]!r}")
            answers.append(body)
        writer.close()

    await asyncio.gather(*(one(share) for share in shares))
    return answers


class Stored(NamedTuple):
    """Many keys in the data directory of a key service that has stopped."""

    key_id: str
    """Of one of them."""
    made_per_second: float
    seconds_to_serve: float


def stored(directory: Path, count: int) -> Stored:
    """Makes `count` keys in a new key service, and measures its later starts as `median_seconds_to_serve`."""
    with programs.minikms(directory) as path:
        say(f"making {count:,} keys")
        began = time.perf_counter()
        key_id = make(path, count)[0]
        made_per_second = count / (time.perf_counter() - began)
        sealed = sealed_sample(path, key_id)
    return Stored(key_id, made_per_second, median_seconds_to_serve(directory, key_id, sealed))


def start_row(kept: Stored, count: int, floor: float | None = None, goal: float | None = None, note: str = "") -> Row:
    """The table's row of `seconds_to_serve`, in seconds. `note` is added to what the row says."""
    return Row(
        f"encrypt and decrypt answer, {count:,} DEKs on disk, after start",
        kept.seconds_to_serve,
        "s",
        floor,
        goal,
        less_is_better=True,
        note=f"median of {STARTS} starts; keys were made at {figure(kept.made_per_second)}/s{note}",
    )


def sealed_sample(path: str, key_id: str) -> str:
    """The ciphertext of SAMPLE."""
    with Connection(path) as connection:
        ciphertext: str = connection.call("POST", "/encrypt", {"key_id": key_id, "plaintext": SAMPLE})["ciphertext"]
    return ciphertext


def median_seconds_to_serve(directory: Path, key_id: str, sealed: str) -> float:
    """Of STARTS starts of the key service in `directory`, from the start of the process to the answer of a decryption
    and an encryption."""
    return statistics.median(_seconds_to_serve(directory, key_id, sealed) for _ in range(STARTS))


def _seconds_to_serve(directory: Path, key_id: str, sealed: str) -> float:
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


def wait_for_index(path: str) -> int:
    """Returns the process id once the index of the keys is complete."""
    with Connection(path) as connection:
        while True:
            told = connection.call("GET", "/status")
            if not told["keys"]["indexing"]:
                pid: int = told["pid"]
                return pid
            time.sleep(POLL_SECONDS)


def rotate_idle(path: str, count: int) -> float:
    """Seconds of one KEK rotation while nothing else is asked of the service. Raises BenchError unless all `count`
    keys are under one version afterwards, the newest."""
    wait_for_index(path)
    with Connection(path) as connection:
        version = max(int(each) for each in connection.call("GET", "/status")["keys"]["by_kek_version"])
        connection.sock.settimeout(ROTATION_SECONDS_MAX)
        began = time.perf_counter()
        connection.call("POST", "/rotate_kek", {})
        seconds = time.perf_counter() - began
        told = connection.call("GET", "/status")["keys"]["by_kek_version"]
    if told != {str(version + 1): count}:
        raise BenchError(f"not every key is under the new version: {told}")
    return seconds


def resident_mib(pid: int) -> float:
    """Of a process, now."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
