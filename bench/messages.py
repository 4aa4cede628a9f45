"""Messages through the server: durable encrypted appends, what of their time is encryption, and reading back.

The server, the key service that it spawns and the load generator share the machine's cores, as the budget says.
"""

from __future__ import annotations

import json
import secrets
import statistics
import time
from pathlib import Path

from bench import h2load, load, programs
from bench.calls import Connection
from bench.programs import BACKEND_KEY, BenchError
from bench.report import Row, figure, say

BODY_CHARS = 256
CONNECTIONS = 64
FEW_CONNECTIONS = 16
APPEND_TURNS = 3
APPEND_REQUESTS = 40_000
WARM_UP_REQUESTS = 5_000
APPEND_SECONDS = 5.0
WARM_UP_SECONDS = 1.0
"""The seconds are for the generator in Python, the requests for h2load."""

ADDED_TURNS = 7
ADDED_REQUESTS = 12_000
ADDED_SECONDS = 1.5
"""Of each turn, with encryption and without."""

AGAINST_TURNS = 9
AGAINST_REQUESTS = 10_000
AGAINST_SECONDS = 2.0

LIST_MESSAGES = 1000
LIST_TURNS = 50
SETUP_CONNECTIONS = 20


def append() -> list[Row]:
    """Acknowledged appends per second, each connection with a thread of its own; afterwards everything acknowledged is
    there.
    """
    return [_append(CONNECTIONS, 13_000, 20_000), _append(FEW_CONNECTIONS)]


