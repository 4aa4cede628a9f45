"""Fixtures: an open directory, and lease files in it that can be opened repeatedly."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minikms.custody.files import open_directory
from minikms.custody.lease_store import LeaseStore


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """A descriptor of `tmp_path`."""
    fd = open_directory(tmp_path)
    yield fd
    os.close(fd)


@pytest.fixture
def opened(directory: int) -> Iterator[Callable[..., LeaseStore]]:
    """Opens the lease files again, and closes those that were open before."""
    stores: list[LeaseStore] = []

    def reopen(*, create: bool = False) -> LeaseStore:
        for store in stores:
            store.close()
        stores.append(LeaseStore.open(directory, create=create))
        return stores[-1]

    yield reopen
    for store in stores:
        store.close()
