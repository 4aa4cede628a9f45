"""A store in PostgreSQL against one in RocksDB: two message servers take turns, and each turn is compared with the one
beside it.

Both sync to the same disk before they acknowledge. The database, the servers, their key services and the load generator
share the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections.abc import Iterator
from typing import Final

from bench import messages, programs
from bench.calls import Connection
from bench.programs import MissingProgramError
from bench.report import Row, figure, say
from tests.harness import postgres as harness
from tests.harness.postgres import url_of

CONNECTIONS: Final = (64, 16, 1)
TURNS: Final = 5
REQUESTS: Final = {64: 10_000, 16: 8_000, 1: 1_000}
"""Of one turn, by connections."""
APPEND_FLOOR: Final = 0.25
LIST_CEILING: Final = 3.0
MEMORY: Final = ("shared_buffers=256MB",)
"""What a small server of one's own has."""


def store() -> list[Row]:
    """Appends a second of RocksDB's, and the time of a list of its time."""
    with _both() as (rocks, database):
        rows = [_append(rocks, database, connections) for connections in CONNECTIONS]
        return [*rows, _listing(rocks, database)]


@contextlib.contextmanager
def _both() -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    try:
        from progressdb_server.store.postgres import tables  # here: it needs an extra
    except ImportError:
        raise MissingProgramError("needs asyncpg (the extra `postgresql`)") from None
    with contextlib.ExitStack() as started:
        own, other = (started.enter_context(programs.workplace()) for _ in range(2))
        settings, _ = started.enter_context(harness.running(MEMORY))
        url = url_of(settings)
        asyncio.run(tables.init(url))
        started.enter_context(programs.minikms(other))
        rocks = started.enter_context(programs.progressdb(own))
        yield rocks, started.enter_context(programs.progressdb(other, database=url))


def _append(rocks: tuple[str, int], database: tuple[str, int], connections: int) -> Row:
    threads: dict[tuple[str, int], list[str]] = {}
    for address in (rocks, database):
        with Connection(address) as connection:
            threads[address] = [messages.new_thread(connection, n) for n in range(connections)]
    rates: dict[tuple[str, int], list[float]] = {rocks: [], database: []}
    stored = dict.fromkeys(rates, 0)
    with programs.workplace() as directory:
        for turn in range(TURNS + 1):
            for address in (rocks, database) if turn % 2 else (database, rocks):
                run = messages.under_h2load(address, threads[address], directory, REQUESTS[connections])
                stored[address] += len(run.latencies_ms)
                if turn:  # the one before the first warms up
                    rates[address].append(run.per_second)
    for address, count in stored.items():
        with Connection(address) as connection:
            messages.check_stored(connection, threads[address], count)
    ratio = statistics.median(mine / its for mine, its in zip(rates[database], rates[rocks], strict=True))
    ours, theirs = (figure(statistics.median(rates[address])) for address in (database, rocks))
    say(f"append, {connections} connections: PostgreSQL {ours}/s, RocksDB {theirs}/s")
    what = f"message append in PostgreSQL, {connections} connections, of that in RocksDB"
    return Row(what, ratio, "×", APPEND_FLOOR, note=f"median of {TURNS} pairs of turns; {ours}/s to {theirs}/s")


def _listing(rocks: tuple[str, int], database: tuple[str, int]) -> Row:
    with Connection(rocks) as to_rocks, Connection(database) as to_database:
        pairs = [
            (connection, messages.filled_thread(connection, address))
            for connection, address in ((to_rocks, rocks), (to_database, database))
        ]
        medians_ms: list[list[float]] = [[], []]
        for turn in range(TURNS + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                took_ms = messages.list_times(*pairs[which])
                if turn:
                    medians_ms[which].append(statistics.median(took_ms))
    ratio = statistics.median(mine / its for its, mine in zip(*medians_ms, strict=True))
    theirs, ours = (figure(statistics.median(each)) for each in medians_ms)
    what = f"list {messages.LIST_MESSAGES:,} messages from PostgreSQL, of the time from RocksDB"
    note = f"median of {TURNS} pairs of turns; {ours} ms to {theirs} ms"
    return Row(what, ratio, "×", LIST_CEILING, less_is_better=True, note=note)
