"""Responses, and sending them over ASGI.

Owns: the encoding of a response as JSON, a streamed list of bounded memory, a stream of events, and `Exchange`, which
adds the headers that every response carries. Invariants:
- A list is sent from its first chunk on, as far as it is there, while the rest is read.
- A list occupies at most `LIST_BUFFER_BYTES_MAX` and one chunk of its source.
- An error before the first byte was sent becomes an error response. A later one ends the connection before the list's
  end, so that no client takes a part for the whole.
- A client that stops reading does not keep an iterator of the store open.
- Every response has its CORS headers and request id, and its status is recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from progressdb_server.api.gate import limits
from progressdb_server.api.gate.errors import LISTS_FULL, ApiError, full
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.http.asgi import ClientGoneError, Header, ListsFullError, Receive, Send
from progressdb_server.http.limits import STREAM_STALL_SECONDS_MAX

_ENCODER: Final = msgspec.json.Encoder()
_JSON: Final = (b"content-type", b"application/json")
_OCTETS: Final = (b"content-type", b"application/octet-stream")
_EVENTS: Final = (b"content-type", b"text/event-stream")
EVENT_SILENCE_S: Final = 15.0
"""After this long without an event a comment is sent, so that no proxy closes the connection as unused."""


class ApiResponse(NamedTuple):
    """A complete response; `content_type` is None if it has no body."""

    status: int
    body: bytes = b""
    content_type: Header | None = _JSON
    headers: tuple[Header, ...] = ()


class JsonList(NamedTuple):
    """A streamed response: `prefix`, the items of all chunks separated by commas, and the `members` that follow the
    list, which are asked for at its end. An empty chunk says that the next one has to wait, so that what there is may
    be sent."""

    prefix: bytes
    chunks: AsyncIterator[Sequence[Any]]
    members: Callable[[], dict[str, str]] = dict
    headers: tuple[Header, ...] = ()


class EventStream(NamedTuple):
    """Server-sent events (WHATWG HTML, section 9.2), each encoded and with its final empty line."""

    events: AsyncIterator[bytes]


AnyResponse = ApiResponse | JsonList | EventStream
NO_CONTENT: Final = ApiResponse(204, content_type=None)

encode_json: Final = _ENCODER.encode


def json_response(value: object, status: int = 200) -> ApiResponse:
    return ApiResponse(status, _ENCODER.encode(value))


def octets_response(value: bytes) -> ApiResponse:
    return ApiResponse(200, value, _OCTETS)


def error_response(error: ApiError) -> ApiResponse:
    return ApiResponse(error.status, _ENCODER.encode({"error": error.text}), _JSON, error.headers)


def redirect(status: int, location: str, headers: tuple[Header, ...] = ()) -> ApiResponse:
    """303 or 308 to a path of this server."""
    place = (b"location", location.encode("ascii"))
    return ApiResponse(status, content_type=None, headers=(place, (b"content-length", b"0"), *headers))


EXCHANGE: Final = "progressdb.exchange"
"""Key of the `Exchange` in the scope that Starlette's router passes on."""


