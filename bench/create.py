"""Creating DEKs: `/create_dek_for_thread` over bare connections, and through the client's pool.

Every create is answered after its key is durable. Afterwards the daemon must list as many keys as were acknowledged.
"""

from __future__ import annotations

import asyncio
import time

import uvloop

from bench import load, programs
from bench.calls import Connection
from bench.programs import BenchError
from bench.report import Row, figure
from minikms.client import AsyncClient

CONNECTIONS = 64
SECONDS = 4.0
TURNS = 3


def create() -> list[Row]:
    """Raises BenchError when an acknowledged key is missing."""
    bare: list[float] = []
    pooled: list[float] = []
    with programs.workplace() as directory, programs.minikms(directory) as path:
        requests = [
            load.post("/create_dek_for_thread", b'{"thread_id":"t%d"}' % number) for number in range(CONNECTIONS)
        ]
        made = 0
        for _ in range(TURNS):
            turn = load.generate(path, requests, SECONDS)
            bare.append(turn.per_second)
            count, seconds = uvloop.run(through_pool(path, SECONDS))
            pooled.append(count / seconds)
            made += sum(turn.answers) + count
        with Connection(path) as connection:
            keys = connection.call("GET", "/status")["keys"]["by_state"]["active"]
        if keys != made:
            raise BenchError(f"{made:,} keys were acknowledged, and there are {keys:,}")
    return [
        Row(
            f"creating DEKs, {CONNECTIONS} connections",
            sorted(bare)[TURNS // 2],
            "keys/s",
            8_000,
            15_000,
            note=f"median of {TURNS} turns; {figure(sorted(pooled)[TURNS // 2])}/s from {CONNECTIONS} tasks that share "
            "one `AsyncClient`",
        )
    ]


async def through_pool(path: str, seconds: float) -> tuple[int, float]:
    """The number of keys that as many tasks as connections made through one client, and the seconds it took."""
    began = time.perf_counter()

    async def one(kms: AsyncClient, thread_id: str) -> int:
        count = 0
        while time.perf_counter() - began < seconds:
            await kms.create_dek_for_thread(thread_id)
            count += 1
        return count

    async with AsyncClient(path) as kms:
        counts = await asyncio.gather(*(one(kms, f"p{number}") for number in range(CONNECTIONS)))
    return sum(counts), time.perf_counter() - began
