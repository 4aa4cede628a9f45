"""One request, from its head to its decoded body.

Owns: reading a body within its bound, decoding JSON strictly, and the caller's facts that the gate has found.
Invariants: a body is whole or not used; JSON that is too deep, not UTF-8 or of the wrong shape is a 400 and never
another error. It sits below Starlette's request objects, since the routes that append and list messages are called
thousands of times a second.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from itertools import accumulate
from typing import Any, Final, Protocol, TypeVar

import msgspec

from progressdb_server.api.http import access, head, limits
from progressdb_server.api.http.errors import (
    CLOSE_HEADERS,
    ApiError,
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

DIRECT: Final = "progressdb.direct"
"""Where ASGI's scope holds a `Direct`, if the server has one."""


class Direct(Protocol):
    """What a server offers beside ASGI's messages, which are a coroutine and a dictionary each: both do nothing where
    they can't do it at once, and leave it to the messages.
    """

    def whole_body(self) -> bytes | None:
        """The request's body, once it has come whole and if nobody has read of it."""
        ...

    def answer(self, status: int, headers: Sequence[Header], body: bytes) -> bool:
        """The whole answer, with its length; False if it was not sent."""
        ...


_STRINGS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEPS: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def json_depth(raw: bytes) -> int:
    """How deep the arrays and objects of a JSON text are nested; of one that is malformed, at least as deep as a
    parser goes.
    """
    brackets = _STRINGS.sub(b"", raw).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)


def decode_json(raw: bytes, decoder: msgspec.json.Decoder[Body], refusal: str = "invalid json") -> Body:
    """Decode a body. Raises ApiError 400 with `refusal` for anything but UTF-8 JSON of the right shape and depth."""
    if raw.count(b"[") + raw.count(b"{") > limits.JSON_DEPTH_MAX and json_depth(raw) > limits.JSON_DEPTH_MAX:
        raise bad_request(refusal)
    try:
        if not raw.isascii():
            raw.decode("utf-8")  # the decoder skips fields that it does not know without looking at their text
        return decoder.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        # ValueError: a UnicodeDecodeError, or a number of more digits than Python converts
        raise bad_request(refusal) from None


class Call:
    """One request. The gate sets `principal` and `user`, the routing `parameters` and `route`."""

    __slots__ = (
        "_query",
        "_receive",
        "address",
        "direct",
        "headers",
        "method",
        "parameters",
        "path",
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
        self.principal: access.Principal = access.NOBODY
        self.user: str | None = None
        """The user whose signature was verified."""
        self.parameters: dict[str, str] = {}
        self.route = ""
        """The path's template, for logs and metrics: it holds nothing that a client chose."""
        self.direct: Direct | None = scope.pop(DIRECT, None)  # it holds the scope: what holds each other is freed late
        self._receive = receive
        self._query: dict[str, str] | None = None

    @property
    def query(self) -> dict[str, str]:
        """Raises ApiError 400 where the query is malformed or repeats a parameter."""
        if self._query is None:
            self._query = head.read_query(self.query_string)
        return self._query

    # --- the caller ---------------------------------------------------------------------------------------------
    def author(self, body_author: str | None = None) -> str | None:
        return access.resolve_author(self.user, self.headers, self.query, body_author)

    def required_author(self, body_author: str | None = None) -> str:
        author = self.author(body_author)
        if author is None:
            raise bad_request("author required for backend requests")
        return author

    def idempotency(self, author: str) -> Idempotency | None:
        key = self.headers.get(head.IDEMPOTENCY_KEY)
        if key is None:
            return None
        if not limits.IDEMPOTENCY_KEY_PATTERN.fullmatch(key):
            raise bad_request("the Idempotency-Key must be 1 to 255 visible ASCII characters")
        return Idempotency(scope=self.principal.scope(author), key=key.decode("ascii"))

    def id_from_path(self, name: str, missing: str) -> str:
        """An id in the path; one that no record can have is as unknown as any other."""
        value = self.parameters[name]
        if not limits.ID_PATTERN.fullmatch(value):
            raise not_found(missing)
        return value

    # --- the body -----------------------------------------------------------------------------------------------
    async def json(self, decoder: msgspec.json.Decoder[Body], refusal: str = "invalid json") -> Body:
        return decode_json(await self.body(), decoder, refusal)

    def whole_body(self) -> bytes | None:
        """The body, if it has come whole already; None where it has to be waited for. Raises ApiError 413."""
        whole = self.direct.whole_body() if self.direct is not None else None
        if whole is not None and len(whole) > limits.REQUEST_BYTES_MAX:
            raise too_large()
        return whole

    async def body(self) -> bytes:
        """The whole body. Raises ApiError 413 past the bound, ClientGoneError where the rest never came."""
        whole = self.whole_body()
        if whole is not None:
            return whole
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
        """Read what is too large to its end, up to a bound, so that the client reads its answer; then raise 413."""
        waits_for_continue = head.EXPECT in self.headers
        if waits_for_continue or expected > limits.DISCARDED_BYTES_MAX:
            raise ApiError(413, too_large().text, CLOSE_HEADERS)
        discarded = 0
        while discarded <= limits.DISCARDED_BYTES_MAX:
            message = await self._receive()
            if message["type"] != "http.request":
                raise ClientGoneError
            discarded += len(message.get("body", b""))
            if not message.get("more_body", False):
                raise too_large()
        raise ApiError(413, too_large().text, CLOSE_HEADERS)
