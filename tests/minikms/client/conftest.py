"""The real daemon for the client tests (one process a module, with a directory of its own), and the kinds of client."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.live_daemon import LiveDaemon
from tests.minikms.client.using import Use, use_asyncio, use_blocking, use_uvloop


@pytest.fixture(scope="module")
def daemon_socket() -> Iterator[str]:
    """The socket of a daemon that answers."""
    with tempfile.TemporaryDirectory(prefix="kms") as directory, LiveDaemon(Path(directory), "dev") as daemon:
        yield str(daemon.socket)


@pytest.fixture(params=[use_blocking, use_asyncio, use_uvloop], ids=["blocking", "asyncio", "uvloop"])
def use(request: pytest.FixtureRequest) -> Use:
    return request.param  # type: ignore[no-any-return]  # pytest types it as Any
