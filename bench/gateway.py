"""`/encrypt` and `/encrypt_batch` through the gateway with a client certificate, of the same over the socket.

A ratio: both in turns, in one run, under the Go program of bench/tlsload, since h2load shows no certificate. Needs
root, because the gateway is another user than the key service.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path

import msgspec

from bench import load, programs
from bench.programs import BenchError, MissingProgramError
from bench.report import Row, figure, say
from tests import needs
from tests.harness.gateways import GATEWAY, HOST, Pair

PLAINTEXT_BYTES = 256
CONNECTIONS = 64
BATCH_ITEMS = 128
BATCH_CONNECTIONS = 4
TURNS = 5
REQUESTS_PER_TURN = 40_000
BATCHES_PER_TURN = 2_000
RUN_SECONDS_MAX = 120
BUDGETS = {"one": (0.2, 0.3), "batch": (0.4, 0.6)}
"""Floor and goal, as parts of the rate over the socket."""
SOURCE = Path(__file__).parent / "tlsload"


def encrypt() -> list[Row]:
    """Raises MissingProgramError."""
    programs.need("go")
    if os.geteuid() != 0 or not needs.runs_as(GATEWAY):
        raise MissingProgramError("needs root, and a checkout that every user can read")
    with programs.workplace() as directory, Pair() as pair:
        generator = _built(directory)
        shown = pair.client().write(directory)
        with pair.gateway.caller(pair.client()) as caller:
            key_id = caller.post("/create_dek_for_thread", {"thread_id": "bench"}).body["key_id"]
        plaintext = os.urandom(PLAINTEXT_BYTES)
        item = json.dumps({"key_id": key_id, "plaintext": base64.b64encode(plaintext).decode()}).encode()
        batch = msgspec.msgpack.encode([[[key_id, plaintext]] * BATCH_ITEMS])
        rows = []
        for kind, what, request, connections, count in (
            ("one", "`/encrypt`", load.post("/encrypt", item), CONNECTIONS, REQUESTS_PER_TURN),
            (
                "batch",
                f"`/encrypt_batch` of {BATCH_ITEMS}",
                load.post("/encrypt_batch", batch, {"Content-Type": "application/msgpack"}),
                BATCH_CONNECTIONS,
                BATCHES_PER_TURN,
            ),
        ):
            file = directory / kind
            file.write_bytes(request)
            secure = [str(generator), f"127.0.0.1:{pair.gateway.port}", HOST, str(pair.gateway.ca_file)]
            secure += [*map(str, shown), str(connections), str(count), str(file)]
            plain = [str(generator), f"unix:{pair.daemon.socket}", str(connections), str(count), str(file)]
            turns: dict[str, list[float]] = {"gateway": [], "socket": []}
            for turn in range(TURNS):
                for name, command in (("gateway", secure), ("socket", plain)):
                    turns[name].append(_rate(command))
                say(f"{kind} through the gateway, turn {turn + 1}: {figure(turns['gateway'][-1])}/s, "
                    f"over the socket {figure(turns['socket'][-1])}/s")  # fmt: skip
            ours, theirs = statistics.median(turns["gateway"]), statistics.median(turns["socket"])
            rows.append(
                Row(
                    f"{what}, {PLAINTEXT_BYTES} B, {connections} connections, through the gateway, of the socket",
                    ours / theirs,
                    "×",
                    *BUDGETS[kind],
                    note=f"{figure(ours)}/s to {figure(theirs)}/s, medians of {TURNS} turns",
                )
            )
        return rows


def _built(directory: Path) -> Path:
    shutil.copytree(SOURCE, directory / "tlsload-source")
    build = ["go", "build", "-o", str(directory / "tlsload"), "."]
    built = subprocess.run(build, cwd=directory / "tlsload-source", capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise BenchError(f"go build failed: {built.stderr.strip()}")
    return directory / "tlsload"


def _rate(command: list[str]) -> float:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_SECONDS_MAX)
    if done.returncode != 0:
        raise BenchError(f"tlsload: {done.stderr.strip()}")
    return float(done.stdout)
