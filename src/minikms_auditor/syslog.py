"""Syslog: RFC 5424 messages with octet counting, over TCP (RFC 6587) or TLS (RFC 5425).

Owns: the message of a line, its frame, and finding out whether the receiver has read it. Nothing says that it has
stored it, so such a sink can't be `required`. Syslog has no acknowledgement.
So a batch has a connection of its own, whose end is one: the client closes its half, and the receiver closes the other
only once it has read everything; with unread bytes its kernel resets the connection. A receiver that was killed closes
it too. So the next connection is opened before anything is sent, and must live for `settle_seconds` after the end.
Invariants: a frame names its length, so no byte of a message can end it; every exchange is bounded in time. It must
never keep a connection whose messages are confirmed.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

from minikms.processes.http_client import ExchangeError, seconds_left
from minikms.processes.tls_files import client_context
from minikms_auditor.config import AuditorFiles, SyslogSink
from minikms_auditor.sinks import SinkMessage, Transport

SETTLE_SECONDS: Final = 5.0
"""How long a receiver may have a message in memory only, after it has read it."""
EXCHANGE_SECONDS_MAX: Final = 30.0
_FACILITY_AUDIT: Final = 13  # RFC 5424, table 1: log audit
_WARNING, _INFORMATIONAL = 4, 6
_APP_NAME: Final = b"minikms"
_MSGID_CHARS_MAX: Final = 32
_NOT_PRINTABLE: Final = re.compile(r"[^!-~]", re.ASCII)
_READ_BYTES: Final = 4096


class Syslog(Transport):
    def __init__(
        self,
        sink: SyslogSink,
        files: AuditorFiles,
        *,
        settle_seconds: float = SETTLE_SECONDS,
        exchange_seconds: float = EXCHANGE_SECONDS_MAX,
    ) -> None:
        parts = urlsplit(sink.url)
        self._address = (parts.hostname or "", parts.port or 0)
        self._context = client_context(files, ca=sink.ca, cert=sink.cert, key=sink.key) if sink.has_tls else None
        self._host = _NOT_PRINTABLE.sub("_", socket.gethostname())[:255].encode() or b"-"
        self._exchange_seconds = exchange_seconds
        self.settle_seconds = settle_seconds
        self._next: socket.socket | None = None
        """Opened before the last batch was sent."""

    def deliver(self, messages: Sequence[SinkMessage]) -> None:
        ends_s = time.monotonic() + self._exchange_seconds
        connection = self._next or self._connect(ends_s)
        self._next = None
        with connection:
            self._next = self._connect(ends_s)
            _check_open(connection)  # what is sent to a receiver that was killed before seems to be read
            connection.settimeout(seconds_left(ends_s))
            connection.sendall(b"".join([frame(each, self._host) for each in messages]))
            _end(connection, ends_s)

    def check(self) -> None:
        """Checks the connection that was opened last. Raises OSError; ExchangeError if the receiver ended it."""
        if self._next is not None:
            _check_open(self._next)

    def reset(self) -> None:
        if self._next is not None:
            self._next.close()
        self._next = None

    def _connect(self, ends_s: float) -> socket.socket:
        connection = socket.create_connection(self._address, seconds_left(ends_s))
        if self._context is None:
            return connection
        try:
            connection.settimeout(seconds_left(ends_s))
            return self._context.wrap_socket(connection, server_hostname=self._address[0])
        except BaseException:
            connection.close()
            raise


def _check_open(connection: socket.socket) -> None:
    connection.settimeout(0)
    with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
        if not connection.recv(_READ_BYTES):
            raise ExchangeError("it has ended a connection, and may have lost what it had read")


def _end(connection: socket.socket, ends_s: float) -> None:
    """Close this half, and wait until the receiver has closed the other one. Raises OSError, ExchangeError."""
    connection.settimeout(seconds_left(ends_s))
    if isinstance(connection, ssl.SSLSocket):
        with contextlib.suppress(ssl.SSLEOFError):  # its answer to close_notify, which rsyslog does not send
            connection = connection.unwrap()
    with contextlib.suppress(OSError):  # the receiver may have closed it already
        connection.shutdown(socket.SHUT_WR)
    while True:
        connection.settimeout(seconds_left(ends_s))
        try:
            if not connection.recv(_READ_BYTES):
                return
        except TimeoutError:
            raise ExchangeError("it does not read what was sent") from None


def frame(message: SinkMessage, host: bytes) -> bytes:
    """MSG-LEN SP SYSLOG-MSG."""
    event = message.event
    priority = _FACILITY_AUDIT * 8 + (_INFORMATIONAL if event.outcome == "ok" else _WARNING)
    message_id = _NOT_PRINTABLE.sub("_", event.type)[:_MSGID_CHARS_MAX].encode() or b"-"
    head = b"<%d>1 %b %b %b - %b - " % (priority, _timestamp(event.ts), host, _APP_NAME, message_id)
    return b"%d %b%b" % (len(head) + len(message.body), head, message.body)


def _timestamp(ts_ns: int) -> bytes:
    seconds, rest_ns = divmod(ts_ns, 1_000_000_000)
    at = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{rest_ns // 1000:06}Z".encode()
