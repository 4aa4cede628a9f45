"""Requests and answers: what the engine hands to an application, what it gets back, and the bytes of an answer.

Owns: the `Application` protocol, `HttpRequest` and `Response`, and the only code that writes a status line or a header
of an answer. Invariants: an `HttpRequest` holds no copy of the body; the body is a view that the engine takes back when
`Application.handle` returns. Every answer has exactly one Content-Length and no transfer coding. A header name or value
with a line break raises. It must never do I/O, or know a path, a verb or a role.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Awaitable, Hashable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, NamedTuple, Protocol, TypeVar

import msgspec

from minikms import api
from minikms.api.errors import KmsRefusedError
from minikms.http.head import ParsedHead
from minikms.http.limits import Refusal

S = TypeVar("S")

JSON: Final = "application/json"
METHODS_SERVED: Final = "GET, POST"
"""The methods that any path of the application accepts; a test compares the two."""

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_LENGTH_LINES_COUNT: Final = 4096
_LENGTH_LINES: Final = [b"%d\r\n\r\n" % length for length in range(_LENGTH_LINES_COUNT)]
_FIELD: Final = re.compile(r"[A-Za-z0-9-]+: [\t -~]*")
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}


class HttpRequest(msgspec.Struct, gc=False):
    """One request whose head and body have arrived completely.

    `body` is a view of the engine's memory. When `handle` returns, the engine releases it (a later read raises
    `ValueError`) and zeroes the memory. A handler that continues asynchronously must decode the body first.
    """

    head: ParsedHead
    body: memoryview

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        """The path of the request, not percent-decoded."""
        return self.head.path

    @property
    def query(self) -> str:
        """The query of the request without the `?`, not percent-decoded; empty if there is none."""
        return self.head.query

    @property
    def request_id(self) -> str | None:
        """The `x-request-id` header, or None if there is none or it does not match `api.REQUEST_ID_PATTERN`."""
        return self.head.request_id


@dataclass(slots=True, eq=False)
class Response:
    """An answer. `close`: the connection ends after it. `headers`: further (name, value) pairs without line breaks.

    `uncommitted`: it is sent as it is, even if the turn's `Application.commit` fails or has to wait.
    """

    status: int
    body: bytes = field(repr=False)
    content_type: str = JSON
    close: bool = False
    headers: tuple[tuple[str, str], ...] = ()
    uncommitted: bool = False


def error_response(status: int, code: str, sentence: str, *, close: bool = False) -> Response:
    """`{"error": sentence, "code": code}` with `status`."""
    return Response(status, msgspec.json.encode(api.ErrorAnswer(sentence, code)), close=close)


def refusal_response(refusal: Refusal) -> Response:
    """The answer to a refusal; the connection is closed after it.

    A 405 needs an `Allow` header (RFC 9110 section 15.5.6). It lists the methods of all paths, because the engine does
    not know the methods of one path.
    """
    response = error_response(*refusal, close=True)
    if refusal.status == 405:
        response.headers = (("allow", METHODS_SERVED),)
    elif refusal.status == 503 and refusal.code == api.CODE_TOO_MANY:
        response.headers = (("retry-after", str(api.FULL_RETRY_SECONDS)),)
    return response


def raised_response(error: KmsRefusedError) -> Response:
    """The answer to an error that a handler raised. A 401 ends the connection, because its peer can't change."""
    response = error_response(error.status, error.code, str(error), close=error.status == 401)
    if error.retry_after_s:
        response.headers = (("retry-after", str(error.retry_after_s)),)
    return response


class GroupFull(NamedTuple):
    """There is no place for one more connection of this group."""

    group: Hashable


class Link(Protocol):
    """The connection of a session, as its application sees it."""

    def regroup(self) -> None:
        """Ask `Application.group` again. Call this only in `admit`, in `handle`, or before its answer."""

    def abort(self) -> None:
        """Close it at once."""


