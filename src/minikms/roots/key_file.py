"""Root providers: where the root key comes from.

Owns: reading the root key from a key file or an inherited descriptor, straight into the arena, and making a development
key file. Invariants: the key file is a regular file of ours or root's that nobody else can read, or it is refused; key
text never becomes a Python object; a key file is replaced whole, and what a crash leaves beside it is removed by the
next start. A missing root key must never silently become an ephemeral one.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from minikms.errors import KeyTextError, StartError
from minikms.memory.arena import SecretArena, SecretSlot, fill_random, read_key_fd_into

_OTHERS_MASK: Final = 0o077
_KEY_FILE_MODE: Final = 0o600
_HEX_DIGITS: Final = b"0123456789abcdef"


def read_key_file(path: Path, arena: SecretArena) -> SecretSlot:
    """The root key in `path`: 64 hex characters, an optional newline; mode 0600 or stricter.

    Raises StartError, saying what to do. The caller releases the slot.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise StartError(f"the master key file {path} can't be read: {os.strerror(error.errno or 0)}") from None
    try:
        _check_key_file(fd, path)
        return _read(fd, arena, f"the master key file {path}")
    except OSError as error:
        raise StartError(f"the master key file {path} can't be read: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(fd)


def read_key_descriptor(fd: int, arena: SecretArena) -> SecretSlot:
    """The root key from an inherited pipe or memfd, which is closed. Raises StartError."""
    try:
        return _read(fd, arena, "the master key in the environment")
    except OSError as error:
        raise StartError(f"the master key's descriptor can't be read: {os.strerror(error.errno or 0)}") from None
    finally:
        try:
            os.close(fd)
        except OSError:
            raise StartError(f"descriptor {fd} for the master key is not open") from None


def make_dev_key_file(path: Path, arena: SecretArena) -> None:
    """Writes a fresh random key to `path`, mode 0600, durable, unless it exists."""
    with arena.allocate() as key, KeyText(key, arena) as text:
        fill_random(key.view)
        text.encode()
        temporary = _write_key_text(path, text, _KEY_FILE_MODE)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        os.unlink(temporary)
        _sync_directory(path.parent)


def rewrite_key_file(path: Path, text: KeyText) -> None:
    """Replaces the key in `path`, durably. The old file stays until the new one is whole. Raises OSError.

    Blocks on the disk and takes no slot of the arena, so it may run in a worker thread; `holds_key` then looks at what
    is there.
    """
    target = path.resolve()  # of a link, the file behind it is replaced
    temporary = _write_key_text(target, text, stat.S_IMODE(os.stat(target).st_mode) & ~_OTHERS_MASK)
    try:
        os.replace(temporary, target)
    except OSError:
        os.unlink(temporary)
        raise
    _sync_directory(target.parent)


def holds_key(path: Path, root: SecretSlot, arena: SecretArena) -> bool:
    """Whether the key file holds this key. Raises StartError when it is not a key file."""
    with read_key_file(path, arena) as found:
        return hmac.compare_digest(found.view, root.view)


def remove_leftover(path: Path) -> None:
    """Removes what a crash in the middle of a writing left beside the key file: key text, if only for us to read."""
    for place in {path, path.resolve()}:
        with contextlib.suppress(OSError):
            os.unlink(_temporary(place))


class KeyText:
    """The hexadecimal text of a key, in two slots of the arena, until the `with` block ends."""

    def __init__(self, key: SecretSlot, arena: SecretArena) -> None:
        self._key = key
        self._halves = (arena.allocate(), arena.allocate())

    def encode(self) -> None:
        """Makes the text of what the key is now."""
        first, second = self.views
        for index, value in enumerate(self._key.view):
            half = first if index < len(first) // 2 else second
            position = (index * 2) % len(half)
            half[position] = _HEX_DIGITS[value >> 4]
            half[position + 1] = _HEX_DIGITS[value & 15]

    @property
    def views(self) -> tuple[memoryview, memoryview]:
        return self._halves[0].view, self._halves[1].view

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for half in self._halves:
            half.release()


def _write_key_text(path: Path, text: KeyText, mode: int) -> Path:
    """A new file beside `path` with the text, on disk."""
    temporary = _temporary(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        _write_all(fd, [*text.views, memoryview(b"\n")])
        os.fsync(fd)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    return temporary


def _write_all(fd: int, views: list[memoryview]) -> None:
    """All of them: a disk that is nearly full takes a part, and that must never become a key file."""
    for view in views:
        left = view
        while left:
            left = left[os.write(fd, left) :]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _check_key_file(fd: int, path: Path) -> None:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise StartError(f"the master key file {path} is not a regular file")
    if status.st_mode & _OTHERS_MASK:
        raise StartError(f"others can read the master key file {path}; run: chmod 600 {path}")
    if status.st_uid not in (0, os.geteuid()):
        raise StartError(f"the master key file {path} belongs to uid {status.st_uid}, not to this user or root")


def _read(fd: int, arena: SecretArena, what: str) -> SecretSlot:
    slot = arena.allocate()
    try:
        read_key_fd_into(fd, slot)
    except BaseException as error:
        slot.release()
        if isinstance(error, KeyTextError):
            raise StartError(
                f"{what} must hold exactly 64 hexadecimal characters; make one with: openssl rand -hex 32"
            ) from None
        raise
    return slot
