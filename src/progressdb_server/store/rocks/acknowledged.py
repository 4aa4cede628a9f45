"""How far the log of a RocksDB database must reach: the number of the last write that was synced.

RocksDB takes a log that was cut, or is missing, for one that ends there. Owns: the file ACKNOWLEDGED in its directory.
Invariants:
- A number is written after the sync of its write and is not synced itself, so it is never ahead of the log. A killed
  server leaves the last one. A power failure may leave one that is seconds old: later writes may be acknowledged too.
- A file that is missing, or whose checksum is wrong, says nothing: every log is long enough.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from typing import Final

NAME: Final = "ACKNOWLEDGED"
_DIGITS: Final = 20


def _line(digits: bytes) -> bytes:
    """The content of the file. The one of 0.2.0 is the digits alone."""
    return b"%b %08x\n" % (digits, zlib.crc32(digits))


def last(directory: str) -> int:
    """The number of the last write that the database must have; 0 if that is not known."""
    try:
        with open(os.path.join(directory, NAME), "rb") as file:
            raw = file.read(64)
    except OSError:
        return 0
    digits = raw[:_DIGITS]
    is_whole = len(digits) == _DIGITS and digits.isdigit() and raw in (digits, _line(digits))
    return int(digits) if is_whole else 0


class Acknowledged:
    def __init__(self, directory: str) -> None:
        self._file: int | None = None
        with contextlib.suppress(OSError):
            self._file = os.open(os.path.join(directory, NAME), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(self, number: int) -> None:
        """All writes up to this number are synced. Without room for the file, an older number stays."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.pwrite(self._file, _line(b"%020d" % number), 0)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
