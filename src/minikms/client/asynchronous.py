"""The asyncio client.

Owns: a bounded pool of connections for single calls, of which those that make keys have a share of their own; and two
batchers (encrypt, decrypt), each on its own connection, because the daemon answers a connection strictly in order.
Invariants: a client belongs to one event loop; a connection carries one request at a time; every wait is bounded. It
must never use a connection that is in doubt.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

from minikms import api
from minikms.api import Verb
from minikms.api.errors import KmsClosedError, KmsError, KmsRefusedError, KmsTimeoutError, KmsUnavailableError
from minikms.client import calls
from minikms.client.base import CREATING_CONNECTIONS_MAX, POOL_CONNECTIONS_MAX, BaseClient
from minikms.client.batching import Batcher, OneLoop
from minikms.client.calls import Attempts, Call, check_proxied, make_call
from minikms.client.connecting import POOL_IDLE_S_MAX
from minikms.client.connection import ClientConnection
from minikms.client.items import Batch, DecryptItem, EncryptItem, Outcome
from minikms.client.verbs import AsyncRunner, Many, One, Verbs, ciphertext_of, plaintext_of

if TYPE_CHECKING:
    from minikms.client.streams import StreamCopy, StreamSource, StreamTarget

A = TypeVar("A")
T = TypeVar("T")
ItemT = TypeVar("ItemT", EncryptItem, DecryptItem)

CHUNK_ITEMS_MAX: Final = 256
CHUNKS_AT_ONCE_MAX: Final = 2
"""Requests in flight of one call for many items: the daemon works on one while this side encodes and decodes others."""


class AsyncClient(BaseClient, Verbs, AsyncRunner):
    """A client of one miniKMS for one event loop; in another one its methods raise RuntimeError.

    `address` is the path of the daemon's socket, or the URL of a gateway; commas separate several, of which one serves
    (docs/client.md). `timeout_s` bounds the wait for an answer, `wait_s` how long a call waits for a daemon that is
    away (0: not at all) before KmsUnavailableError.

    For a socket: `server_uids` are the users who may serve it; by default this process's own and root. For a URL: `ca`
    is the file of the CAs that sign the gateway's certificate; `cert` and `key`, `token_file`, or all three are what
    this client proves itself with. `long_lived_cert` allows a certificate that is valid for more than 30 days.

        async with AsyncClient("/run/minikms/minikms.sock") as kms:
            key = await kms.get_or_create_dek_for_thread("thread-1", purpose="data")
            sealed = await kms.encrypt(key.key_id, b"hello", aad=b"message-1")
            assert await kms.decrypt(key.key_id, sealed, aad=b"message-1") == b"hello"

    Every method raises KmsError: KmsUnavailableError, KmsTimeoutError, KmsProtocolError, KmsUntrustedServerError,
    KmsClosedError, or KmsRefusedError with `status` and `code` (KeyRetiredError, DecryptionError, …).
    """

    on_exchange: Callable[[bytes, float, bool], None] | None = None
    """Called after each exchange: its target, the seconds it took, whether the daemon answered."""

    def _start(self) -> None:
        self._idle: list[ClientConnection] = []
        self._busy: set[ClientConnection] = set()
        self._slots = asyncio.Semaphore(POOL_CONNECTIONS_MAX)
        self._creating_slots = asyncio.Semaphore(CREATING_CONNECTIONS_MAX)
        self._batch_connections: dict[Verb[Any, Any], ClientConnection] = {}
        self._closed = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._loop = OneLoop()
        wait_s_max = self._timeout_s + self._wait_s
        self._batchers: dict[Verb[Any, Any], Batcher[Any]] = {
            api.ENCRYPT: Batcher(self._send_encrypts, wait_s_max, self._loop),
            api.DECRYPT: Batcher(self._send_decrypts, wait_s_max, self._loop),
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def encrypt_stream(
        self, source: StreamSource, target: StreamTarget, *, key_id: str | None = None
    ) -> StreamCopy:
        """`Client.encrypt_stream` in a thread. A cancelled call ends after the part at hand."""
        from minikms.client import streams

        key_id = key_id or (await self.get_or_create_dek_for_thread(api.STREAM_THREAD, purpose="data")).key_id
        answer = await self.generate_data_key(key_id, aad=streams.WRAP_AAD)
        stop = threading.Event()
        return await streams.in_thread(stop, streams.seal_to, target, key_id, answer, streams.parts(source, stop))

    async def decrypt_stream(self, source: StreamSource, target: StreamTarget) -> StreamCopy:
        """`Client.decrypt_stream` in a thread. A cancelled call ends after the part at hand."""
        from minikms.client import streams

        stop = threading.Event()
        header, rest = await streams.in_thread(stop, streams.split_header, streams.parts(source, stop))
        data_key = await self.decrypt(header.key_id, header.wrapped_key, aad=streams.WRAP_AAD)
        return await streams.in_thread(stop, streams.open_to, target, header, data_key, rest)

    async def close(self) -> None:
        """Fails every open call and closes the connections. May be repeated."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for batcher in self._batchers.values():
            await batcher.close()
        for connection in [*self._busy, *self._batch_connections.values()]:
            connection.close()
        self._close_idle()
        self._batch_connections.clear()
        await asyncio.sleep(0)  # let the transports close their sockets

    def _run(self, operation: Any) -> Coroutine[Any, Any, Any]:
        if isinstance(operation, Many):
            return self._run_many(operation)
        batcher = self._batchers.get(operation.verb)
        return self._run_one(operation) if batcher is None else batcher.submit(operation.request)

    async def _run_one(self, one: One[T]) -> T:
        self._loop.running()
        if self._proxied:
            check_proxied(one.verb)
        slots = self._creating_slots if one.verb.creates else self._slots
        call = one.call()
        try:
            await self._acquire(slots)
            try:
                timeout_s = self._timeout_s if one.timeout_s is None else one.timeout_s
                return one.value(await self._repeat(call, timeout_s=timeout_s))
            finally:
                slots.release()
        finally:
            call.wipe()

    async def _run_many(self, many: Many[T]) -> list[T]:
        """The outcomes of all items in order, from a few calls at once."""
        outcomes: list[T] = []
        # Without the task that is awaited: its error's traceback leads to this frame, which must not lead to the error.
        running: deque[asyncio.Task[list[T]]] = deque()
        try:
            for one in many.split(CHUNK_ITEMS_MAX):
                if len(running) == CHUNKS_AT_ONCE_MAX:
                    outcomes += await running.popleft()
                running.append(asyncio.create_task(self._run_one(one)))
            while running:
                outcomes += await running.popleft()
        finally:  # after a failure the others are not needed
            await _cancel(running)
        return outcomes

    async def _acquire(self, slots: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(self._timeout_s + self._wait_s):
                await slots.acquire()
        except TimeoutError:
            raise KmsTimeoutError("too many calls wait for a connection to the key service") from None

    # --- batches ---

    async def _send_encrypts(self, items: list[EncryptItem]) -> list[Outcome]:
        return await self._send(items, api.ENCRYPT, api.ENCRYPT_BATCH, ciphertext_of)

    async def _send_decrypts(self, items: list[DecryptItem]) -> list[Outcome]:
        return await self._send(items, api.DECRYPT, api.DECRYPT_BATCH, plaintext_of)

    async def _send(
        self, items: list[ItemT], one: Verb[Any, A], many: Verb[Any, Any], value: Callable[[A], bytes]
    ) -> list[Outcome]:
        """The outcomes of a batch, on the connection of its verb. A single item is sent as one."""
        if len(items) > 1:
            batch = make_call(many, Batch(items), msgpack=True)
            return calls.outcomes(await self._repeat(batch, one, timeout_s=self._timeout_s), len(items))
        try:
            return [value(await self._repeat(make_call(one, items[0]), one, timeout_s=self._timeout_s))]
        except KmsRefusedError as refused:
            return [refused]

    # --- exchanges ---

    async def _repeat(self, call: Call[A], batched: Verb[Any, Any] | None = None, *, timeout_s: float) -> A:
        """Makes the call, again if need be. `batched`: on the connection that carries the batches of that verb."""
        loop = asyncio.get_running_loop()
        attempts = self._attempts(call.verb, timeout_s, loop.time())
        while True:
            try:
                return await self._attempt(call, batched, attempts)
            except KmsError as error:
                pause_s = attempts.pause_s(error, loop.time())
                if pause_s is None:
                    raise
            await asyncio.sleep(pause_s)

    async def _attempt(self, call: Call[A], batched: Verb[Any, Any] | None, attempts: Attempts) -> A:
        started_s = time.monotonic()
        answered = False
        try:
            connection = await self._connection(batched, attempts)
            self._busy.add(connection)
            try:
                answer = await connection.exchange(
                    call.target, call.body, call.request_id, attempts.timeout_s, call.content_type
                )
            finally:
                self._busy.discard(connection)
            answered = True
        except KmsUnavailableError:
            self._close_idle()  # the daemon may have closed these too: the next attempt takes a fresh one
            raise
        finally:
            if self.on_exchange is not None:
                self.on_exchange(call.target, time.monotonic() - started_s, answered)
        self._release(connection, pooled=batched is None)
        return call.read(answer)

    async def _connection(self, batched: Verb[Any, Any] | None, attempts: Attempts) -> ClientConnection:
        if self._closed:
            raise KmsClosedError("the client is closed")
        proxied, endpoint = self._proxied, attempts.endpoint
        if batched is not None:
            idle = self._batch_connections.get(batched)
            if idle is not None:
                if idle.endpoint is endpoint and idle.usable and (not proxied or idle.is_current):
                    return idle
                idle.close()
            connection = self._batch_connections[batched] = await self._open(attempts)
            return connection
        fresh_s = asyncio.get_running_loop().time() - POOL_IDLE_S_MAX
        while self._idle:
            connection = self._idle.pop()
            usable = connection.endpoint is endpoint and connection.usable and connection.idle_since_s >= fresh_s
            if usable and (not proxied or connection.is_current):
                return connection
            connection.close()
        return await self._open(attempts)

    async def _open(self, attempts: Attempts) -> ClientConnection:
        connect_s = min(attempts.connect_s, self._timeout_s)
        connection = await ClientConnection.open(attempts.endpoint, connect_s)
        if self._closed:
            connection.close()
            raise KmsClosedError("the client was closed")
        return connection

    def _release(self, connection: ClientConnection, *, pooled: bool) -> None:
        if self._closed:
            connection.close()
        elif connection.usable:
            loop = asyncio.get_running_loop()
            connection.idle_since_s = loop.time()
            if pooled:
                self._idle.append(connection)
            if self._sweeper is None:
                self._sweeper = loop.call_later(POOL_IDLE_S_MAX, self._sweep, loop)

    def _close_idle(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Closes the connections that were idle for too long, and looks again while others are open."""
        fresh_s = loop.time() - POOL_IDLE_S_MAX
        for connection in [*self._idle, *self._batch_connections.values()]:
            if connection.idle_since_s <= fresh_s and connection not in self._busy:
                connection.close()
        self._idle = [connection for connection in self._idle if connection.usable]
        is_open = self._idle or any(connection.usable for connection in self._batch_connections.values())
        self._sweeper = loop.call_later(POOL_IDLE_S_MAX, self._sweep, loop) if is_open else None


async def _cancel(tasks: deque[asyncio.Task[T]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
