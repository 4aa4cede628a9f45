"""What leaves: a whole answer, or a JSON list streamed in bounded memory.

Owns: encoding answers and sending them over ASGI. Invariants: a list is held only up to `LIST_BUFFER_BYTES_MAX`; an
error before the first byte left is a proper answer, one after it ends the connection before the list's end, so that
no client takes a part for the whole. A client that stops reading does not keep a store's iterator open.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from progressdb_server.api.http import limits
from progressdb_server.api.http.errors import ApiError, ClientGoneError, Header
from progressdb_server.api.http.request import Receive, Send

_ENCODER: Final = msgspec.json.Encoder()
_JSON: Final = (b"content-type", b"application/json")
_OCTETS: Final = (b"content-type", b"application/octet-stream")
_EVENTS: Final = (b"content-type", b"text/event-stream")
EVENT_SILENCE_S: Final = 15.0


class Answer(NamedTuple):
    """A whole answer; `content_type` is None where there is no body."""

    status: int
    body: bytes = b""
    content_type: Header | None = _JSON
    headers: tuple[Header, ...] = ()


class JsonList(NamedTuple):
    """`prefix`, the items of all chunks with commas between, `suffix`."""

    prefix: bytes
    chunks: AsyncIterator[Sequence[Any]]
    suffix: bytes = b"]}"


class EventStream(NamedTuple):
    """Server-sent events, each encoded and ended by its empty line (WHATWG HTML, section 9.2)."""

    events: AsyncIterator[bytes]


NO_CONTENT: Final = Answer(204, content_type=None)


def json(value: object) -> Answer:
    return Answer(200, _ENCODER.encode(value))


def octets(value: bytes) -> Answer:
    return Answer(200, value, _OCTETS)


def error(refusal: ApiError) -> Answer:
    return Answer(refusal.status, _ENCODER.encode({"error": refusal.text}), _JSON, refusal.headers)


def json_text(value: object) -> bytes:
    return _ENCODER.encode(value)


def _head(status: int, headers: list[Header]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def send_answer(answer: Answer, send: Send) -> None:
    headers = list(answer.headers)
    if answer.content_type is not None:
        headers.append(answer.content_type)
        headers.append((b"content-length", b"%d" % len(answer.body)))
    await send(_head(answer.status, headers))
    await send({"type": "http.response.body", "body": answer.body})


async def send_list(listed: JsonList, receive: Receive, send: Send) -> None:
    """Whole with its length where it is short, streamed where it is not.

    Raises what the chunks raise; the caller answers it if nothing has left yet. Raises ClientGoneError when the client
    leaves the stream unread for too long.
    """
    pending = bytearray(listed.prefix)
    empty = True
    started = False
    gone: asyncio.Task[None] | None = None
    try:
        async for chunk in listed.chunks:
            if not chunk:
                continue
            if not empty:
                pending += b","
            empty = False
            pending += _ENCODER.encode(chunk)[1:-1]
            if len(pending) < limits.LIST_BUFFER_BYTES_MAX:
                continue
            if not started:
                await send(_head(200, [_JSON]))
                started = True
                gone = asyncio.create_task(_disconnected(receive))
            elif gone is not None and gone.done():
                return  # the client has closed its connection
            await _send_part(bytes(pending), send)
            pending.clear()
        pending += listed.suffix
        if not started:
            await send(_head(200, [_JSON, (b"content-length", b"%d" % len(pending))]))
        await send({"type": "http.response.body", "body": bytes(pending)})
    finally:
        if gone is not None:
            gone.cancel()
        close = getattr(listed.chunks, "aclose", None)
        if close is not None:
            await close()


async def send_events(stream: EventStream, receive: Receive, send: Send) -> None:
    """Each event at once; a comment where none comes for a while, so that nothing between takes the connection for
    dead. Ends with the stream, or when the client has gone. Raises ClientGoneError as `send_list`."""
    await send(_head(200, [_EVENTS, (b"cache-control", b"no-store")]))
    gone = asyncio.create_task(_disconnected(receive))
    coming: asyncio.Task[bytes | None] | None = None
    try:
        while True:
            coming = coming or asyncio.create_task(_next(stream.events))
            await asyncio.wait({gone, coming}, timeout=EVENT_SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                return
            if not coming.done():
                await _send_part(b": still here\n\n", send)
                continue
            event, coming = coming.result(), None
            if event is None:
                await send({"type": "http.response.body", "body": b""})
                return
            await _send_part(event, send)
    finally:
        gone.cancel()
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        close = getattr(stream.events, "aclose", None)
        if close is not None:
            await close()


async def _next(events: AsyncIterator[bytes]) -> bytes | None:
    return await anext(events, None)


async def _send_part(part: bytes, send: Send) -> None:
    try:
        async with asyncio.timeout(limits.STREAM_STALL_SECONDS_MAX):
            await send({"type": "http.response.body", "body": part, "more_body": True})
    except TimeoutError:
        raise ClientGoneError from None


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
