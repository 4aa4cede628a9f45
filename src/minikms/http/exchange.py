"""The seam between the HTTP engine and the application: request, response, and what an application must offer.

Owns: the shapes that cross the seam, and nothing that runs. Invariants: a `Request` never holds a copy of the body; the
body is a view that the engine takes back when `handle` returns. The engine knows no path, no verb and no role.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable
from typing import Final, Protocol, TypeVar

import msgspec

from minikms import api
from minikms.errors import MiniKmsError
from minikms.http.head import ParsedHead
from minikms.http.limits import Refusal

S = TypeVar("S")

JSON: Final = "application/json"


class Request(msgspec.Struct, gc=False):
    """One request whose head and body have arrived whole.

    `body` is a view of the engine's own memory: it can be read until `handle` returns, then it is released (a later
    read raises `ValueError`) and the memory zeroed. A handler that goes on asynchronously decodes the body first.
    """

    head: ParsedHead
    body: memoryview

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def path(self) -> str:
        """As sent: not percent-decoded."""
        return self.head.path

    @property
    def query(self) -> str:
        """As sent, without the `?`; `""` if there is none."""
        return self.head.query

    @property
    def request_id(self) -> str | None:
        """The `x-request-id` header if it matches `api.REQUEST_ID_PATTERN`."""
        return self.head.request_id


METHODS_SERVED: Final = "GET, POST"
"""By any path of the application; a test compares the two."""


class Response:
    """An answer other than "200, JSON". `headers` are ready-made (name, value) pairs without line breaks."""

    __slots__ = ("body", "close", "content_type", "headers", "status")

    def __init__(
        self,
        status: int,
        body: bytes,
        content_type: str = JSON,
        close: bool = False,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.close = close
        self.headers = headers


def error_response(status: int, code: str, sentence: str, *, close: bool = False) -> Response:
    """`{"error": sentence, "code": code}` with `status`."""
    return Response(status, msgspec.json.encode(api.ErrorAnswer(sentence, code)), close=close)


def refusal_response(refusal: Refusal) -> Response:
    """The answer to a refusal; the connection is closed after it. A 405 tells which methods there are at all, for RFC
    9110 section 15.5.6 wants that said; which of them a path has is not known here."""
    response = error_response(*refusal, close=True)
    if refusal.status == 405:
        response.headers = (("allow", METHODS_SERVED),)
    return response


def raised_response(error: MiniKmsError) -> Response:
    """The answer to an error that a handler raised. A 401 ends the connection: it will not become another peer's."""
    return error_response(error.status, error.code, str(error), close=error.status == 401)


class Application(Protocol[S]):
    """What the engine asks of the application. All methods are called in the loop's thread and must not block."""

    def open_session(self, sock: socket.socket) -> S | None:
        """A new connection, before a byte of it is read. `None`: it is closed at once."""

    def admit(self, session: S, head: ParsedHead) -> Response | None:
        """The head of a request has arrived, its body not yet whole: is it worth receiving?

        `None` goes on. A response is sent instead of `100 Continue`, and the connection closed: a peer who would be
        refused anyway can't make the service hold 16 MiB for it. `handle` checks all the same.
        """

    def handle(self, session: S, request: Request) -> bytes | Response | Awaitable[bytes | Response]:
        """Answer one request. `bytes` means 200 and JSON. `MiniKmsError` becomes its status and code.

        An awaitable goes on after `handle` has returned, without the body. It is not cancelled when the client leaves.
        """

    def refused(self, session: S | None, status: int, code: str) -> None:
        """The engine has refused input of this session, or (None) a connection over the bound."""

    def commit(self) -> bool:
        """The turn ends: make its audit lines durable. False: every answer of the turn is replaced by a 503."""

    def close_session(self, session: S) -> None:
        """The connection is gone. A handler of it may still be running."""
