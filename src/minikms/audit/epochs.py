"""The highest epoch of the keyring that the audit log names: an older keyring is recognised by it.

Invariants: it reads a bounded end of the log, without its lock, and verifies nothing. It must never write.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from typing import Final

from minikms.audit.reader import LOG_NAME, DamagedSegmentError, each_segment, list_segments

EPOCH_TAIL_BYTES_MAX: Final = 32 * 1024 * 1024
"""How much of the end of the audit log is searched."""
EPOCH_READ_BYTES: Final = 1024 * 1024
_EPOCH_OVERLAP_BYTES: Final = 64
_EPOCH: Final = re.compile(rb'"epoch":([0-9]{1,18})[,}]')


def highest_epoch(directory: str) -> int:
    """The highest epoch in the last EPOCH_TAIL_BYTES_MAX of the open file of the audit log; if it has none, because it
    was begun after the last start, in the file before it. 0 when there is none, or no log. Raises OSError.

    Each signed line and the first line of each file but the first have an epoch, as do `start`, `stop` and each change
    of the keyring. They are written after the keyring that has it.
    """
    return _in_open_file(directory) or _in_newest_closed_file(directory)


def _in_open_file(directory: str) -> int:
    try:
        # O_NONBLOCK: opening a FIFO in the log's place would wait for a writer.
        fd = os.open(os.path.join(directory, LOG_NAME), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return 0
    try:
        end = os.fstat(fd).st_size
        begin = max(0, end - EPOCH_TAIL_BYTES_MAX)
        highest = 0
        while begin < end:
            data = os.pread(fd, EPOCH_READ_BYTES + _EPOCH_OVERLAP_BYTES, begin)
            highest = max(highest, _highest_in(data))
            begin += EPOCH_READ_BYTES
        return highest
    finally:
        os.close(fd)


def _in_newest_closed_file(directory: str) -> int:
    """Reads the whole file, which may be compressed. A damaged one has none: `minikms audit verify` reports it."""
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
