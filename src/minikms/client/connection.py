"""The asyncio connection to the daemon.

Owns: the asyncio transport with the parser of the awaited answer. Invariants: a connection carries one request at a
time. One that is in doubt (unexpected bytes, a malformed or late answer, a caller that stopped waiting) is closed and
must never be used again, so that no answer reaches the wrong caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import cast

from minikms.api.errors import KmsError, KmsProtocolError, KmsTimeoutError, KmsUnavailableError
from minikms.client.connecting import connect
from minikms.client.wire import JSON, Answer, AnswerParser, request_head


class Connection(asyncio.Protocol):
    """Made by `Connection.open`. `usable` is false once nothing may be sent on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: AnswerParser | None = None
        self._waiter: asyncio.Future[Answer] | None = None
        self._reusable = True
        self.idle_since_s = 0.0

    @classmethod
    async def open(cls, path: str, server_uids: Collection[int]) -> Connection:
        """Raises KmsUnavailableError and KmsUntrustedServerError; nothing has been sent then."""
        sock = connect(path, server_uids)
        connection = cls()
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=sock)
        except BaseException:
            sock.close()
            raise
        return connection

    @property
    def usable(self) -> bool:
        return self._reusable and self._transport is not None and not self._transport.is_closing()

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
        transport = self._transport
        if transport is None or not self.usable:
            raise KmsUnavailableError("the connection to the key service was lost")
        self._parser = AnswerParser()
        self._waiter = asyncio.get_running_loop().create_future()
        head = request_head(target, None if body is None else len(body), request_id, content_type)
        if isinstance(body, bytearray):  # holds a key: joining would leave a copy that is not zeroed
            transport.write(head)
            transport.write(body)
        else:
            transport.write(head + body if body else head)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._waiter
        except BaseException as error:
            # also when the answer has come but its caller was cancelled: the connection would not be given back
            self._waiter = None
            self.close()
            if isinstance(error, TimeoutError):
                raise KmsTimeoutError(f"the key service did not answer within {timeout_s:g} s") from None
            raise

    def close(self) -> None:
        """Closes the connection at once, with any exchange on it."""
        self._reusable = False
        if self._transport is not None:
            self._transport.abort()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._parser is None:
            self.close()
            return
        try:
            answer = self._parser.feed(data)
        except KmsProtocolError as error:
            self._finish(error)
            self.close()
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
        self._finish(KmsUnavailableError("the connection to the key service was lost before it answered", sent=True))

    def _finish(self, result: Answer | KmsError) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is None or waiter.done():
            return
        if isinstance(result, KmsError):
            waiter.set_exception(result)
        else:
            waiter.set_result(result)
