"""Files of the configuration that only trusted users may change.

Owns: opening and reading such a file, and the check of who could write it. Invariants: a file is refused if another
user than the trusted ones could write it, or replace it through its directory, through a directory above it, or through
one that a link in its path leads to; the last part of the path is no link; the check is made on the descriptor that is
read. It must never write, or say what the content means.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from minikms.errors import StartError

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
ROOT_UID: Final = 0


def read_trusted(path: Path, trusted: Collection[int], *, what: str, bytes_max: int) -> bytes:
    """The content of the file at `path`, which only the users `trusted` may change; at most `bytes_max` + 1 bytes of
    it.

    Raises StartError, whose text calls the file `what`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise StartError(f"the {what} {path} can't be read: {error.strerror}") from None
    try:
        _check_trusted(descriptor, path, frozenset(trusted), what)
        return os.read(descriptor, bytes_max + 1)
    except OSError as error:
        raise StartError(f"the {what} {path} can't be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _check_trusted(descriptor: int, path: Path, trusted: frozenset[int], what: str) -> None:
    owners = " or ".join("root" if uid == ROOT_UID else f"uid {uid}" for uid in sorted(trusted))
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise StartError(f"the {what} {path} is not a regular file")
    if _may_be_written(status, trusted) or _may_be_written(os.stat(path.parent), trusted):
        raise StartError(
            f"the {what} {path} and its directory must belong to {owners}, and nobody else may write them: "
            "chown root, and chmod go-w"
        )
    for found in _above(path):
        # Where the sticky bit is set, as in /tmp, nobody can replace what belongs to a trusted user.
        sticky = found.st_uid in trusted and found.st_mode & stat.S_ISVTX
        if _may_be_written(found, trusted) and not sticky:
            raise StartError(
                f"every directory above the {what} {path} must belong to {owners}, and nobody else may write it; the "
                "same holds for the directory that a link in its path leads to"
            )


def _may_be_written(status: os.stat_result, trusted: frozenset[int]) -> bool:
    """Whether a user who is not trusted may write the file or directory of this status."""
    return status.st_uid not in trusted or bool(status.st_mode & _OTHERS_WRITE)


def _above(path: Path) -> Iterator[os.stat_result]:
    """The directories above that of `path`: those that its text names, and those that it leads to through links.

    The latter are walked upwards, since the daemon's system call filter does not let it read a link.
    """
    for parent in path.absolute().parents[1:]:
        yield os.stat(parent)
    place = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            above = os.open("..", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
            here, found = os.fstat(place), os.fstat(above)
            os.close(place)
            place = above
            if os.path.samestat(here, found):
                return
            yield found
    finally:
        os.close(place)