class Exchange:
    """A request, and the way for its response."""

    __slots__ = ("_headers", "_send", "receive", "request", "status")

    def __init__(self, request: ApiRequest, headers: tuple[Header, ...], receive: Receive, send: Send) -> None:
        """`headers` are added to the response."""
        self.request = request
        self.receive = receive
        self.status = 0
        """The status of the response that is being sent; 0 before it begins."""
        self._headers = headers
        self._send = send

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """ASGI's `send`, with the headers of every response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*self._headers, *message.get("headers", ())]
        await self._send(message)

    def send_at_once(self, response: AnyResponse) -> bool:
        """Send a complete response without a wait. Returns False if that is not possible; `respond` is then."""
        direct = self.request.direct
        if direct is None or not isinstance(response, ApiResponse):
            return False
        status, body, content_type, headers = response
        if content_type is None or self.status:
            return False
        self.status = status
        return direct.send_response(status, (*self._headers, *headers, content_type), body)

    async def respond(self, response: AnyResponse) -> None:
        """Sends the response. Raises what the source of a stream raises, and ClientGoneError if the client leaves a
        stream unread.
        """
        if isinstance(response, ApiResponse):
            await send_complete(response, self.send)
        elif isinstance(response, EventStream):
            await send_events(response, self.receive, self.send)
        elif (direct := self.request.direct) is None:
            await send_list(response, self.receive, self.send)
        else:
            waiting = direct.begin_list()
            if waiting is not None:
                try:
                    await waiting
                except ListsFullError:
                    raise full(LISTS_FULL) from None
            try:
                await send_list(response, self.receive, self.send)
            finally:
                direct.end_list()


def _start(status: int, headers: list[Header]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def send_complete(response: ApiResponse, send: Send) -> None:
    headers = list(response.headers)
    if response.content_type is not None:
        headers.append(response.content_type)
        headers.append((b"content-length", b"%d" % len(response.body)))
    await send(_start(response.status, headers))
    await send({"type": "http.response.body", "body": response.body})


async def send_list(listed: JsonList, receive: Receive, send: Send) -> None:
    """Stream a list; one that comes without a wait and is short is sent whole, with its length.

    Raises what the chunks raise; if nothing was sent yet, the caller can still send an error response. Raises
    ClientGoneError if the client leaves the stream unread for too long.
    """
    pending = bytearray(listed.prefix)
    empty = True
    started = False
    disconnected: asyncio.Task[None] | None = None
    try:
        async for chunk in listed.chunks:
            if chunk:
                _append_items(pending, chunk, first=empty)
                empty = False
                if len(pending) < limits.LIST_BUFFER_BYTES_MAX:
                    continue
            if disconnected is None:
                disconnected = asyncio.create_task(_disconnected(receive))
            elif disconnected.done():
                return  # the client has closed its connection
            if empty or not pending:
                continue
            if not started:
                await send(_start(200, [_JSON, *listed.headers]))
                started = True
            await _send_part(bytes(pending), send)
            pending.clear()
        members = listed.members()
        pending += b"]," + _ENCODER.encode(members)[1:] if members else b"]}"
        if not started:
            await send(_start(200, [_JSON, *listed.headers, (b"content-length", b"%d" % len(pending))]))
        await send({"type": "http.response.body", "body": bytes(pending)})
    finally:
        if disconnected is not None:
            disconnected.cancel()
        close = getattr(listed.chunks, "aclose", None)
        if close is not None:
            await close()


async def send_events(stream: EventStream, receive: Receive, send: Send) -> None:
    """Send each event at once, and a comment after `EVENT_SILENCE_S` without one.

    Returns at the end of the stream or when the client has closed its connection. Raises ClientGoneError as
    `send_list`.
    """
    await send(_start(200, [_EVENTS, (b"cache-control", b"no-store")]))
    disconnected = asyncio.create_task(_disconnected(receive))
    upcoming: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            upcoming = upcoming or asyncio.create_task(_next(stream.events))
            await asyncio.wait({disconnected, upcoming}, timeout=EVENT_SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if disconnected.done():
                return
            if not upcoming.done():
                await _send_part(b": still here\n\n", send)
                continue
            event, upcoming = upcoming.result(), None
            if event is None:
                await send({"type": "http.response.body", "body": b""})
                return
            await _send_part(event, send)
    finally:
        disconnected.cancel()
        if upcoming is not None:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
        close = getattr(stream.events, "aclose", None)
        if close is not None:
            await close()


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)


def _append_items(pending: bytearray, chunk: Sequence[Any], *, first: bool) -> None:
    """The JSON of the items, after a comma unless they are the `first`."""
    start = len(pending)
    _ENCODER.encode_into(chunk, pending, start)  # no copy of the text is made
    pending[start : start + 1] = b"" if first else b","  # in place of the opening bracket
    del pending[-1]  # the closing bracket


async def _send_part(part: bytes, send: Send) -> None:
    try:
        async with asyncio.timeout(STREAM_STALL_SECONDS_MAX):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except TimeoutError:
        raise ClientGoneError from None


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
