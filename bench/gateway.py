"""`/encrypt` and `/encrypt_batch` through the gateway with a client certificate, of the same over the socket; and the
transit API, of the same through the gateway.

Ratios: both in turns, in one run, under the Go program of bench/tlsload, since h2load shows no certificate. Needs
root, because the gateway is another user than the key service.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
TRANSIT_FLOOR = 0.8
"""As a part of the rate of the native request."""
SOURCE = Path(__file__).parent / "tlsload"


class _Through:
    """A daemon and a gateway, and the commands that put load on them."""

    def __init__(self, directory: Path, pair: Pair) -> None:
        self.pair = pair
        self._directory = directory
        self._generator = _built(directory)
        self._shown = [*map(str, pair.client().write(directory))]

    def command(self, request: bytes, connections: int, count: int, *, socket: bool = False) -> list[str]:
        file = self._directory / f"request-{len(list(self._directory.iterdir()))}"
        file.write_bytes(request)
        gateway = [f"127.0.0.1:{self.pair.gateway.port}", HOST, str(self.pair.gateway.ca_file), *self._shown]
        at = [f"unix:{self.pair.daemon.socket}"] if socket else gateway
        return [str(self._generator), *at, str(connections), str(count), str(file)]

    def compared(
        self, what: str, ours: list[str], theirs: list[str], names: str, floor: float, goal: float | None = None
    ) -> Row:
        """A row of the ratio of two commands, which take turns."""
        turns: list[tuple[float, float]] = []
        for turn in range(TURNS):
            turns.append((_rate(ours), _rate(theirs)))
            say(f"{names}, turn {turn + 1}: {' to '.join(f'{figure(rate)}/s' for rate in turns[-1])}")
        one, other = (statistics.median(rates) for rates in zip(*turns, strict=True))
        note = f"{figure(one)}/s to {figure(other)}/s, medians of {TURNS} turns"
        return Row(what, one / other, "×", floor, goal, note=note)


@contextlib.contextmanager
def _through(**how: Any) -> Iterator[_Through]:
    """Raises MissingProgramError."""
    programs.need("go")
    if os.geteuid() != 0 or not needs.runs_as(GATEWAY):
        raise MissingProgramError("needs root, and a checkout that every user can read")
    with programs.workplace() as directory, Pair(**how) as pair:
        yield _Through(directory, pair)


def encrypt() -> list[Row]:
    """Raises MissingProgramError."""
    with _through() as through:
        with through.pair.gateway.caller(through.pair.client()) as caller:
            key_id = caller.post("/create_dek_for_thread", {"thread_id": "bench"}).body["key_id"]
        plaintext = os.urandom(PLAINTEXT_BYTES)
        item = json.dumps({"key_id": key_id, "plaintext": base64.b64encode(plaintext).decode()}).encode()
        batch = msgspec.msgpack.encode([[[key_id, plaintext]] * BATCH_ITEMS])
        packed = load.post("/encrypt_batch", batch, {"Content-Type": "application/msgpack"})
        rows = []
        for kind, what, request, *size in (
            ("one", "`/encrypt`", load.post("/encrypt", item), CONNECTIONS, REQUESTS_PER_TURN),
            ("batch", f"`/encrypt_batch` of {BATCH_ITEMS}", packed, BATCH_CONNECTIONS, BATCHES_PER_TURN),
        ):
            title = f"{what}, {PLAINTEXT_BYTES} B, {size[0]} connections, through the gateway, of the socket"
            commands = through.command(request, *size), through.command(request, *size, socket=True)
            rows.append(through.compared(title, *commands, f"{kind}: gateway to socket", *BUDGETS[kind]))
        return rows


def transit() -> list[Row]:
    """Both bodies are JSON. Raises MissingProgramError."""
    with _through(tables="[transit]\n") as through:
        with through.pair.gateway.caller(through.pair.client()) as caller:
            key_id = caller.post("/create_dek_for_thread", {"thread_id": "bench"}).body["key_id"]
            caller.post("/v1/transit/keys/bench", {})
        item = {"plaintext": base64.b64encode(os.urandom(PLAINTEXT_BYTES)).decode()}
        native = item | {"key_id": key_id}
        rows = []
        for what, ours, path, theirs, *size in (
            ("`encrypt`", item, "/encrypt", native, CONNECTIONS, REQUESTS_PER_TURN // 4),
            (
                f"`batch_input` of {BATCH_ITEMS}",
                {"batch_input": [item] * BATCH_ITEMS},
                "/encrypt_batch",
                {"items": [native] * BATCH_ITEMS},
                BATCH_CONNECTIONS,
                BATCHES_PER_TURN // 4,
            ),
        ):
            commands = (
                through.command(load.post("/v1/transit/encrypt/bench", json.dumps(ours).encode()), *size),
                through.command(load.post(path, json.dumps(theirs).encode()), *size),
            )
            title = (
                f"{what} of transit, {PLAINTEXT_BYTES} B, {size[0]} connections, of `{path}`, both through the gateway"
            )
            rows.append(through.compared(title, *commands, f"{what}: transit to native", TRANSIT_FLOOR))
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
