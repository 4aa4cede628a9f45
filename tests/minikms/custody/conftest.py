"""A fixture: an open directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.custody.files import open_directory


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A descriptor of `tmp_path`."""
    fd = open_directory(tmp_path)
    yield fd
    os.close(fd)
