"""The log of every program: one event a line, on standard error, as JSON or as `key=value` (logfmt).

Owns: the form of a line, and the writer. A log that nobody reads must not stop a service: a line that its pipe or
socket can't take at once is dropped and counted, and the next line that fits says how many were. Invariants: no write
waits; a line has at most LINE_CHARS_MAX characters, however long its texts are; a control character of a peer reaches
no terminal; the bytes of a buffer are never written, and a traceback shows no values of variables. An exception that
nothing handles has a line in the log of a service, with its place and without its text.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import select
import stat
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, NamedTuple, TextIO

from minikms.api.printable import clean

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}
LINE_CHARS_MAX: Final = 65_536
VALUES_MAX: Final = 64
"""The values of a line that would be longer; each is clipped to its share."""
_PART_BYTES: Final = select.PIPE_BUF
"""A pipe that poll(2) calls writable has room for so much. A socket's room is larger."""
_ESCAPED_CHARS: Final = 12
"""The longest form of one character: a pair of surrogates in JSON."""
_FRAMES_MAX: Final = 20
_WORDS: Final = re.compile(r"[\w .]*", re.ASCII)


class Log:
    """A log whose events have the values `bound` too. Used by any thread."""

    __slots__ = ("_bound",)

    def __init__(self, **bound: object) -> None:
        self._bound = bound

    def bind(self, **values: object) -> Log:
        return Log(**{**self._bound, **values})

    def is_enabled_for(self, level: str) -> bool:
        return LEVELS[level] >= LEVELS[_output.level]

    def log(self, level: str, event: str, /, **values: object) -> None:
        if self.is_enabled_for(level):
            _output.write(level, {**self._bound, **values, "event": event})

    def debug(self, event: str, /, **values: object) -> None:
        self.log("debug", event, **values)

    def info(self, event: str, /, **values: object) -> None:
        self.log("info", event, **values)

    def warning(self, event: str, /, **values: object) -> None:
        self.log("warning", event, **values)

    def error(self, event: str, /, **values: object) -> None:
        self.log("error", event, **values)

    def critical(self, event: str, /, **values: object) -> None:
        self.log("critical", event, **values)

    def exception(self, event: str, /, **values: object) -> None:
        """An error with the exception that is handled: its traceback is a value of a line of text."""
        self.log("error", event, **values, exc_info=True)


class Output(NamedTuple):
    """Takes the events of this process from `level` on, with their values."""

    level: str
    write: Callable[[str, dict[str, object]], object]


def set_output(output: Output) -> Output:
    """Sends the events of all logs of this process there. The output until now."""
    global _output
    previous, _output = _output, output
    return previous


def as_json(values: dict[str, object]) -> str:
    return json.dumps(values, default=_text)


def as_logfmt(values: dict[str, object]) -> str:
    if values.pop("exc_info", False):
        values["exception"] = traceback.format_exc()
    first = {name: values.get(name) for name in ("timestamp", "level", "event")}
    return " ".join(_pair(name, value) for name, value in {**first, **values}.items())