def _append(connections: int, floor: float | None = None, goal: float | None = None) -> Row:
    with (
        programs.workplace() as directory,
        programs.progressdb(directory) as address,
        Connection(address) as connection,
    ):
        threads = [new_thread(connection, n) for n in range(connections)]
        appends = _appends_of_h2load if h2load.installed() else _appends_of_python
        rates, latencies_ms, generator = appends(address, threads, directory)
        acknowledged = len(latencies_ms)
        check_stored(connection, threads, acknowledged)
    measured_ms = sorted(latencies_ms)
    half, most = figure(statistics.median(measured_ms)), figure(measured_ms[len(measured_ms) * 99 // 100])
    note = f"median of {len(rates)} turns under {generator}; half answered in {half} ms, 99 % in {most} ms"
    what = f"message append, {BODY_CHARS} B, encrypted, fsynced, {connections} connections"
    return Row(what, statistics.median(rates), "requests/s", floor, goal, note=note)


def append_added() -> list[Row]:
    """Milliseconds that encryption adds to the median append: the same load against a server with and one without it.

    They take turns, so that what else the machine does meets both; each turn is compared with the one beside it.
    """
    with (
        programs.workplace() as directory,
        programs.progressdb(directory) as encrypting,
        programs.progressdb(directory, encrypting=False) as bare,
        Connection(encrypting) as to_encrypting,
        Connection(bare) as to_bare,
    ):
        connections = {encrypting: to_encrypting, bare: to_bare}
        threads = {address: [new_thread(each, n) for n in range(CONNECTIONS)] for address, each in connections.items()}
        acknowledged = dict.fromkeys(connections, 0)
        medians_ms: dict[tuple[str, int], list[float]] = {address: [] for address in connections}
        for turn in range(ADDED_TURNS + 1):
            for address in (encrypting, bare) if turn % 2 else (bare, encrypting):
                latencies_ms = _one_turn(address, threads[address], directory)
                acknowledged[address] += len(latencies_ms)
                if turn:  # the one before the first warms up
                    medians_ms[address].append(statistics.median(latencies_ms))
        for address, connection in connections.items():
            check_stored(connection, threads[address], acknowledged[address])
    added_ms = [with_it - without for with_it, without in zip(medians_ms[encrypting], medians_ms[bare], strict=True)]
    with_it, without = (figure(statistics.median(medians_ms[address])) for address in (encrypting, bare))
    say(f"append: half answered in {with_it} ms, {without} ms without encryption")
    what = f"added to the median append at {CONNECTIONS} connections by encryption"
    note = f"median of {ADDED_TURNS} pairs of turns under {_generator()}; {with_it} ms with it, {without} ms without"
    return [Row(what, statistics.median(added_ms), "ms", 4, less_is_better=True, note=note)]


def append_against(checkout: Path) -> list[Row]:
    """Appends per second, of those of another checkout of this project: the two servers take turns, and each turn is
    compared with the one beside it.
    """
    return [_append_against(checkout, CONNECTIONS), _append_against(checkout, FEW_CONNECTIONS, 1.2, 1.6)]


def _append_against(checkout: Path, connections: int, floor: float | None = None, goal: float | None = None) -> Row:
    with (
        programs.workplace() as own,
        programs.workplace() as other,
        programs.progressdb(own) as here,
        programs.progressdb(other, checkout=checkout) as there,
        Connection(here) as to_here,
        Connection(there) as to_there,
    ):
        places = {here: own, there: other}
        to = {here: to_here, there: to_there}
        threads = {address: [new_thread(each, n) for n in range(connections)] for address, each in to.items()}
        rates: dict[tuple[str, int], list[float]] = {here: [], there: []}
        for turn in range(AGAINST_TURNS + 1):
            for address in (here, there) if turn % 2 else (there, here):
                rate = _rate(address, threads[address], places[address])
                if turn:  # the one before the first warms up
                    rates[address].append(rate)
            if turn:
                ours, theirs = figure(rates[here][-1]), figure(rates[there][-1])
                say(f"append, {connections} connections, turn {turn}: {ours}/s, {checkout} {theirs}/s")
    ratio = statistics.median(mine / others for mine, others in zip(rates[here], rates[there], strict=True))
    ours, theirs = (figure(statistics.median(rates[address])) for address in (here, there))
    what = f"message append, {connections} connections, of that of another checkout"
    note = f"median of {AGAINST_TURNS} pairs of turns under {_generator()}; {ours}/s to {theirs}/s"
    return Row(what, ratio, "×", floor, goal, note=note)


def list_against(checkout: Path) -> list[Row]:
    """Lists of LIST_MESSAGES messages per second, of those of another checkout: as `append_against`."""
    with (
        programs.workplace() as own,
        programs.workplace() as other,
        programs.progressdb(own) as here,
        programs.progressdb(other, checkout=checkout) as there,
        Connection(here) as to_here,
        Connection(there) as to_there,
    ):
        pairs = [
            (connection, filled_thread(connection, address))
            for connection, address in ((to_here, here), (to_there, there))
        ]
        medians_ms: list[list[float]] = [[], []]
        for turn in range(AGAINST_TURNS + 1):
            for which in (0, 1) if turn % 2 else (1, 0):
                took_ms = list_times(*pairs[which])
                if turn:  # the one before the first warms up
                    medians_ms[which].append(statistics.median(took_ms))
    ratio = statistics.median(theirs / ours for ours, theirs in zip(*medians_ms, strict=True))
    ours, theirs = (figure(statistics.median(each)) for each in medians_ms)
    what = f"list {LIST_MESSAGES:,} messages, of the rate of another checkout"
    return [Row(what, ratio, "×", 0.98, note=f"median of {AGAINST_TURNS} pairs of turns; {ours} ms to {theirs} ms")]


def _rate(address: tuple[str, int], threads: list[str], directory: Path) -> float:
    """Appends per second, each connection with a thread of its own."""
    if h2load.installed():
        return under_h2load(address, threads, directory, AGAINST_REQUESTS).per_second
    return load.generate(address, [_append_request(thread) for thread in threads], AGAINST_SECONDS).per_second


def _generator() -> str:
    return "h2load" if h2load.installed() else "Python, for want of h2load"


def _one_turn(address: tuple[str, int], threads: list[str], directory: Path) -> list[float]:
    """The milliseconds of each append."""
    if h2load.installed():
        return under_h2load(address, threads, directory, ADDED_REQUESTS).latencies_ms
    return load.generate(address, [_append_request(thread) for thread in threads], ADDED_SECONDS).latencies_ms


def under_h2load(address: tuple[str, int], threads: list[str], directory: Path, requests: int) -> h2load.Run:
    uris = [f"http://{address[0]}:{address[1]}/v1/threads/{thread}/messages" for thread in threads]
    headers = {"X-API-Key": BACKEND_KEY, "X-User-ID": "bench", "Content-Type": "application/json"}
    return h2load.post(uris, _body(), headers, connections=len(threads), requests=requests, directory=directory)


def check_stored(connection: Connection, threads: list[str], acknowledged: int) -> None:
    stored = sum(len(_messages(connection, thread)) for thread in threads)
    if stored != acknowledged:
        raise BenchError(f"{acknowledged} appends were acknowledged, {stored} messages are there")


def _appends_of_h2load(
    address: tuple[str, int], threads: list[str], directory: Path
) -> tuple[list[float], list[float], str]:
    """The rates of the turns, and the milliseconds of every append, those of the warm-up too."""
    runs = []
    for turn, requests in enumerate([WARM_UP_REQUESTS, *[APPEND_REQUESTS] * APPEND_TURNS]):
        runs.append(under_h2load(address, threads, directory, requests))
        _say_turn(len(threads), turn, runs[-1].per_second)
    return [run.per_second for run in runs[1:]], [ms for run in runs for ms in run.latencies_ms], _generator()


def _appends_of_python(
    address: tuple[str, int], threads: list[str], directory: Path
) -> tuple[list[float], list[float], str]:
    """As `_appends_of_h2load`, where that is not installed: this generator takes a core for itself."""
    requests = [_append_request(thread) for thread in threads]
    runs = []
    for turn, seconds in enumerate([WARM_UP_SECONDS, *[APPEND_SECONDS] * APPEND_TURNS]):
        runs.append(load.generate(address, requests, seconds))
        _say_turn(len(threads), turn, runs[-1].per_second)
    return (
        [run.per_second for run in runs[1:]],
        [ms for run in runs for ms in run.latencies_ms],
        _generator(),
    )


def listing() -> list[Row]:
    """Milliseconds for one thread's messages, from request to the last byte."""
    with (
        programs.workplace() as directory,
        programs.progressdb(directory) as address,
        Connection(address) as connection,
    ):
        took_ms = list_times(connection, filled_thread(connection, address))
    median = statistics.median(took_ms)
    say(f"list: {figure(median)} ms")
    what = f"list {LIST_MESSAGES:,} messages of {BODY_CHARS} B"
    note = f"median of {LIST_TURNS}, the client's JSON decoding included"
    return [Row(what, median, "ms", 8, 5, less_is_better=True, note=note)]


def filled_thread(connection: Connection, address: tuple[str, int]) -> str:
    """A thread of LIST_MESSAGES messages."""
    thread = new_thread(connection, 0)
    stored = 0
    while stored < LIST_MESSAGES:
        count = min(SETUP_CONNECTIONS, LIST_MESSAGES - stored)
        stored += sum(load.generate(address, [_append_request(thread)] * count, 0.0).answers)
    return thread


def list_times(connection: Connection, thread: str) -> list[float]:
    """The milliseconds of each of LIST_TURNS lists."""
    took_ms = []
    for _ in range(LIST_TURNS):
        start = time.perf_counter()
        count = len(_messages(connection, thread))
        took_ms.append((time.perf_counter() - start) * 1000)
        if count != LIST_MESSAGES:
            raise BenchError(f"{LIST_MESSAGES} messages were stored, {count} came back")
    return took_ms


def new_thread(connection: Connection, number: int) -> str:
    thread: str = connection.call("POST", "/v1/threads", {"title": f"bench {number}"})["id"]
    return thread


def _body() -> bytes:
    return json.dumps({"author": "bench", "body": {"text": secrets.token_hex(BODY_CHARS // 2)}}).encode()


def _say_turn(connections: int, turn: int, per_second: float) -> None:
    """`turn`: 0 warms up."""
    which = f"turn {turn}" if turn else "warming up"
    say(f"append, {connections} connections, {which}: {figure(per_second)} requests/s")


def _append_request(thread: str) -> bytes:
    return load.post(f"/v1/threads/{thread}/messages", _body(), {"X-API-Key": BACKEND_KEY, "X-User-ID": "bench"})


def _messages(connection: Connection, thread: str) -> list[object]:
    messages: list[object] = connection.call("GET", f"/v1/messages?thread={thread}")["messages"]
    return messages
