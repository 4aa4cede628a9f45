"""Disk faults: a system call that fails, a bit that flips; and keys by number."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from minikms.api.errors import StorageUnavailableError
from minikms.custody.keyring_file import KeyringFile


def key(number: int) -> bytes:
    """The 16 bytes of a key. They sort as the numbers."""
    return number.to_bytes(16, "big")


def failing(
    function: Callable[..., object], *, at: int, number: int = errno.EIO, times: int = 1_000_000
) -> Callable[..., object]:
    """`function`, except that call number `at` (from 1) and the `times - 1` calls after it fail."""
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
    """Inside the block `os.<call>` fails from call number `at` on."""
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


def refuse(*_: object, **__: object) -> NoReturn:
    """In the place of a write."""
    raise StorageUnavailableError("the disk refuses")


def stored_but_refused(self: KeyringFile, data: bytes, store_now: Callable[..., None] = KeyringFile.store_now) -> None:
    """The disk has the keyring, and does not confirm it."""
    store_now(self, data)
    refuse()


def stored_once(
    first: Callable[[KeyringFile, bytes], None] = stored_but_refused,
) -> Callable[[KeyringFile, bytes], None]:
    """As `first`, and no later keyring reaches the disk: the repair may begin before the test goes on."""
    stores = iter([first])
    return lambda *stored: next(stores, refuse)(*stored)  # noqa: PLW0108 - a step of `stores` for each call
