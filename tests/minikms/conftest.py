"""A directory that every user of the machine can enter, for tests of several rooms."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def public() -> Iterator[Path]:
    """Not pytest's own temporary directory, whose parents are private."""
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
