"""What tests of several rooms share: an open directory, and a daemon for the tests of a module."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.platform.files import open_directory
from tests.harness.live_daemon import LiveDaemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, LiveDaemon(Path(name)) as running:
        yield running


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A descriptor of `tmp_path`."""
    fd = open_directory(tmp_path)
    yield fd
    os.close(fd)
