"""What the audit log tells of the keyring's epochs.

Owns: finding the highest epoch in the newest lines of the log, so that a keyring put back from an old copy is told at
the next start. Invariants: it reads the end of one file and at most one other, and changes nothing; lines with an epoch
(`start`, `stop`, and each change of the keyring) are written after the keyring that has it. It must never be taken for
proof that a keyring is the newest: who puts the log back too is not found here, but by the clients that remember.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from typing import Final

from minikms.audit.reading import DamagedSegmentError, each_segment
from minikms.audit.segments import LOG_NAME, list_segments

TAIL_BYTES_MAX: Final = 32 * 1024 * 1024
_READ_BYTES: Final = 1024 * 1024
_OVERLAP_BYTES: Final = 64
_EPOCH: Final = re.compile(rb'"epoch":([0-9]{1,18})[,}]')


def highest_epoch(directory: str) -> int:
    """The highest epoch in the last TAIL_BYTES_MAX of the file being written; where it tells of none, since it was
    begun after the last start, in the file before it. 0 when there is none, or no log. Raises OSError.
    """
    return _in_open_file(directory) or _in_newest_closed_file(directory)


def _in_open_file(directory: str) -> int:
    try:
        # O_NONBLOCK: a FIFO in the log's place would keep the start waiting.
        fd = os.open(os.path.join(directory, LOG_NAME), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return 0
    try:
        end = os.fstat(fd).st_size
        begin = max(0, end - TAIL_BYTES_MAX)
        highest = 0
        while begin < end:
            data = os.pread(fd, _READ_BYTES + _OVERLAP_BYTES, begin)
            highest = max(highest, _highest_in(data))
            begin += _READ_BYTES
        return highest
    finally:
        os.close(fd)


def _in_newest_closed_file(directory: str) -> int:
    """The whole file, for it may be compressed. One that is damaged is for `minikms audit verify` to name."""
    highest = 0
    with contextlib.suppress(FileNotFoundError, DamagedSegmentError):
        newest = max(list_segments(directory), default=0)
        for file in itertools.islice(each_segment(directory, after=newest - 1), 1 if newest else 0):
            for line in file.lines():
                if b'"epoch":' in line:
                    highest = max(highest, _highest_in(line))
    return highest


def _highest_in(data: bytes) -> int:
    return max(map(int, _EPOCH.findall(data)), default=0)
