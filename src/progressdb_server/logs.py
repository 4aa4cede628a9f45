"""The server's log: one event a line, on standard error.

Owns: what the standard library's logging, which libraries use, becomes. Invariants: of a library's record only its
message is logged, without a traceback, which could quote what a user typed; nothing is logged to standard output.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

from minikms.platform.logs import LEVELS, Log, log_to


class _ThroughOurLog(logging.Handler):
    """A library's record becomes an event named by its message."""

    def emit(self, record: logging.LogRecord) -> None:
        level = max(
            (name for name in LEVELS if LEVELS[name] <= record.levelno), key=LEVELS.__getitem__, default="debug"
        )
        Log().log(level, record.getMessage().strip())


def configure(log_format: Literal["console", "json"], level: Literal["debug", "info", "warning", "error"]) -> None:
    """Sets up the log of this process, on standard error."""
    log_to(sys.stderr, log_format, level)
    root = logging.getLogger()
    root.handlers[:] = [_ThroughOurLog()]
    root.setLevel(logging.WARNING)
