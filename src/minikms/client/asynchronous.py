"""The asyncio client.

Owns: a bounded pool of connections for single calls, and two lanes (encrypt, decrypt) that batch by themselves, each
on its own connection, since the daemon answers a connection strictly in order. Invariants: it belongs to one event
loop; a connection carries one request at a time; nothing is sent before the server's uid was checked; every wait is
bounded.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from minikms import api
from minikms.client import connection as peer
from minikms.client import verbs
from minikms.client.batching import Lane
from minikms.client.connection import Connection
from minikms.client.errors import KmsClosedError, KmsError, KmsRefusedError, KmsTimeoutError
from minikms.client.verbs import Call, DecryptItem, EncryptItem, Outcome, ReencryptItem, Verdict, chunks
from minikms.client.wire import Attempts

T = TypeVar("T")

POOL_CONNECTIONS_MAX: Final = 8
POOL_IDLE_S_MAX: Final = 5.0
"""A pooled connection idle for longer is not used again: far below the daemon's own idle limit, so that a request
that can't be repeated never meets a connection that the daemon is just closing."""
CHUNK_ITEMS_MAX: Final = 256
CHUNKS_AT_ONCE_MAX: Final = 2
"""Of one call for many items: the daemon works on one request while this side encodes and decodes others."""
TIMEOUT_S: Final = 10.0
WAIT_S: Final = 2.0
ROTATE_TIMEOUT_S: Final = 3600.0


