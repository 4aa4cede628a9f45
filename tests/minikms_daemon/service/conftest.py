"""A daemon for one test alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.live_daemon import LiveDaemon


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[LiveDaemon]:
    """For one test alone."""
    with LiveDaemon(tmp_path) as running:
        yield running
