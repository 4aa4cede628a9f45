"""Failing disks for the tests of this room: a system call that raises, a bit that flips, a key by number."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def key(number: int) -> bytes:
    """A key's 16 bytes; they sort as the numbers."""
    return number.to_bytes(16, "big")


def failing(
    function: Callable[..., object], *, at: int, number: int = errno.EIO, times: int = 1_000_000
) -> Callable[..., object]:
    """`function`, but its call number `at` (from 1) fails, and so do the `times - 1` after it."""
    calls = 0

    def call(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if at <= calls < at + times:
            raise OSError(number, os.strerror(number), "/a/secret/path")
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def failing_os(patch: pytest.MonkeyPatch, call: str, *, at: int = 1, number: int = errno.ENOSPC) -> Iterator[None]:
    """Within, `os.<call>` fails from its call number `at` on."""
    with patch.context() as context:
        context.setattr(os, call, failing(getattr(os, call), at=at, number=number))
        yield


def quick_directory() -> str | None:
    """Where to keep the many small directories of a property test: in memory if there is such a place, where syncs that
    don't matter to the test cost nothing. For `tempfile.TemporaryDirectory(dir=…)`."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


def flip(path: Path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
