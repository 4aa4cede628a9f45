"""How the auditor connects to other hosts: TLS contexts, and one exchange over HTTP.

Owns: the only HTTP client of the auditor, which witnesses and collectors share. Invariants: a certificate is always
verified, with its name; an answer is bounded in size and time; a redirect is not followed. It must never try twice, or
put what it sends or gets into an error.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from minikms.api.errors import StartError
from minikms.config_file import PEM_BYTES_MAX
from minikms_auditor.config import Files

ANSWER_BYTES_MAX: Final = 64 * 1024
_READ_BYTES: Final = 16 * 1024


class ExchangeError(Exception):
    """The answer can't be used. Its text is for the operator."""


class Answer(NamedTuple):
    """retry_after: of the header, in seconds; 0 without one."""

    status: int
    body: bytes
    retry_after: int


class HttpClient:
    """Sends requests to one URL, each on a connection of its own. context: of TLS, None for plain HTTP."""

    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        self._host, self._context = parts.hostname or "", context
        self._port = parts.port or (80 if context is None else 443)
        self.path = parts.path.rstrip("/")
        self.target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._connection: http.client.HTTPConnection | None = None
        self._lock = threading.Lock()

    def post(self, target: str, body: bytes, headers: Mapping[str, str], ends_s: float) -> Answer:
        """`ends_s`: when it must have answered, monotonic. Raises OSError, ExchangeError."""
        left_s = seconds_left(ends_s)
        connection = (
            http.client.HTTPConnection(self._host, self._port, timeout=left_s)
            if self._context is None
            else http.client.HTTPSConnection(self._host, self._port, timeout=left_s, context=self._context)
        )
        try:
            connection.connect()
            sock = connection.sock  # which the answer goes on reading, if the peer closes the connection after it
            with self._lock:
                self._connection = connection
            connection.request("POST", target, body, {"User-Agent": "minikms-auditor", **headers})
            content = b""
            with connection.getresponse() as answer:
                retry_after = answer.headers.get("Retry-After", "")
                while not answer.isclosed():  # after its last byte the socket is closed, too
                    sock.settimeout(seconds_left(ends_s))
                    part = answer.read1(_READ_BYTES)
                    if not part:
                        break
                    content += part
                    if len(content) > ANSWER_BYTES_MAX:
                        raise ExchangeError(f"its answer is larger than {ANSWER_BYTES_MAX} bytes")
            is_number = retry_after.isascii() and retry_after.isdigit() and len(retry_after) < 10
            return Answer(answer.status, content, int(retry_after) if is_number else 0)
        except OSError:  # first: the error of a wrong certificate is a ValueError too
            raise
        except (http.client.HTTPException, ValueError) as error:  # their texts hold what was sent or answered
            raise ExchangeError(f"it does not speak HTTP ({type(error).__name__})") from None
        finally:
            with self._lock:
                self._connection = None
            connection.close()

    def abort(self) -> None:
        """End an exchange that takes too long, from another thread: its time-outs begin anew with each byte."""
        with self._lock:
            if self._connection is not None and self._connection.sock is not None:
                with contextlib.suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)


def tls_context(files: Files, *, ca: str = "", cert: str = "", key: str = "") -> ssl.SSLContext:
    """That of a client, with the CAs of the file `ca`, else those of the machine, and a certificate of its own if there
    is one. Raises StartError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if ca else ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca:
        try:
            context.load_verify_locations(cadata=files.read(ca, "file of CAs", PEM_BYTES_MAX).decode("ascii"))
        except (ssl.SSLError, UnicodeDecodeError):
            raise StartError(f"{files.path(ca)} is no file of certificates in PEM") from None
    if cert:
        files.check_private(key)
        files.read(cert, "certificate", PEM_BYTES_MAX)  # for the check of who may write it
        try:
            context.load_cert_chain(files.path(cert), files.path(key), password=lambda: b"")
        except (ssl.SSLError, ValueError, OSError):
            raise StartError(
                f"{files.path(cert)} and {files.path(key)} are no certificate and its private key, without a passphrase"
            ) from None
    return context


def seconds_left(ends_s: float) -> float:
    """Raises TimeoutError if there are none."""
    left_s = ends_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("no answer in time")
    return left_s
