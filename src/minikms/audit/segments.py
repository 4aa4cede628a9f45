"""The names of a log's files.

Owns: which files belong to a log and in which order. `minikms-audit.log` is being written; `minikms-audit.log.<n>` were
written before it (n counts from 1), `minikms-audit.log.<n>.zst` likewise, compressed. Both forms of one segment may
exist for a moment, with the same content: the plain one counts. It must never open a file through a symbolic link, nor
touch a file of another name.
"""

from __future__ import annotations

import os
import re
from typing import Final

LOG_NAME: Final = "minikms-audit.log"
COMPRESSED_SUFFIX: Final = ".zst"
NEXT_NAME: Final = LOG_NAME + ".next"
"""A new segment before it takes the log's name."""

FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700

_SEGMENT_PATTERN: Final = re.compile(r"minikms-audit\.log\.([1-9][0-9]*)(\.zst)?", re.ASCII)


def segment_name(number: int, *, compressed: bool = False) -> str:
    return f"{LOG_NAME}.{number}{COMPRESSED_SUFFIX if compressed else ''}"


def list_segments(directory: str) -> dict[int, list[str]]:
    """The closed segments by number, in order: for each the names of the files that hold it, plain before
    compressed.
    """
    found: dict[int, list[str]] = {}
    for name in sorted(os.listdir(directory)):
        if match := _SEGMENT_PATTERN.fullmatch(name):
            found.setdefault(int(match[1]), []).append(name)
    return dict(sorted(found.items()))


def fsync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
