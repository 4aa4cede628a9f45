"""A small disk of its own, and a way to fill it to the last byte."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs

SIZE = "64m"


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of SIZE, in memory, at this new directory; only the directory, where that can't be mounted."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Nothing fits on the small disk inside the block."""
    needs.root()
    if not disk.is_mount():
        pytest.skip("needs a container that may mount")
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
    try:
        yield
    finally:
        filler.unlink()
