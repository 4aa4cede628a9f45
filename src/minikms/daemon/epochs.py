"""What the audit log tells of the keyring's epochs.

Owns: finding the highest epoch in the newest lines of the log, so that a keyring put back from an old copy is told at
the next start. Invariants: it reads a bounded number of bytes and changes nothing; the lines that carry an epoch
(`start`, `stop`, and each change of the keyring) are written after the keyring that has it. It must never be taken for
proof that a keyring is the newest: who puts the log back too is not found here, but by the clients that remember.
"""

from __future__ import annotations

import os
import re
from typing import Final

from minikms.audit.segments import LOG_NAME

TAIL_BYTES_MAX: Final = 32 * 1024 * 1024
_READ_BYTES: Final = 1024 * 1024
_OVERLAP_BYTES: Final = 64
_EPOCH: Final = re.compile(rb'"epoch":([0-9]{1,18})[,}]')


def highest_epoch(directory: str) -> int:
    """The highest epoch in the last TAIL_BYTES_MAX of the log; 0 when there is none, or no log. Raises OSError."""
    try:
        fd = os.open(os.path.join(directory, LOG_NAME), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return 0
    try:
        end = os.fstat(fd).st_size
        begin = max(0, end - TAIL_BYTES_MAX)
        highest = 0
        while begin < end:
            data = os.pread(fd, _READ_BYTES + _OVERLAP_BYTES, begin)
            highest = max(highest, *map(int, _EPOCH.findall(data)), 0)
            begin += _READ_BYTES
        return highest
    finally:
        os.close(fd)
