"""The real daemon for the client tests (one process a module, with a directory of its own), and the kinds of client."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from minikms.client import Client
from tests.minikms.client.using import Use, use_asyncio, use_blocking, use_uvloop


@pytest.fixture(scope="module")
def daemon_socket() -> Iterator[str]:
    """The socket of a daemon that answers."""
    with tempfile.TemporaryDirectory(prefix="kms") as directory:
        path = directory + "/s"
        process = subprocess.Popen(
            [sys.executable, "-m", "minikms", "--socket", path, "--data-dir", directory + "/data", "--dev"],
            stderr=subprocess.DEVNULL,
        )
        try:
            with Client(path, wait_s=60) as client:
                client.health()
            yield path
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(params=[use_blocking, use_asyncio, use_uvloop], ids=["blocking", "asyncio", "uvloop"])
def use(request: pytest.FixtureRequest) -> Use:
    return request.param  # type: ignore[no-any-return]  # pytest types it as Any