def service_logger(log_format: str) -> Log:
    """The log of a process that serves. Exceptions that nothing handles go there from now on, of every thread, of the
    event loop and of finalizers.
    """
    log_to(sys.stderr, log_format)
    sys.excepthook = lambda _kind, error, _frames: _log_unhandled("exception", error)
    threading.excepthook = lambda failure: _log_unhandled("exception in a thread", failure.exc_value)
    sys.unraisablehook = lambda failure: _log_unhandled("exception in a finalizer", failure.exc_value)
    logging.lastResort = _LibraryLines(logging.WARNING)
    return Log(started_at=time.time_ns() // 1_000_000_000)


class _LibraryLines(logging.Handler):
    """Takes what the standard library logs, such as a task whose exception nobody retrieves. Of a message it takes the
    words at the beginning: the rest shows values.
    """

    def emit(self, record: logging.LogRecord) -> None:
        words = _WORDS.match(str(record.msg))
        _log_unhandled(words[0].strip() if words else "", record.exc_info[1] if record.exc_info else None)


def _log_unhandled(event: str, error: BaseException | None) -> None:
    frames = list(traceback.walk_tb(error.__traceback__ if error is not None else None))[-_FRAMES_MAX:]
    places = [f"{frame.f_globals.get('__name__')}:{line}" for frame, line in frames]
    Log().critical(event, error=type(error).__name__ if error is not None else "", at=" ".join(places))


def log_to(stream: TextIO | None, log_format: str, level: str = "debug") -> None:
    """Sends the events from `level` on to `stream`, without ever waiting for its reader. It is None where a service was
    started with a closed standard error: nothing is logged then.
    """
    render = as_json if log_format == "json" else as_logfmt
    if stream is None:
        set_output(Output(level, lambda _level, _values: None))
        return
    try:
        lines = _LogLines(stream, render)
    except io.UnsupportedOperation:  # no descriptor: it is in memory
        set_output(Output(level, lambda name, values: stream.write(_line(render, name, values))))
    else:
        set_output(Output(level, lines.write))


def _line(render: Callable[[dict[str, object]], str], level: str, values: dict[str, object]) -> str:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    values |= {"level": level, "timestamp": now}
    line = render(values)
    if len(line) >= LINE_CHARS_MAX:
        last = list(values.items())[-VALUES_MAX:]
        share = LINE_CHARS_MAX // (2 * _ESCAPED_CHARS * (len(last) + 1))
        line = render({name[:share]: _clipped(value, share) for name, value in last})
    return line + "\n"


def _clipped(value: object, chars: int) -> object:
    if value is None or isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) else _text(value)
    return text if len(text) <= chars else text[: chars - 1] + "…"


def _text(value: object) -> str:
    """A value that JSON has no form for. Never the content of a buffer, which could be a key."""
    return type(value).__name__ if isinstance(value, (bytes, bytearray, memoryview)) else repr(value)


def _pair(name: str, value: object) -> str:
    name = "".join(char if char.isalnum() or char in "_.-" else "_" for char in name)
    if value is True:
        return name
    text = (
        "" if value is None else value if isinstance(value, str) else json.dumps(value, default=_text).replace('"', "'")
    )
    text = clean(text.replace("\n", "\\n") if name == "exception" else text)
    if any(char in text for char in ' ="'):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{name}={text}"


class _LogLines:
    """Writes lines and counts those that it drops. Used by any thread."""

    def __init__(self, stream: TextIO, render: Callable[[dict[str, object]], str]) -> None:
        self._stream = stream  # so that its descriptor stays open
        self._descriptor = stream.fileno()
        kind = os.fstat(self._descriptor).st_mode
        self._is_shared = hasattr(os, "RWF_NOWAIT") and (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind))
        """Another process may take the room that poll(2) has found."""
        self._render = render
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLOUT)
        self._lock = threading.RLock()
        self._waiting: deque[str] = deque()
        """Lines of this thread: a signal handler and a finalizer may log while it writes one."""
        self._is_writing = False
        self._dropped = 0
        self._is_cut = False
        """The last line was written in part."""

    def write(self, level: str, values: dict[str, object]) -> None:
        line = _line(self._render, level, values)
        with self._lock:
            self._waiting.append(line)
            if self._is_writing:
                return
            self._is_writing = True
            try:
                while self._waiting:
                    self._put_or_count(self._waiting.popleft())
            finally:
                self._is_writing = False

    def _put_or_count(self, line: str) -> None:
        if self._dropped and self._put(self._line_of_dropped()):
            self._dropped = 0
        if self._dropped or not self._put(line):
            self._dropped += 1

    def _line_of_dropped(self) -> str:
        return _line(self._render, "warning", {"event": "log lines dropped", "count": self._dropped})

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


_output = Output("debug", lambda level, values: sys.stderr and sys.stderr.write(_line(as_logfmt, level, values)))