class Application(Protocol[S]):
    """What an application implements. The engine calls all methods in the loop's thread; they must not block."""

    def open_session(
        self, sock: socket.socket, tls: ssl.SSLObject | None, link: Link
    ) -> S | GroupFull | Refusal | None:
        """Accept a new connection, before a byte of it is read. A refusal is answered, and the connection closed;
        `None`: it is closed without an answer. `GroupFull`: the connection of that group that has waited longest for
        its client is closed, and this is asked again; if none waits, the new one is refused. `tls`: of a connection of
        a `TlsServer`, after the handshake.
        """

    def group(self, session: S) -> Hashable:
        """The connections of one group share the bounds of incomplete requests and of unread answers. Asked when the
        session was opened, and by `Link.regroup`.
        """

    def may_stay(self, session: S) -> bool:
        """Asked twice a second. False: the connection is closed, once no request of it is being answered."""

    def admit(self, session: S, head: ParsedHead) -> Response | None:
        """Decide whether to receive the body of a request whose head has arrived.

        `None`: receive it. A response is sent instead of `100 Continue`, and the connection is closed, so that a peer
        whose request will be refused can't make the service hold its body. `handle` checks the request again.
        """

    def handle(self, session: S, request: HttpRequest) -> bytes | Response | Awaitable[bytes | Response]:
        """Answer one request. `bytes` means 200 with JSON. A `KmsRefusedError` becomes an answer with its code.

        An awaitable continues after `handle` has returned, without the body. It is not cancelled when the client closes
        the connection.
        """

    def refused(self, session: S | None, status: int, code: str) -> None:
        """The engine has refused input of this session, or (None) a connection beyond the bound."""

    def commit(self) -> bool | None:
        """Write the turn's audit lines, at the end of the turn. False: a 503 replaces every answer of the turn, except
        those marked `uncommitted`. None: the others wait, and the engine calls again soon.
        """

    def close_session(self, session: S) -> None:
        """The connection has ended. Handlers of its requests may still be running."""


class AnswerEncoder:
    """Encodes answers, with the date of the last `set_time` (RFC 9110 section 6.6.1)."""

    __slots__ = ("_date", "_ok_prefix")

    def __init__(self, unix_seconds: float) -> None:
        self.set_time(unix_seconds)

    def set_time(self, unix_seconds: float) -> None:
        self._date = f"date: {formatdate(unix_seconds, usegmt=True)}\r\n".encode("ascii")
        self._ok_prefix = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: " % self._date

    def ok(self, body: bytes) -> bytes:
        """A 200 with JSON on a connection that stays open: the hot path."""
        length = len(body)
        line = _LENGTH_LINES[length] if length < _LENGTH_LINES_COUNT else b"%d\r\n\r\n" % length
        return b"".join((self._ok_prefix, line, body))

    def answer(
        self, response: Response, *, close: bool, head_only: bool = False, request_id: str | None = None
    ) -> bytes:
        """Any answer. close: it says that the connection ends. head_only: without the body, for a HEAD request.

        Raises ValueError for a header that would break the answer's framing.
        """
        lines = [f"content-type: {response.content_type}"]
        lines += [f"{name}: {value}" for name, value in response.headers]
        if request_id is not None:
            lines.append(f"{api.REQUEST_ID_HEADER}: {request_id}")
        if close:
            lines.append("connection: close")
        if not all(_FIELD.fullmatch(line) for line in lines):
            raise ValueError("a header of the answer contains a character that is not allowed in headers")
        status_line = f"HTTP/1.1 {response.status} {_PHRASES.get(response.status, 'Unknown')}\r\n"
        fields = "\r\n".join(lines)
        return b"".join(
            (
                status_line.encode("ascii"),
                self._date,
                f"{fields}\r\ncontent-length: {len(response.body)}\r\n\r\n".encode("ascii"),
                b"" if head_only else response.body,
            )
        )
