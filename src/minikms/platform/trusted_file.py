"""Files of the configuration that only trusted users may change.

Owns: opening and reading such a file, and the check of who could write it. Invariants: a file is refused if another
user than the trusted ones could write it, or replace it: through its directory, a directory above it, or any directory
in which a link on the way to it lies; the last part of the path is no link; what is read is what was checked. It must
never write, or say what the content means.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Final

from minikms.api.errors import StartError

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
ROOT_UID: Final = 0
VOLUME_LINK: Final = "..data"
LINKS_COUNT_MAX: Final = 40
"""On the way to a file, as in the kernel (path_resolution(7))."""


def read_trusted(path: Path, trusted: Collection[int], *, what: str, bytes_max: int) -> bytes:
    """The content of the file at `path`, which only the users `trusted` may change; at most `bytes_max` + 1 bytes of
    it.

    Raises StartError, whose text calls the file `what`.
    """
    try:
        place = _resolved(path, frozenset(trusted), what)
        descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StartError(f"the {what} {path} is not a regular file")
            if _may_be_written(status, trusted):
                raise _not_trusted(path, trusted, what)
            return os.read(descriptor, bytes_max + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        advice = "; make it, or name another" if isinstance(error, FileNotFoundError) else ""
        raise StartError(f"the {what} {path} can't be read: {error.strerror}{advice}") from None


def directory_read(path: Path) -> Path:
    """The directory that a hardened process must still be able to read, so that it can read the file at `path` again
    after a change: that of the file. In a volume of Kubernetes each change replaces the link `..data` to the directory
    of the files; then it is the volume.
    """
    parent = path.parent
    return parent.parent if parent.name == VOLUME_LINK and parent.is_symlink() else parent


def _resolved(path: Path, trusted: frozenset[int], what: str) -> Path:
    """The path without links in its directories. Raises StartError unless only trusted users could change where it
    leads, OSError.

    It goes from directory to directory as the kernel does, and checks each before it looks up a name in it. So nobody
    else can change a directory or link that it has gone through.
    """
    here, ahead, links_count = Path("/"), list(reversed(path.absolute().parts[1:])), 0
    while True:
        status = os.lstat(here)
        name = ahead.pop() if ahead else "."
        if not ahead:
            if _may_be_written(status, trusted):
                raise _not_trusted(path, trusted, what)
            return here / name
        # Where the sticky bit is set, as in /tmp, nobody can replace what belongs to a trusted user.
        sticky = status.st_uid in trusted and status.st_mode & stat.S_ISVTX
        if _may_be_written(status, trusted) and not sticky:
            raise _not_trusted_above(path, trusted, what)
        if name == "..":
            here = here.parent
            continue
        step = os.lstat(here / name)
        if not stat.S_ISLNK(step.st_mode):
            here /= name
            continue
        links_count += 1
        if links_count > LINKS_COUNT_MAX:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if step.st_uid not in trusted:
            raise _not_trusted_above(path, trusted, what)
        ahead += reversed(Path(os.readlink(here / name)).parts)  # of an absolute path, the first part is the root


def _not_trusted(path: Path, trusted: Collection[int], what: str) -> StartError:
    return StartError(
        f"the {what} {path} and its directory must belong to {_owners(trusted)}, and nobody else may write them: "
        "chown root, and chmod go-w"
    )


def _not_trusted_above(path: Path, trusted: Collection[int], what: str) -> StartError:
    return StartError(
        f"every directory above the {what} {path} must belong to {_owners(trusted)}, and nobody else may write it; the "
        "same holds for each link in its path, and for the directories that it leads through"
    )


def _owners(trusted: Collection[int]) -> str:
    return " or ".join("root" if uid == ROOT_UID else f"uid {uid}" for uid in sorted(set(trusted)))


def _may_be_written(status: os.stat_result, trusted: Collection[int]) -> bool:
    """Whether a user who is not trusted may write the file or directory of this status."""
    return status.st_uid not in trusted or bool(status.st_mode & _OTHERS_WRITE)
