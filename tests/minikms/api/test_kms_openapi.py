"""docs/minikms-openapi.yaml is what the code says, and what a live daemon does."""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.live_daemon import LiveDaemon
from tests.progressdb_server.api.sdk import TEST_S_MAX, environment

pytestmark = pytest.mark.timeout(TEST_S_MAX)
PROJECT = Path(__file__).resolve().parents[3]
DOCUMENT = PROJECT / "docs" / "minikms-openapi.yaml"
RUN_S_MAX = 240.0
SEED = 1
"""Of the requests in the normal suite; Schemathesis prints the seed of a run that failed."""
CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "403", "404", "409", "410"]  # no random text is a key, or opens under one
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "409", "411", "413", "415"]  # 413: too much, or too many
"""

RUNS = {
    "calls": ["--exclude-operation-id-regex", "_batch$"],  # a root key that nobody has kept
    # the error of a refused item is in a successful answer
    "batches": ["--include-operation-id-regex", "_batch$", "--mode", "positive"],
}


@contextlib.contextmanager
def by_tcp(path: Path) -> Iterator[int]:
    """The socket at `path`, on a port of this machine: Schemathesis speaks TCP only."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopping = threading.Event()

    def carry(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as daemon, selectors.DefaultSelector() as ready:
            daemon.connect(str(path))
            for one, other in ((client, daemon), (daemon, client)):
                ready.register(one, selectors.EVENT_READ, other)
            with contextlib.suppress(OSError):
                while not stopping.is_set():
                    for key, _ in ready.select(0.2):
                        part = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]  # a socket, as registered
                        if not part:
                            return
                        key.data.sendall(part)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=carry, args=(listener.accept()[0],)))
                threads[-1].start()

    threads = [threading.Thread(target=accept)]
    threads[0].start()
    try:
        yield listener.getsockname()[1]
    finally:
        stopping.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in threads:
            thread.join(10)


def test_the_document_is_what_the_code_says() -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tools" / "kms_openapi.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("run", RUNS)
def test_the_document_is_true_of_a_live_daemon(tmp_path: Path, run: str) -> None:
    check(tmp_path, run, SEED)


@pytest.mark.torture
@pytest.mark.parametrize("run", RUNS)
def test_the_document_is_true_of_a_live_daemon_for_new_requests(tmp_path: Path, run: str) -> None:
    check(tmp_path, run, random.getrandbits(32))


def check(tmp_path: Path, run: str, seed: int) -> None:
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(CONFIGURATION)
    program = environment("schemathesis-4.32.5", ("schemathesis==4.32.5",)).with_name("schemathesis")
    (tmp_path / "kms").mkdir()
    with LiveDaemon(tmp_path / "kms") as daemon, by_tcp(daemon.socket) as port:
        words = [str(program), "--config-file", str(configuration), "run", str(DOCUMENT)]
        words += [
            "--url",
            f"http://127.0.0.1:{port}",
            "--phases",
            "coverage,fuzzing",
            "--max-examples",
            "6",
            "--checks",
            "all",
        ]
        words += RUNS[run]
        words += [
            "--seed",
            str(seed),
            "--generation-database",
            "none",
            "--no-color",
            "--no-shrink",
            "--warnings",
            "off",
        ]
        variables = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
        done = subprocess.run(
            words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        with daemon.client() as client:
            assert client.health()
