"""One exchange with another host over HTTP, for the processes beside the key service.

Owns: the only HTTP client of the gateway and of the auditor. Invariants: an answer is bounded in size, and the whole
exchange in time, whatever the pace of the peer; only the resolver of the machine has time limits of its own. A
certificate is verified by the context that is passed in; a redirect is not followed. It must never try twice, or put
what it sends or gets into an error. The key service must not import it.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

ANSWER_BYTES_MAX: Final = 64 * 1024
_READ_BYTES: Final = 16 * 1024


class ExchangeError(Exception):
    """The answer can't be used. Its text is for the operator."""


class HttpAnswer(NamedTuple):
    """retry_after: of the header, in seconds; 0 without one."""

    status: int
    body: bytes
    retry_after: int


class HttpClient:
    """Sends requests to one URL, each on a connection of its own. context: of TLS, None for plain HTTP."""

    def __init__(self, url: str, context: ssl.SSLContext | None, *, agent: str) -> None:
        """`agent`: the name in `User-Agent`. Raises ValueError."""
        parts = urlsplit(url)
        self._host, self._context, self._agent = parts.hostname or "", context, agent
        self._port = parts.port or (80 if context is None else 443)
        self.path = parts.path.rstrip("/")
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._sock: socket.socket | None = None
        self._lock = threading.Lock()

    def get(self, headers: Mapping[str, str], ends_s: float, *, bytes_max: int) -> HttpAnswer:
        """Asks for the URL itself. As `post`."""
        return self._exchange("GET", self.target, None, headers, ends_s=ends_s, bytes_max=bytes_max)

    def post(self, target: str, body: bytes, headers: Mapping[str, str], ends_s: float) -> HttpAnswer:
        """`ends_s`: when it must have answered, monotonic. Raises OSError, ExchangeError."""
        return self._exchange("POST", target, body, headers, ends_s=ends_s, bytes_max=ANSWER_BYTES_MAX)

    def abort(self) -> None:
        """End an exchange, from another thread."""
        with self._lock:
            if self._sock is not None:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def _exchange(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], *, ends_s: float, bytes_max: int
    ) -> HttpAnswer:
        kind = http.client.HTTPConnection if self._context is None else http.client.HTTPSConnection
        connection = kind(self._host, self._port)
        try:
            with contextlib.closing(self._connect(ends_s)) as sock:
                with self._lock:
                    self._sock = sock
                connection.sock = cast(socket.socket, _TimedSocket(sock, ends_s))
                connection.request(method, target, body, {"User-Agent": self._agent, **headers})
                content = b""
                with connection.getresponse() as answer:
                    retry_after = answer.headers.get("Retry-After", "")
                    while part := answer.read1(_READ_BYTES):
                        content += part
                        if len(content) > bytes_max:
                            raise ExchangeError(f"its answer is larger than {bytes_max} bytes")
                    if answer.length:
                        raise ExchangeError("its answer ends too early")
            is_number = retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10
            return HttpAnswer(answer.status, content, int(retry_after) if is_number else 0)
        except TimeoutError:  # also that of a handshake, which has a text of its own
            raise TimeoutError("no answer in time") from None
        except OSError:  # first: the error of a wrong certificate is a ValueError too
            raise
        except (http.client.HTTPException, ValueError) as error:  # their texts hold what was sent or answered
            raise ExchangeError(f"it does not speak HTTP ({type(error).__name__})") from None
        finally:
            with self._lock:
                self._sock = None

    def _connect(self, ends_s: float) -> socket.socket:
        """Tries one address of the host after the other, each with an equal part of the time that is left."""
        error = OSError("the host has no address")
        places = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        for left, (family, kind, protocol, _, place) in zip(range(len(places), 0, -1), places, strict=True):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(seconds_left(ends_s) / left)
                sock.connect(place)
                sock.settimeout(seconds_left(ends_s))
                if self._context is None:
                    return sock
                return self._context.wrap_socket(sock, server_hostname=self._host)
            except OSError as failure:
                sock.close()
                error = failure
        raise error


class _TimedSocket:
    """A connected socket as the standard library uses it. Each step has the time that is left until `ends_s`."""

    def __init__(self, sock: socket.socket, ends_s: float) -> None:
        self._sock, self._ends_s = sock, ends_s

    def sendall(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._sock.settimeout(seconds_left(self._ends_s))
            rest = rest[self._sock.send(rest) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._ends_s))

    def close(self) -> None:
        """The standard library calls it before it has read the answer. `HttpClient` closes the socket."""


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, ends_s: float) -> None:
        self._sock, self._ends_s = sock, ends_s

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what BufferedReader passes
        self._sock.settimeout(seconds_left(self._ends_s))
        return self._sock.recv_into(buffer)


def seconds_left(ends_s: float) -> float:
    """The time until `ends_s`. Raises TimeoutError if none is left."""
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no answer in time")
    return left_s
