"""One request: its headers, its caller and its decoded body.

Owns: reading a body up to `http.limits.REQUEST_BYTES_MAX`, strict decoding of JSON, and the caller that access control
identified. Invariants: a handler gets a body only after all of it was received. JSON that is nested too deeply, not
UTF-8 or of the wrong shape causes a 400 and never another error.

`ApiRequest` replaces Starlette's class of that name because it is faster: the routes that append and list messages are
called thousands of times a second.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from itertools import accumulate
from typing import Any, Final, TypeVar

import msgspec

from minikms.api.decoding import UNDECODABLE
from progressdb_server.api.gate import head, keys, limits
from progressdb_server.api.gate.errors import (
    AUTHOR_REQUIRED,
    BODIES_FULL,
    CLOSE_HEADERS,
    INVALID_IDEMPOTENCY_KEY,
    INVALID_JSON,
    ApiError,
    bad_request,
    full,
    too_large,
)
from progressdb_server.http.asgi import BODY_REFUSED, DIRECT, ClientGoneError, DirectChannel, Receive, Scope
from progressdb_server.http.limits import REQUEST_BYTES_MAX
from progressdb_server.store.model import Idempotency, StoreError

Body = TypeVar("Body")

_NOT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))
_DEPTH_CHANGES: Final = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_DIGITS_AS_ZERO: Final = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER: Final = b"0" * (limits.JSON_DIGITS_COUNT_MAX + 1)


def without_strings(raw: bytes) -> bytes:
    """A JSON text without its strings. A string that has no end is removed to the end of the text."""
    return b"".join(raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])


def json_depth(structure: bytes) -> int:
    """The nesting depth of the arrays and objects of a JSON text without its strings. For malformed text, at least the
    depth that a parser reaches before its error."""
    brackets = structure.translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_DEPTH_CHANGES.__getitem__, brackets)), default=0)


def check_json(raw: bytes, refusal: str) -> None:
    """Refuses a JSON text that would stall the event loop: ApiError 413 for more values than the bounds allow, 400 with
    the text `refusal` for a greater depth or a longer number. The decoder holds the interpreter lock, so that a thread
    would not help.
    """
    large = len(raw) > limits.JSON_UNCHECKED_BYTES_MAX
    if not _may_stall(raw, large=large):
        return
    if raw.count(b'"') - raw.count(b'\\"') > 2 * limits.JSON_STRINGS_COUNT_MAX:
        raise _too_many_values(raw, refusal)
    structure = without_strings(raw)
    containers = structure.count(b"[") + structure.count(b"{")
    if (
        containers > limits.JSON_CONTAINERS_COUNT_MAX
        or containers + structure.count(b",") > limits.JSON_VALUES_COUNT_MAX
    ):
        raise _too_many_values(raw, refusal)
    if containers > limits.JSON_DEPTH_MAX and json_depth(structure) > limits.JSON_DEPTH_MAX:
        raise bad_request(refusal)
    if large and _has_long_number(structure):
        raise bad_request(refusal)


def _may_stall(raw: bytes, *, large: bool) -> bool:
    """Whether the text exceeds a bound if its strings are counted too. Most texts do not, and need no closer look."""
    containers = raw.count(b"[") + raw.count(b"{")
    if containers > limits.JSON_DEPTH_MAX:
        return True
    return large and (
        containers + raw.count(b",") > limits.JSON_VALUES_COUNT_MAX
        or raw.count(b'"') > 2 * limits.JSON_STRINGS_COUNT_MAX
        or _has_long_number(raw)
    )


def _has_long_number(text: bytes) -> bool:
    return _LONG_NUMBER in text.translate(_DIGITS_AS_ZERO)


def _too_many_values(raw: bytes, refusal: str) -> ApiError:
    """413, or 400 if already the beginning of the text is nested too deeply."""
    beginning = without_strings(raw[: limits.JSON_UNCHECKED_BYTES_MAX])
    return bad_request(refusal) if json_depth(beginning) > limits.JSON_DEPTH_MAX else too_large()


def decode_json(raw: bytes, decoder: msgspec.json.Decoder[Body], refusal: str = INVALID_JSON) -> Body:
    """Decode a body.

    Raises ApiError 400 with the text `refusal` unless the body is UTF-8 JSON of the right shape and depth, 413 if it
    has too many values.
    """
    check_json(raw, refusal)
    try:
        if not raw.isascii():
            raw.decode("utf-8")  # the decoder doesn't check the UTF-8 of fields that it skips
        return decoder.decode(raw)
    except UNDECODABLE:
        raise bad_request(refusal) from None


def _no_body(message: MutableMapping[str, Any]) -> Exception:
    """Why the message is no part of a body."""
    return full(BODIES_FULL) if message["type"] == BODY_REFUSED else ClientGoneError()


class ApiRequest:
    """One request. Access control sets `caller` and `user`, routing sets `path_params` and `route`."""

    __slots__ = (
        "_query_params",
        "_receive",
        "address",
        "body_bytes",
        "caller",
        "client_address",
        "direct",
        "headers",
        "method",
        "path",
        "path_params",
        "query_string",
        "reason",
        "repeated_header",
        "request_id",
        "route",
        "user",
        "viewer_key",
    )

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query_string: bytes = scope["query_string"]
        client = scope.get("client")
        self.address: str = client[0] if client else ""
        """The address of the connection's peer."""
        self.client_address = self.address
        """The address whose rate the request counts for: behind a configured proxy, the one that the proxy names."""
        self.headers, self.repeated_header = head.read_headers(scope["headers"])
        self.request_id = head.request_id(self.headers)
        self.caller: keys.Caller = keys.NOT_AUTHENTICATED
        self.user: str | None = None
        """The user whose signature was verified."""
        self.viewer_key = 0
        """Number of the admin key that began the viewer's session; 0 outside of one."""
        self.path_params: dict[str, str] = {}
        self.body_bytes = 0
        """The length of the body, once it was read."""
        self.route = ""
        """The path template, for logs and metrics. It contains no client input."""
        self.reason = ""
        """Why the answer is a 503, for the log."""
        # Popped, since it refers to the scope, and a reference cycle is freed late.
        self.direct: DirectChannel | None = scope.pop(DIRECT, None)
        self._receive = receive
        self._query_params: dict[str, str] | None = None

    @property
    def query_params(self) -> dict[str, str]:
        """The parameters of the query. Raises ApiError 400 if it is malformed or repeats one."""
        if self._query_params is None:
            self._query_params = head.read_query(self.query_string)
        return self._query_params

    # --- the caller ---------------------------------------------------------------------------------------------
    @property
    def role(self) -> keys.Role:
        """The role of the key with which the request came, or with which the viewer's session began."""
        return keys.Role.ADMIN if self.viewer_key else self.caller.role

    @property
    def acting_user(self) -> str | None:
        """The signed user whose rights the request has; None if its key acts for anyone, also beside a signature."""
        return None if self.caller.role in keys.OPERATORS else self.user

    def author(self, body_author: str | None = None) -> str | None:
        """The author that the request acts for, or None. Raises ApiError 400, 403."""
        return keys.resolve_author(self.user, self.headers, self.query_params, body_author)

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
        return Idempotency(scope=self.caller.scope(author), key=key.decode("ascii"))

    def id_from_path(self, name: str, missing: type[StoreError]) -> str:
        """The id in the path parameter `name`. Raises `missing` if it is not a valid id."""
        value = self.path_params[name]
        if not limits.ID_PATTERN.fullmatch(value):
            raise missing
        return value

    # --- the body -----------------------------------------------------------------------------------------------
    async def json(self, decoder: msgspec.json.Decoder[Body], refusal: str = INVALID_JSON) -> Body:
        """The decoded body; see `body` and `decode_json`."""
        return decode_json(await self.body(), decoder, refusal)

    def received_body(self) -> bytes | None:
        """The whole body if it was already received, otherwise None. Raises ApiError 413 if it is too large."""
        received = self.direct.received_body() if self.direct is not None else None
        if received is not None and len(received) > REQUEST_BYTES_MAX:
            raise too_large()
        if received is not None:
            self.body_bytes = len(received)
        return received

    async def body(self) -> bytes:
        """The whole body. Raises ApiError 413 if it is too large, 503 if there is no room for it; ClientGoneError if
        the client disconnected."""
        received = self.received_body()
        if received is not None:
            return received
        declared = self.headers.get(head.CONTENT_LENGTH)
        if declared is not None and declared.isdigit() and int(declared) > REQUEST_BYTES_MAX:
            await self._discard(int(declared))
        parts: list[bytes] = []
        length = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise _no_body(message)
            part: bytes = message.get("body", b"")
            length += len(part)
            if length > REQUEST_BYTES_MAX:
                parts.clear()
                if message.get("more_body", False):
                    await self._discard(length)
                raise too_large()
            parts.append(part)
            if not message.get("more_body", False):
                self.body_bytes = length
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
                raise _no_body(message)
            discarded += len(message.get("body", b""))
            if not message.get("more_body", False):
                raise too_large()
        raise too_large(CLOSE_HEADERS)
