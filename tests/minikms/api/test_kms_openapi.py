"""docs/minikms-openapi.yaml matches the code and the answers of a running daemon."""

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
from typing import get_args

import msgspec
import pytest
import yaml

from minikms import api
from tests.harness.live_daemon import LiveDaemon
from tests.progressdb_server.api.sdk import PATIENCE, TEST_S_MAX, environment

pytestmark = pytest.mark.timeout(TEST_S_MAX)
PROJECT = Path(__file__).resolve().parents[3]
DOCUMENT = PROJECT / "docs" / "minikms-openapi.yaml"
RUN_S_MAX = 480.0
EXAMPLES = 1
"""Random ones of each operation, beside the bounds that Schemathesis derives; torture draws more."""
EXAMPLES_IN_TORTURE = 6
SEED = 1
"""Seed of the generated requests in `make test`. Schemathesis prints the seed of a failed run."""
CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "400", "403", "404", "409", "410"]  # random text is no key id, and does not decrypt
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "403", "404", "405", "409", "411", "413", "415"]  # 413: too many bytes or items
"""

RUNS = {
    "calls": ["--exclude-operation-id-regex", "_batch$|seal"],  # a sealed daemon would refuse all others
    # Valid requests only: a batch with a refused item is answered 200, with the error of the item inside.
    "batches": ["--include-operation-id-regex", "_batch$", "--mode", "positive"],
}


@contextlib.contextmanager
def tcp_proxy(path: Path) -> Iterator[int]:
    """Forward a loopback TCP port to the Unix socket `path`: Schemathesis supports TCP only. Yields the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    stopping = threading.Event()

    def relay(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as daemon, selectors.DefaultSelector() as ready:
            daemon.connect(str(path))
            for source, sink in ((client, daemon), (daemon, client)):
                ready.register(source, selectors.EVENT_READ, sink)
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
                threads.append(threading.Thread(target=relay, args=(listener.accept()[0],)))
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


def test_the_document_matches_the_code() -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "tools" / "kms_openapi.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_base64_of_a_batch_is_bin_in_messagepack() -> None:
    """Of a field that the document calls base64, the daemon must not read the text."""
    schemas = yaml.safe_load(DOCUMENT.read_text())["components"]["schemas"]
    seen = set()
    for verb in (verb for verb in api.VERBS if verb.is_batch):
        [items] = [field for field in msgspec.structs.fields(verb.request) if field.name == "items"]
        for kind in (verb.request, *get_args(items.type)):
            properties = schemas[kind.__name__.replace("ItemRequest", "Item")]["properties"]
            for field in msgspec.structs.fields(api.array_form(kind)):
                is_base64 = "A-Za-z0-9+/" in properties[field.name].get("pattern", "")
                assert is_base64 == (bytes in (field.type, *get_args(field.type))), field.name
                seen.add(is_base64)
    assert seen == {True, False}


@pytest.mark.parametrize("run", RUNS)
def test_a_running_daemon_conforms_to_the_document(tmp_path: Path, run: str) -> None:
    check(tmp_path, run, SEED, EXAMPLES)


@pytest.mark.torture
@pytest.mark.parametrize("run", RUNS)
def test_a_running_daemon_conforms_to_the_document_for_random_requests(tmp_path: Path, run: str) -> None:
    check(tmp_path, run, random.getrandbits(32), EXAMPLES_IN_TORTURE)


def check(tmp_path: Path, run: str, seed: int, examples: int) -> None:
    configuration = tmp_path / "schemathesis.toml"
    configuration.write_text(PATIENCE + CONFIGURATION)
    program = environment("schemathesis-4.32.5", ("schemathesis==4.32.5",)).with_name("schemathesis")
    (tmp_path / "kms").mkdir()
    with LiveDaemon(tmp_path / "kms") as daemon, tcp_proxy(daemon.socket) as port:
        words = [str(program), "--config-file", str(configuration), "run", str(DOCUMENT)]
        words += [
            "--url",
            f"http://127.0.0.1:{port}",
            "--phases",
            "coverage,fuzzing",
            "--max-examples",
            str(examples),
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
