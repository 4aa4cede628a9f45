"""A daemon for the tests of a module that leave it as they found it."""

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


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    """For one test alone."""
    with LiveDaemon(tmp_path) as running:
        yield running
