"""The asyncio connection to the daemon or a gateway.

Owns: the asyncio transport with the parser of the awaited answer. Invariants: a connection carries one request at a
time. One that is in doubt (unexpected bytes, a malformed or late answer, a caller that stopped waiting) is closed and
must never be used again, so that no answer reaches the wrong caller. A new connection may be refused before a request
was sent; then that is the answer to its first request.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from functools import partial
from typing import cast

from minikms.api.errors import KmsError, KmsProtocolError, KmsTimeoutError
from minikms.client.connecting import Endpoint
from minikms.client.wire import HEAD_BYTES_MAX, JSON, Answer, AnswerParser, refusal_in, request_head


class ClientConnection(asyncio.Protocol):
    """Made by `ClientConnection.open`. `usable` is false once nothing may be sent on it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._ended_by: Exception | None = None
        self._transport: asyncio.Transport | None = None
        self._parser: AnswerParser | None = None
        self._on_end: Callable[[Answer | KmsError], None] | None = None
        self._reusable = True
        self._refused: Answer | None = None
        self._sock: socket.socket | None = None
        self.idle_since_s = 0.0

    @classmethod
    async def open(cls, endpoint: Endpoint, timeout_s: float) -> ClientConnection:
        """Opens a connection. Raises KmsError; no request has been sent then."""
        connection = cls(endpoint)
        connection._sock = await endpoint.attach(asyncio.get_running_loop(), connection, timeout_s)
        return connection

    @property
    def usable(self) -> bool:
        return self._reusable and self._transport is not None and not self._transport.is_closing()

    @property
    def is_current(self) -> bool:
        """Whether the files that TLS needs are as they were when it was opened. Raises KmsError."""
        return self._transport is not None and self.endpoint.is_current(self._transport.get_extra_info("ssl_object"))

    async def exchange(
        self,
        target: bytes,
        body: bytes | bytearray | None,
        request_id: str | None,
        timeout_s: float,
        content_type: bytes = JSON,
    ) -> Answer:
        """Sends a request and waits for its answer. Raises KmsUnavailableError, KmsTimeoutError and
        KmsProtocolError."""
        length = None if body is None else len(body)
        waiter: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            head = request_head(target, length, request_id, content_type, self.endpoint.origin)
            if isinstance(body, bytearray):  # holds a key: joining would leave a copy that is not zeroed
                self.begin(partial(_settle, waiter), head, body)
            else:
                self.begin(partial(_settle, waiter), head + body if body else head)
            async with asyncio.timeout(timeout_s):
                return await waiter
        except BaseException as error:
            # also when the answer has come but its caller was cancelled: the connection would not be given back
            self._on_end = None
            self.close()
            if isinstance(error, TimeoutError):
                raise KmsTimeoutError(f"the key service did not answer within {timeout_s:g} s") from None
            raise
        finally:
            del waiter  # the traceback of its error leads to this frame

    def begin(self, on_end: Callable[[Answer | KmsError], None], *parts: bytes | bytearray) -> None:
        """Sends the parts of a request. `on_end` gets the answer, or why there is none; at once if nothing can be
        sent.
        """
        if self._refused is not None:
            on_end(self._refused)
        elif self._transport is None or not self.usable:
            on_end(self.endpoint.lost(self._ended_by, sent=False))
        else:
            self._parser = AnswerParser()
            self._on_end = on_end
            for part in parts:
                self._transport.write(part)

    def close(self) -> None:
        """Closes the connection at once, with any exchange on it."""
        self._reusable = False
        if self._transport is not None:
            self._transport.abort()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._on_end is None or self._parser is None:
            if self._parser is None and self.usable:
                self._refused = refusal_in(data)
            self.close()
            return
        try:
            answer = self._parser.feed(data)
        except KmsProtocolError as error:
            self.close()
            self._finish(error)
            return
        if answer is not None:
            self._reusable = answer.reusable
            self._finish(answer)
            if not answer.reusable:
                self.close()

    def eof_received(self) -> bool:
        return False  # the transport closes itself: the daemon never half-closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._reusable = False
        self._ended_by = exc
        if exc is not None and self._sock is not None:
            with contextlib.suppress(OSError):  # uvloop does not read once a send fails; its socket is still open
                self.data_received(self._sock.recv(HEAD_BYTES_MAX))
        self._finish(self.endpoint.lost(exc, sent=True, sock=self._sock))

    def _finish(self, result: Answer | KmsError) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(result)


def _settle(waiter: asyncio.Future[Answer], result: Answer | KmsError) -> None:
    if waiter.done():
        return
    if isinstance(result, KmsError):
        waiter.set_exception(result)
    else:
        waiter.set_result(result)
