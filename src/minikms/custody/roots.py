"""Root providers: where the root key comes from.

Owns: reading the root key from a key file or an inherited descriptor, straight into the arena, and making a development
key file. Invariants: the key file is a regular file of ours or root's that nobody else can read, or it is refused; key
text never becomes a Python object. A missing root key must never silently become an ephemeral one.
"""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path
from typing import Final

from minikms.errors import KeyTextError, StartError
from minikms.memory.arena import SecretArena, SecretSlot, fill_random, read_key_fd_into

_OTHERS_MASK: Final = 0o077
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
    with arena.allocate() as key:
        fill_random(key.view)
        temporary = _write_key_text(path, key.view, arena)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        os.unlink(temporary)
        _sync_directory(path.parent)


def rewrite_key_file(path: Path, root: SecretSlot, arena: SecretArena) -> None:
    """Replaces the key in `path` with `root`, durably, and reads it back. The old file stays until the new one is
    whole.

    Raises StartError when what is read back is not `root`; the caller must then keep every slot.
    """
    temporary = _write_key_text(path, root.view, arena)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    _sync_directory(path.parent)
    with read_key_file(path, arena) as again:
        if not hmac.compare_digest(again.view, root.view):
            raise StartError(f"the master key file {path} does not hold the key that was written")


def _write_key_text(path: Path, key: memoryview, arena: SecretArena) -> Path:
    """A new file beside `path` with the hex text of `key`, on disk. The text is made in two arena slots."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with arena.allocate() as first, arena.allocate() as second:
            for index, value in enumerate(key):
                half = first.view if index < len(key) // 2 else second.view
                position = (index * 2) % len(half)
                half[position] = _HEX_DIGITS[value >> 4]
                half[position + 1] = _HEX_DIGITS[value & 15]
            os.writev(fd, [first.view, second.view, b"\n"])
        os.fsync(fd)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    return temporary


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
    except KeyTextError:
        slot.release()
        raise StartError(
            f"{what} must hold exactly 64 hexadecimal characters; make one with: openssl rand -hex 32"
        ) from None
    return slot
