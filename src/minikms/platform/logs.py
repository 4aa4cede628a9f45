"""structlog, imported without rich: `from minikms.platform.logs import structlog`; and how a service writes its log.

A log that nobody reads must not stop a service: a line that its pipe or socket can't take at once is dropped and
counted, and the next line that fits says how many were. No write waits.

structlog imports rich and its colouring of source code wherever they are installed. That is a sixth of the start of the
daemon and of the server, and neither uses it. Only commands that print tables import rich, by themselves. Invariant:
whoever imports rich afterwards gets it. Nothing may depend on rich being absent: how a traceback is shown is decided
where the log is configured.
"""

from __future__ import annotations

import io
import os
import select
import stat
import sys
import threading
import time
from typing import Final, TextIO, cast

from minikms.api.printable import clean

_HIDDEN = "rich"

if _HIDDEN in sys.modules:
    import structlog
else:
    sys.modules[_HIDDEN] = None  # type: ignore[assignment]  # an import of it then fails as if it were not installed
    try:
        import structlog
    finally:
        del sys.modules[_HIDDEN]

__all__ = ["clean_values", "log_lines", "service_logger", "structlog"]

_PART_BYTES: Final = select.PIPE_BUF
"""A pipe that poll(2) calls writable has room for so much. A socket's room is larger."""


def clean_values(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """The processor before a renderer of text; JSON escapes by itself."""
    return {name: clean(value) if isinstance(value, str) else value for name, value in event.items()}


class _LogLines(io.TextIOBase):
    """Writes lines and counts those that it drops. `processors` render the line about these. Used by any thread."""

    def __init__(self, stream: TextIO, processors: list[structlog.typing.Processor]) -> None:
        self._stream = stream  # so that its descriptor stays open
        self._descriptor = stream.fileno()
        kind = os.fstat(self._descriptor).st_mode
        self._is_shared = hasattr(os, "RWF_NOWAIT") and (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind))
        """Another process may take the room that poll(2) has found."""
        self._processors = processors
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._lock = threading.Lock()
        self._dropped = 0
        self._is_cut = False
        """The last line was written in part."""

    def write(self, text: str) -> int:
        with self._lock:
            if self._dropped and self._put(self._line_of_dropped()):
                self._dropped = 0
            if self._dropped or not self._put(text):
                self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Nothing waits in this process."""

    def _line_of_dropped(self) -> str:
        event: structlog.typing.EventDict = {"event": "log lines dropped", "count": self._dropped}
        *processors, renderer = self._processors
        for processor in processors:
            event = cast(structlog.typing.EventDict, processor(None, "warning", event))
        return cast(str, renderer(None, "warning", event)) + "\n"

    def _put(self, text: str) -> bool:
        """Whether all of it was written."""
        rest = memoryview(("\n" * self._is_cut + text).encode("utf-8", "backslashreplace"))
        size = len(rest)
        try:
            while rest and self._poll.poll(0):
                rest = rest[self._write(rest[:_PART_BYTES]) :]
        except OSError:  # a reader that has gone, a full disk: neither may stop the service
            pass
        if len(rest) < size:
            self._is_cut = bool(rest)
        return not rest

    def _write(self, part: memoryview) -> int:
        if self._is_shared:
            try:
                return os.pwritev(self._descriptor, (part,), -1, os.RWF_NOWAIT)
            except BlockingIOError:
                raise
            except OSError:  # a kernel that can't (Linux before 6.4 for pipes), or another error, which comes again
                pass
        return os.write(self._descriptor, part)


def log_lines(
    stream: TextIO | None, processors: list[structlog.typing.Processor]
) -> structlog.WriteLoggerFactory | structlog.PrintLoggerFactory:
    """The factory of loggers that write to `stream` and never wait for its reader. The last processor renders. `stream`
    is None where a service was started with a closed standard error: nothing is logged then."""
    if stream is None:
        return structlog.PrintLoggerFactory(open(os.devnull, "w"))
    try:
        return structlog.WriteLoggerFactory(cast(TextIO, _LogLines(stream, processors)))
    except io.UnsupportedOperation:  # no descriptor: it is in memory
        return structlog.PrintLoggerFactory(stream)


def service_logger(log_format: str) -> structlog.stdlib.BoundLogger:
    """The log of a process that serves, on standard error: one event a line, as JSON or as `key=value`."""
    renderers: list[structlog.typing.Processor] = (
        [structlog.processors.JSONRenderer()]
        if log_format == "json"
        else [clean_values, structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"])]
    )
    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *renderers,
    ]
    structlog.configure(
        processors=processors, logger_factory=log_lines(sys.stderr, processors), cache_logger_on_first_use=True
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger("minikms", started_at=time.time_ns() // 1_000_000_000)
    return logger