class AsyncClient:
    """A client of one miniKMS for one event loop.

    `timeout_s` bounds the wait for an answer, `wait_s` how long a call waits for a daemon that is away (0: not at
    all) before KmsUnavailableError. `server_uids` are the users who may serve the socket; by default this process's
    own and root.

        async with AsyncClient("/run/minikms/minikms.sock") as kms:
            key = await kms.create_dek_for_thread("thread-1")
            sealed = await kms.encrypt(key.key_id, b"hello", aad=b"message-1")
            assert await kms.decrypt(key.key_id, sealed, aad=b"message-1") == b"hello"

    Every method raises KmsError: KmsUnavailableError, KmsTimeoutError, KmsProtocolError, KmsUntrustedServerError,
    KmsClosedError, or KmsRefusedError with `status` and `code` (KeyRetiredError, DecryptionError, …).
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        *,
        server_uids: Collection[int] | None = None,
        timeout_s: float = TIMEOUT_S,
        wait_s: float = WAIT_S,
        on_exchange: Callable[[bytes, float, bool], None] | None = None,
    ) -> None:
        """`on_exchange` is told of each exchange: its target, the seconds it took, whether the daemon answered."""
        self._on_exchange = on_exchange
        self._path = peer.checked_path(socket_path)
        self._server_uids = peer.default_server_uids() if server_uids is None else frozenset(server_uids)
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._slots = asyncio.Semaphore(POOL_CONNECTIONS_MAX)
        self._lane_connections: dict[bytes, Connection] = {}
        self._closed = False
        self._encrypts: Lane[EncryptItem] = Lane(self._send_encrypts, timeout_s + wait_s)
        self._decrypts: Lane[DecryptItem] = Lane(self._send_decrypts, timeout_s + wait_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fails every call under way and closes the connections. May be repeated."""
        self._closed = True
        await self._encrypts.close()
        await self._decrypts.close()
        for connection in [*self._idle, *self._busy, *self._lane_connections.values()]:
            connection.close()
        self._idle.clear()
        self._lane_connections.clear()
        await asyncio.sleep(0)  # let the transports close their sockets

    # --- verbs ---

    async def health(self) -> bool:
        """True when the daemon answers; raises otherwise. Needs no authorisation."""
        return await self._perform(verbs.health())

    async def status(self) -> dict[str, object]:
        """What an operator needs to know."""
        return await self._perform(verbs.status())

    async def create_dek_for_thread(
        self,
        thread_id: str,
        *,
        replaces: str | None = None,
        purpose: api.Purpose | None = None,
        request_id: str | None = None,
    ) -> api.CreateDekAnswer:
        """A new key for the thread, durable before this returns; `replaces` retires that key of the same thread in
        the same step.

        Repeated by itself only if the request was certainly not carried out. After KmsUnavailableError with `sent`, or
        KmsTimeoutError, there may be a key that nobody knows.
        """
        return await self._perform(verbs.create_dek_for_thread(thread_id, replaces, purpose).named(request_id))

    async def get_wrapped(self, key_id: str) -> bytes:
        """The key, sealed under the current KEK."""
        return await self._perform(verbs.get_wrapped(key_id))

    def encrypt(
        self,
        key_id: str,
        plaintext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> Coroutine[Any, Any, bytes]:
        """nonce(12) | ciphertext | tag(16). Concurrent calls travel in one batch."""
        item = EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)
        return self._encrypts.submit(item)

    def decrypt(
        self,
        key_id: str,
        ciphertext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> Coroutine[Any, Any, bytes]:
        """The plaintext. Concurrent calls travel in one batch."""
        item = DecryptItem(key_id=key_id, ciphertext=ciphertext, aad=aad, thread_id=thread_id, request_id=request_id)
        return self._decrypts.submit(item)

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[Outcome]:
        """One ciphertext or KmsRefusedError for each item, in order. Any number of items: they are split as needed."""
        return await self._perform_all(verbs.encrypt_batch(chunk) for chunk in chunks(items, CHUNK_ITEMS_MAX))

    async def decrypt_batch(self, items: Sequence[DecryptItem]) -> list[Outcome]:
        """One plaintext or KmsRefusedError for each item, in order. Any number of items: they are split as needed."""
        return await self._perform_all(verbs.decrypt_batch(chunk) for chunk in chunks(items, CHUNK_ITEMS_MAX))

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[Outcome]:
        """New ciphertexts under another key of the same thread, same aad. Plaintext never leaves the daemon."""
        return await self._perform_all(
            verbs.reencrypt_batch(from_key_id, to_key_id, chunk).named(request_id)
            for chunk in chunks(items, CHUNK_ITEMS_MAX)
        )

    async def check_batch(
        self,
        key_id: str,
        items: Sequence[ReencryptItem],
        *,
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> list[Verdict]:
        """For each item, in order, None if it opens under the key, or why not. Plaintext never leaves the daemon.

        Any number of items: they are split as needed.
        """
        return await self._perform_all(
            verbs.check_batch(key_id, chunk, thread_id).named(request_id) for chunk in chunks(items, CHUNK_ITEMS_MAX)
        )

    async def generate_data_key(
        self, key_id: str, *, aad: bytes = b"", with_plaintext: bool = True, request_id: str | None = None
    ) -> api.DataKeyAnswer:
        """A fresh 32-byte key sealed under `key_id`, whose purpose must be `data`; open it again with `decrypt`."""
        return await self._perform(verbs.generate_data_key(key_id, aad, with_plaintext).named(request_id))

    async def random(self, count: int) -> bytes:
        """Random bytes from the daemon, at most `api.RANDOM_BYTES_MAX`."""
        return await self._perform(verbs.random(count))

    async def rotate_kek(
        self,
        *,
        new_kek_hex: bytes | bytearray | str | None = None,
        wait: bool = True,
        verify: Sequence[DecryptItem] = (),
        request_id: str | None = None,
        timeout_s: float = ROTATE_TIMEOUT_S,
    ) -> api.RotateKekAnswer:
        """Rotates the KEK; a key given becomes the new root key too. `verify` samples are decrypted before and after.

        A `bytearray` stays the caller's to zero; a `str` can't be.
        """
        return await self._perform(verbs.rotate_kek(new_kek_hex, wait, verify).named(request_id), timeout_s)

    async def list_keys(
        self,
        *,
        thread_id: str | None = None,
        state: api.State | None = None,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> api.KeyListAnswer:
        """A page of keys; go on with `next_cursor` while there is one."""
        return await self._perform(verbs.list_keys(thread_id, state, cursor, limit))

    async def get_key(self, key_id: str) -> api.KeyAnswer:
        """What there is to know about one key."""
        return await self._perform(verbs.get_key(key_id))

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        """From here on the key decrypts only; one that is retired already stays so."""
        return await self._perform(verbs.retire_key(key_id).named(request_id))

    async def destroy_key(self, key_id: str, *, request_id: str | None = None) -> api.DestroyKeyAnswer:
        """Destroys a retired key and whatever only it opens, for good. Returns the receipt."""
        return await self._perform(verbs.destroy_key(key_id).named(request_id))

    async def prune_kek(
        self, *, backups: bool = False, backups_before: str | None = None, request_id: str | None = None
    ) -> api.PruneKekAnswer:
        """Destroys retired KEK versions that no file names any more.

        With `backups` all backups of DEK files are removed first, with `backups_before` (`YYYYMMDDTHHMMSS`) older ones.
        """
        return await self._perform(verbs.prune_kek(backups, backups_before).named(request_id))

    # --- how calls travel ---

    async def _perform(self, call: Call[T], timeout_s: float | None = None) -> T:
        try:
            await self._acquire_slot()
            try:
                return await self._repeat(call, None, self._timeout_s if timeout_s is None else timeout_s)
            finally:
                self._slots.release()
        finally:
            call.wipe()

    async def _acquire_slot(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s + self._wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise KmsTimeoutError("too many calls are under way for the key service to take one more") from None

    async def _perform_all(self, calls: Iterator[Call[list[T]]]) -> list[T]:
        """The outcomes of the calls in order, a few at once: the daemon works on one while this side reads another."""
        outcomes: list[T] = []
        under_way: deque[asyncio.Task[list[T]]] = deque()
        try:
            for call in calls:
                if len(under_way) == CHUNKS_AT_ONCE_MAX:
                    outcomes += await under_way[0]
                    under_way.popleft()
                under_way.append(asyncio.create_task(self._perform(call)))
            while under_way:
                outcomes += await under_way[0]
                under_way.popleft()
        finally:  # after a failure the rest is of no use
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        return outcomes

    async def _send_encrypts(self, items: list[EncryptItem]) -> list[Outcome]:
        if len(items) > 1:
            return await self._repeat(verbs.encrypt_batch(items), b"encrypt", self._timeout_s)
        return [await self._alone(verbs.encrypt(items[0]), b"encrypt")]

    async def _send_decrypts(self, items: list[DecryptItem]) -> list[Outcome]:
        if len(items) > 1:
            return await self._repeat(verbs.decrypt_batch(items), b"decrypt", self._timeout_s)
        return [await self._alone(verbs.decrypt(items[0]), b"decrypt")]

    async def _alone(self, call: Call[bytes], lane: bytes) -> Outcome:
        try:
            return await self._repeat(call, lane, self._timeout_s)
        except KmsRefusedError as refused:
            return refused

    async def _repeat(self, call: Call[T], lane: bytes | None, timeout_s: float) -> T:
        loop = asyncio.get_running_loop()
        attempts = Attempts(repeatable=call.retry, until_s=loop.time() + self._wait_s)
        while True:
            try:
                return await self._attempt(call, lane, timeout_s)
            except KmsError as error:
                await asyncio.sleep(attempts.pause_s(error, loop.time()))

    async def _attempt(self, call: Call[T], lane: bytes | None, timeout_s: float) -> T:
        started_s = time.monotonic()
        answered = False
        try:
            connection = await self._connection(lane)
            self._busy.add(connection)
            try:
                answer = await connection.exchange(call.target, call.body, call.request_id, timeout_s)
            finally:
                self._busy.discard(connection)
            answered = True
        finally:
            if self._on_exchange is not None:
                self._on_exchange(call.target, time.monotonic() - started_s, answered)
        if lane is None:
            self._release(connection)
        return verbs.read(call, answer)

    async def _connection(self, lane: bytes | None) -> Connection:
        if self._closed:
            raise KmsClosedError("the client is closed")
        if lane is not None:
            connection = self._lane_connections.get(lane)
            if connection is None or not connection.usable:
                connection = self._lane_connections[lane] = await self._open()
            return connection
        fresh_s = asyncio.get_running_loop().time() - POOL_IDLE_S_MAX
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since_s >= fresh_s:
                return connection
            connection.close()
        return await self._open()

    async def _open(self) -> Connection:
        connection = await Connection.open(self._path, self._server_uids)
        if self._closed:
            connection.close()
            raise KmsClosedError("the client was closed")
        return connection

    def _release(self, connection: Connection) -> None:
        if self._closed:
            connection.close()
        elif connection.usable:
            connection.idle_since_s = asyncio.get_running_loop().time()
            self._idle.append(connection)
