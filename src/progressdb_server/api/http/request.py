"""One request: its headers, its caller and its decoded body.

Owns: reading a body up to `limits.REQUEST_BYTES_MAX`, strict decoding of JSON, and the caller that access control
identified. Invariants: a handler gets a body only after all of it was received. JSON that is nested too deeply, not
UTF-8 or of the wrong shape causes a 400 and never another error.

`Request` replaces Starlette's class of that name because it is faster: the routes that append and list messages are
called thousands of times a second.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from itertools import accumulate
from typing import Any, Final, Protocol, TypeVar

import msgspec

from progressdb_server.api.http import access, head, limits
from progressdb_server.api.http.errors import (
    AUTHOR_REQUIRED,
    CLOSE_HEADERS,
    INVALID_IDEMPOTENCY_KEY,
    INVALID_JSON,
    ClientGoneError,
    Header,
    bad_request,
    not_found,
    too_large,
)
from progressdb_server.store.model import Idempotency

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

Body = TypeVar("Body")

ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

DIRECT: Final = "progressdb.direct"
"""Key of a `DirectChannel` in the ASGI scope. Only this project's own server sets it."""


class DirectChannel(Protocol):
    """Reads a body and sends a response without ASGI messages, each of which costs a coroutine and a dictionary.

    Neither method waits. If a method can't finish at once, it does nothing and the caller uses ASGI messages.
    """

    def received_body(self) -> bytes | None:
        """The request's body if all of it was received and none of it was read yet; otherwise None."""
        ...

    def send_response(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """Send a complete response with its Content-Length. Returns False if nothing was sent."""
        ...


_STRINGS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_DEPTH_CHANGES: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def json_depth(raw: bytes) -> int:
    """The nesting depth of the arrays and objects of a JSON text. For malformed text, at least
    the depth that a parser reaches before its error."""
    brackets = _STRINGS.sub(b"", raw).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_DEPTH_CHANGES.__getitem__, brackets)), default=0)


def decode_json(raw: bytes, decoder: msgspec.json.Decoder[Body], refusal: str = INVALID_JSON) -> Body:
    """Decode a body.

    Raises ApiError 400 with the text `refusal` unless the body is UTF-8 JSON of the right shape and depth.
    """
    if raw.count(b"[") + raw.count(b"{") > limits.JSON_DEPTH_MAX and json_depth(raw) > limits.JSON_DEPTH_MAX:
        raise bad_request(refusal)
    try:
        if not raw.isascii():
            raw.decode("utf-8")  # the decoder doesn't check the UTF-8 of fields that it skips
        return decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        # ValueError: text that is not UTF-8, or a number with more digits than Python converts
        raise bad_request(refusal) from None


class Request:
    """One request. Access control sets `principal` and `user`, routing sets `path_params` and `route`."""

    __slots__ = (
        "_query_params",
        "_receive",
        "address",
        "direct",
        "headers",
        "method",
        "path",
        "path_params",
        "principal",
        "query_string",
        "repeated_header",
        "request_id",
        "route",
        "user",
    )

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: bytes = scope["query_string"]
        client = scope.get("client")
        self.address: str = client[0] if client else ""
        self.headers, self.repeated_header = head.read_headers(scope["headers"])
        self.request_id = head.request_id(self.headers)
        self.principal: access.Principal = access.NOT_AUTHENTICATED
        self.user: str | None = None
        """The user whose signature was verified."""
        self.path_params: dict[str, str] = {}
        self.route = ""
        """The path template, for logs and metrics. It contains no client input."""
        self.direct: DirectChannel | None = scope.pop(
            DIRECT, None
        )  # it refers to the scope, and a reference cycle is freed late
        self._receive = receive
        self._query_params: dict[str, str] | None = None

    @property
    def query_params(self) -> dict[str, str]:
        """Raises ApiError 400 if the query is malformed or repeats a parameter."""
        if self._query_params is None:
            self._query_params = head.read_query(self.query_string)
        return self._query_params

    # --- the caller ---------------------------------------------------------------------------------------------
    def author(self, body_author: str | None = None) -> str | None:
        """The author that the request acts for, or None. Raises ApiError 400, 403."""
        return access.resolve_author(self.user, self.headers, self.query_params, body_author)

    def required_author(self, body_author: str | None = None) -> str:
        """Like `author`, but also raises ApiError 400 if there is no author."""
        author = self.author(body_author)
        if author is None:
            raise bad_request(AUTHOR_REQUIRED)
        return author

    def idempotency(self, author: str) -> Idempotency | None:
        """The idempotency key of the header `Idempotency-Key`, or None. Raises ApiError 400 if it is malformed."""
        key = self.headers.get(head.IDEMPOTENCY_KEY)
        if key is None:
            return None
        if not limits.IDEMPOTENCY_KEY_PATTERN.fullmatch(key):
            raise bad_request(INVALID_IDEMPOTENCY_KEY)
        return Idempotency(scope=self.principal.scope(author), key=key.decode("ascii"))

    def id_from_path(self, name: str, missing: str) -> str:
        """The id in the path parameter `name`. Raises ApiError 404 with the text `missing` if it is not a valid id."""
        value = self.path_params[name]
        if not limits.ID_PATTERN.fullmatch(value):
            raise not_found(missing)
        return value

    # --- the body -----------------------------------------------------------------------------------------------
    async def json(self, decoder: msgspec.json.Decoder[Body], refusal: str = INVALID_JSON) -> Body:
        """The decoded body; see `body` and `decode_json`."""
        return decode_json(await self.body(), decoder, refusal)

    def received_body(self) -> bytes | None:
        """The whole body if it was already received, otherwise None. Raises ApiError 413 if it is too large."""
        received = self.direct.received_body() if self.direct is not None else None
        if received is not None and len(received) > limits.REQUEST_BYTES_MAX:
            raise too_large()
        return received

    async def body(self) -> bytes:
        """The whole body. Raises ApiError 413 if it is too large, ClientGoneError if the client disconnected."""
        received = self.received_body()
        if received is not None:
            return received
        declared = self.headers.get(head.CONTENT_LENGTH)
        if declared is not None and declared.isdigit() and int(declared) > limits.REQUEST_BYTES_MAX:
            await self._discard(int(declared))
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientGoneError
        first: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(first) > limits.REQUEST_BYTES_MAX:
                raise too_large()
            return first
        return await self._rest_of_body(first)

    async def _rest_of_body(self, first: bytes) -> bytes:
        parts = [first]
        length = len(first)
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            part: bytes = message.get("body", b"")
            length += len(part)
            if length > limits.REQUEST_BYTES_MAX:
                parts.clear()
                if message.get("more_body", False):
                    await self._discard(length)
                raise too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _discard(self, expected: int) -> None:
        """Raise ApiError 413. First read the rest of the body, up to a bound, so that the client can read the response.

        Raises ClientGoneError if the client closed the connection.
        """
        waits_for_continue = head.EXPECT in self.headers
        if waits_for_continue or expected > limits.DISCARDED_BYTES_MAX:
            raise too_large(CLOSE_HEADERS)
        discarded = 0
        while discarded <= limits.DISCARDED_BYTES_MAX:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            discarded += len(message.get("body", b""))
            if not message.get("more_body", False):
                raise too_large()
        raise too_large(CLOSE_HEADERS)
