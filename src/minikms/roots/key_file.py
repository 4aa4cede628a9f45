"""The key file: 64 hexadecimal characters, an optional newline, mode 0600 or stricter.

Owns: reading a root key from a file or an inherited descriptor straight into the arena, making a key file, and
replacing the key in one. Invariants: a key file is a regular file that only this user or root can read, and belongs to
one of them; or it belongs to an owner and a group that the caller names, and that group can read it too; any other file
is refused; key text lies in the arena only, never in a Python object; a key file is replaced whole, and the next start
removes what a crash leaves beside it. It must never make a key where one is missing: callers ask for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Final, NamedTuple

from minikms.api.errors import KeyTextError, StartError
from minikms.memory.arena import SecretArena, SecretSlot, fill_random, hex_encode_into, read_key_fd_into
from minikms.platform.files import denied
from minikms.platform.sync import sync_directory, sync_file

_OTHERS_MASK: Final = 0o077
_KEY_FILE_MODE: Final = 0o600


class FileOwner(NamedTuple):
    """Owner and group of a key file that the group may read too."""

    uid: int
    gid: int


KeyText = tuple[memoryview, memoryview]
"""The hexadecimal text of a key: two slots of the arena."""


def read_key_file(
    path: Path, arena: SecretArena, *, any_owner: bool = False, shared: FileOwner | None = None
) -> SecretSlot:
    """The root key in the file at `path`, which belongs to this user or to root; with `any_owner`, to anybody. A file
    that belongs to owner and group of `shared` may be readable by the group.

    Raises StartError, saying what to do. The caller releases the slot.
    """
    what = f"the root key file {path}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except PermissionError:
        raise StartError(f"{what} can't be read: {denied(path, '400')}. Or run this as the owner") from None
    except FileNotFoundError as error:
        raise StartError(
            f"{what} can't be read: {os.strerror(error.errno or 0)}. Put your copy of it there, or for new data make "
            f"one: (umask 077; openssl rand -hex 32 > {path})"
        ) from None
    except OSError as error:
        raise StartError(f"{what} can't be read: {os.strerror(error.errno or 0)}") from None
    try:
        _check_readers(os.fstat(fd), what, path, any_owner, shared)
        return _read(fd, arena, what)
    except OSError as error:
        raise StartError(f"{what} can't be read: {os.strerror(error.errno or 0)}") from None
    finally:
        os.close(fd)


def _check_readers(status: os.stat_result, what: str, path: Path, any_owner: bool, shared: FileOwner | None) -> None:
    """Checks that the file is regular, and that no other users than those of `read_key_file` may read it."""
    if not stat.S_ISREG(status.st_mode):
        raise StartError(f"{what} is not a regular file")
    owner, group, others = status.st_uid, status.st_gid, status.st_mode & _OTHERS_MASK
    if (owner, group) == shared and not others & ~stat.S_IRGRP:
        return
    if others == stat.S_IRGRP:
        raise StartError(
            f"the group {group} can read {what}; run: chmod 600 {path}. If it is a Kubernetes secret or a systemd "
            f"credential, name its owner and its group: --master-key-owner {owner}:{group}"
        )
    if others:
        raise StartError(f"others can read {what}; run: chmod 600 {path}")
    if not any_owner and owner not in (0, os.geteuid()):
        raise StartError(
            f"{what} belongs to uid {owner}, not to this user or root: `chown {os.geteuid()} {path}`, or run this as "
            f'that user, with `runuser -u "$(id -nu {owner})" --` before the command'
        )


def read_key_descriptor(fd: int, arena: SecretArena) -> SecretSlot:
    """The root key from an inherited pipe or memfd, which is closed. Raises StartError. The caller releases it."""
    try:
        return _read(fd, arena, "the root key in the environment")
    except OSError as error:
        raise StartError(f"the root key's descriptor can't be read: {os.strerror(error.errno or 0)}") from None
    finally:
        try:
            os.close(fd)
        except OSError:
            raise StartError(f"descriptor {fd} for the root key is not open") from None


def make_key_file(path: Path, arena: SecretArena) -> None:
    """Writes a fresh random key to `path`, mode 0600, durably, unless the file exists. Raises OSError."""
    with arena.allocate() as key:
        fill_random(key.view)
        with key_text(key, arena) as text:
            try:
                temporary = _write_key_text(path, text, _KEY_FILE_MODE)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    finally:
        os.unlink(temporary)
        sync_directory(path.parent)


async def replace_key(path: Path, root: SecretSlot, arena: SecretArena, executor: Executor) -> None:
    """Makes `root` the key in the file. `executor` waits for the disk; only this thread uses the arena.

    Raises OSError, and StartError when the file does not hold this key afterwards.
    """
    with key_text(root, arena, lent=True) as text:
        writing = asyncio.get_running_loop().run_in_executor(executor, rewrite_key_file, path, text)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The worker goes on: if the text were zeroed meanwhile, it would write a key of zeros into the file.
            await asyncio.wait([writing])
            raise
        finally:
            del writing  # the traceback of its error leads to this frame
    if not holds_key(path, root, arena):
        raise StartError(f"the root key file {path} does not hold the key that was written")


def rewrite_key_file(path: Path, text: KeyText) -> None:
    """Replaces the key in `path`, durably. The old file stays until the new one is whole. Raises OSError.

    It blocks on the disk and allocates nothing from the arena, so it may run in a worker thread.
    """
    target = path.resolve()  # behind a symbolic link, the target is replaced and the link stays
    temporary = _write_key_text(target, text, stat.S_IMODE(os.stat(target).st_mode) & ~_OTHERS_MASK)
    try:
        os.replace(temporary, target)
    except OSError:
        os.unlink(temporary)
        raise
    sync_directory(target.parent)


def holds_key(path: Path, root: SecretSlot, arena: SecretArena) -> bool:
    """Whether the key file holds this key. Raises StartError when it is not a key file."""
    with read_key_file(path, arena) as content:
        return hmac.compare_digest(content.view, root.view)


def remove_leftover(path: Path) -> None:
    """Removes the temporary file that a crash left beside the key file, with key text in it."""
    for place in {path, path.resolve()}:
        with contextlib.suppress(OSError):
            os.unlink(_temporary(place))


@contextlib.contextmanager
def key_text(key: SecretSlot, arena: SecretArena, *, lent: bool = False) -> Iterator[KeyText]:
    """The hexadecimal text of `key`, zeroed at the end of the block. `lent`: a worker thread writes it out."""
    with arena.allocate() as first, arena.allocate() as second:
        if lent:
            first.lend()
            second.lend()
        half = len(key.view) // 2
        hex_encode_into(key.view[:half], first.view)
        hex_encode_into(key.view[half:], second.view)
        yield first.view, second.view


def _write_key_text(path: Path, text: KeyText, mode: int) -> Path:
    """A new file beside `path` that holds the text, durable."""
    temporary = _temporary(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        _write_all(fd, [*text, memoryview(b"\n")])
        sync_file(fd)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)
    return temporary


def _write_all(fd: int, views: list[memoryview]) -> None:
    """Writes all bytes: write(2) may take only a part when the disk is nearly full."""
    for view in views:
        remaining = view
        while remaining:
            remaining = remaining[os.write(fd, remaining) :]


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _read(fd: int, arena: SecretArena, what: str) -> SecretSlot:
    slot = arena.allocate()
    try:
        read_key_fd_into(fd, slot)
    except BaseException as error:
        slot.release()
        if isinstance(error, KeyTextError):
            raise StartError(
                f"{what} must hold exactly 64 hexadecimal characters, as `openssl rand -hex 32` makes them. If the key "
                "is in use, put your copy of it back: a new one would open nothing"
            ) from None
        raise
    return slot
