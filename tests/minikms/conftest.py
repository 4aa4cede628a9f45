"""What tests of several rooms share: a directory for all users, and a daemon for the tests of a module."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.live_daemon import LiveDaemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, LiveDaemon(Path(name)) as running:
        yield running
