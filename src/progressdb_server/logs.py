"""The server's log: one event a line, on standard error.

Owns: the configuration of structlog, and of the standard library's logging that libraries use. Invariants: of a
library's record only its message is logged, without a traceback, which could quote what a user typed; a traceback of
our own shows no values of variables; nothing is logged to standard output.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final, Literal

from minikms.platform.logs import clean_values, log_lines, structlog

_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _ThroughStructlog(logging.Handler):
    """A library's record becomes an event named by its message."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger(record.name).log(record.levelno, record.getMessage().strip())


def configure(log_format: Literal["console", "json"], level: Literal["debug", "info", "warning", "error"]) -> None:
    """Set up logging for this process, to standard error."""
    stream = sys.stderr
    processors: list[Any] = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    if log_format == "json":
        processors.append(structlog.processors.JSONRenderer())
    else:
        processors += [
            clean_values,
            structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=log_lines(stream, processors),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_ThroughStructlog()]
    root.setLevel(logging.WARNING)
