"""Messages through the server: durable encrypted appends, and reading a conversation back.

The server, the key service that it spawns and the load generator share the machine's cores, as the budget says.
"""

from __future__ import annotations

import json
import secrets
import statistics
import time

from bench import load, programs
from bench.calls import Connection
from bench.programs import BACKEND_KEY, BenchError
from bench.report import Row, figure, say

BODY_CHARS = 256
CONNECTIONS = 64
APPEND_SECONDS = 5.0
APPEND_TURNS = 3
WARM_UP_SECONDS = 1.0

LIST_MESSAGES = 1000
LIST_TURNS = 50
SETUP_CONNECTIONS = 20


def append() -> list[Row]:
    """Acknowledged appends per second, a thread for each connection; afterwards everything acknowledged is there."""
    with (
        programs.workplace() as directory,
        programs.progressdb(directory) as address,
        Connection(address) as connection,
    ):
        threads = [_new_thread(connection, n) for n in range(CONNECTIONS)]
        requests = [_append_request(thread) for thread in threads]
        runs = [load.generate(address, requests, WARM_UP_SECONDS)]
        for turn in range(APPEND_TURNS):
            runs.append(load.generate(address, requests, APPEND_SECONDS))
            say(f"append, turn {turn + 1}: {figure(runs[-1].per_second)} requests/s")
        for n in range(0, CONNECTIONS, CONNECTIONS // 4):
            acknowledged, stored = sum(run.answers[n] for run in runs), len(_messages(connection, threads[n]))
            if stored != acknowledged:
                raise BenchError(f"{acknowledged} appends were acknowledged in {threads[n]}, {stored} are there")
    measured = runs[1:]
    latencies = sorted(ms for run in measured for ms in run.latencies_ms)
    half, most = figure(statistics.median(latencies)), figure(latencies[len(latencies) * 99 // 100])
    note = f"median of {APPEND_TURNS} turns of {APPEND_SECONDS:.0f} s; half answered in {half} ms, 99 % in {most} ms"
    what = f"message append, {BODY_CHARS} B, encrypted, fsynced, {CONNECTIONS} connections"
    return [Row(what, statistics.median(run.per_second for run in measured), "requests/s", 9_000, 16_000, note=note)]


def listing() -> list[Row]:
    """Milliseconds for one thread's messages, from request to the last byte."""
    with (
        programs.workplace() as directory,
        programs.progressdb(directory) as address,
        Connection(address) as connection,
    ):
        thread = _new_thread(connection, 0)
        request = _append_request(thread)
        stored = 0
        while stored < LIST_MESSAGES:
            count = min(SETUP_CONNECTIONS, LIST_MESSAGES - stored)
            stored += sum(load.generate(address, [request] * count, 0.0).answers)
        took_ms = []
        for _ in range(LIST_TURNS):
            start = time.perf_counter()
            count = len(_messages(connection, thread))
            took_ms.append((time.perf_counter() - start) * 1000)
            if count != LIST_MESSAGES:
                raise BenchError(f"{LIST_MESSAGES} messages were stored, {count} came back")
    median = statistics.median(took_ms)
    say(f"list: {figure(median)} ms")
    what = f"list {LIST_MESSAGES:,} messages of {BODY_CHARS} B"
    note = f"median of {LIST_TURNS}, the client's JSON decoding included"
    return [Row(what, median, "ms", 20, 8, less_is_better=True, note=note)]


def _new_thread(connection: Connection, number: int) -> str:
    thread: str = connection.call("POST", "/v1/threads", {"title": f"bench {number}"})["id"]
    return thread


def _append_request(thread: str) -> bytes:
    body = {"thread": thread, "author": "bench", "body": {"text": secrets.token_hex(BODY_CHARS // 2)}}
    return load.post("/v1/messages", json.dumps(body).encode(), {"X-API-Key": BACKEND_KEY, "X-User-ID": "bench"})


def _messages(connection: Connection, thread: str) -> list[object]:
    messages: list[object] = connection.call("GET", f"/v1/messages?thread={thread}")["messages"]
    return messages
