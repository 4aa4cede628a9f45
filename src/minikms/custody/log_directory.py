"""The directory of the audit log: the data directory, or one of its own that an auditor may read (`--audit-dir`).

Owns: the file `audit-dir` of a data directory, which names a log directory of its own; the checks of that directory,
and its lock. Invariants: a start states where the log lies and is refused if it lies elsewhere, so that a forgotten
flag never begins a second log; the log directory is locked by whoever writes the log, and only after the data directory
is; its group can read the log and change nothing. It must never move a log.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from minikms.api.errors import StartError, StorageUnavailableError
from minikms.platform.directory_lock import LOCK_NAME, DataDirLock, lock_file
from minikms.platform.files import closed_after, read_file_bounded, replace_file

NAME: Final = "audit-dir"
"""The file in the data directory. It holds the path, absolute, and a newline."""
LOG_FILES: Final = "minikms-audit."
"""How the names of all files of the log begin."""
_PATH_BYTES_MAX: Final = 4096
_MODES: Final = (0o700, 0o2700, 0o2750)


def log_directory(data_dir: str) -> str:
    """The directory of the audit log, for commands that only read it. Raises StartError."""
    try:
        content = read_file_bounded(os.path.join(data_dir, NAME), _PATH_BYTES_MAX)
    except StorageUnavailableError as error:
        raise StartError(f"{os.path.join(data_dir, NAME)} can't be read: {error}") from None
    if content is None:
        return data_dir
    path = os.fsdecode(content[:-1])
    if not (content.endswith(b"\n") and os.path.isabs(path) and "\0" not in path):
        raise StartError(f"{os.path.join(data_dir, NAME)} is damaged: it names the directory of the audit log")
    return path


def lock_log_directory(lock: DataDirLock) -> str:
    """Locks the directory of the audit log until `lock` is closed; returns its path. Raises StartError."""
    path = log_directory(lock.directory)
    if path != lock.directory:
        _lock(lock, path)
    return path


def claim_log_directory(lock: DataDirLock, audit_dir: str | None, *, empty: bool = False) -> str:
    """Locks the log directory for a start that states where the log lies: `audit_dir`, or None for the data directory.
    The first start with `audit_dir` records it. `empty`: there must be no log yet. Raises StartError,
    StorageUnavailableError.
    """
    recorded = log_directory(lock.directory)
    if audit_dir is None:
        if recorded != lock.directory:
            raise StartError(f"the audit log of {lock.directory} lies in {recorded}: start with --audit-dir {recorded}")
        return recorded
    audit_dir = os.path.abspath(audit_dir)
    places = os.path.realpath(audit_dir), os.path.realpath(lock.directory)
    if os.path.commonpath(places) in places:
        raise StartError(f"--audit-dir {audit_dir} must lie beside the data directory, not in it or above it")
    if recorded not in (lock.directory, audit_dir):
        raise StartError(
            f"the audit log of {lock.directory} lies in {recorded}, not in {audit_dir}: start with --audit-dir "
            f"{recorded}, or move it (the runbook says how)"
        )
    _lock(lock, audit_dir)
    has_log = _has_log(audit_dir)
    if empty and has_log:
        raise StartError(f"{audit_dir} holds an audit log: rename that directory, and make it again")
    if recorded == lock.directory:
        if _has_log(lock.directory_fd):
            room = f"rename {audit_dir}, which holds another one, and make it again; then " if has_log else ""
            raise StartError(
                f"the audit log lies in the data directory: {room}move {lock.directory}/{LOG_FILES}* to {audit_dir} "
                "first (the runbook says how)"
            )
        replace_file(lock.directory_fd, NAME, os.fsencode(audit_dir) + b"\n")
    return audit_dir


def _has_log(directory: str | int) -> bool:
    return any(name.startswith(LOG_FILES) for name in os.listdir(directory))


def _lock(lock: DataDirLock, path: str) -> None:
    try:
        with closed_after(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as descriptor:
            status = os.fstat(descriptor)
            mode = stat.S_IMODE(status.st_mode)
            if status.st_uid != os.geteuid() or mode not in _MODES:
                raise StartError(
                    f"the directory {path} belongs to uid {status.st_uid} and has mode {mode:04o}: it must belong to "
                    f"uid {os.geteuid()} with mode 2750 and the auditor's group (install -d -m 2750 -o USER -g GROUP)"
                )
            lock.hold(lock_file(descriptor, LOCK_NAME, path))
    except OSError as error:
        raise StartError(
            f"the directory {path} of the audit log: {error.strerror}; make it with install -d -m 2750 -o USER -g GROUP"
        ) from None
