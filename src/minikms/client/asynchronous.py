"""The asyncio client.

Owns: the methods of the verbs for asyncio (`AsyncVerbs`, which `minikms.embedded` uses too), a bounded pool of
connections for single calls, and two batchers (encrypt, decrypt), each on its own connection, because the daemon
answers a connection strictly in order. Invariants: a client belongs to one event loop; a connection carries one request
at a time; every wait is bounded. It must never use a connection that is in doubt.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from minikms import api
from minikms.api import Verb
from minikms.client import calls, connecting
from minikms.client.batching import Batcher
from minikms.client.calls import Attempts, Call, MsgpackUse, given, make_call
from minikms.client.connecting import POOL_CONNECTIONS_MAX, POOL_IDLE_S_MAX, ROTATE_TIMEOUT_S, TIMEOUT_S, WAIT_S
from minikms.client.connection import Connection
from minikms.client.errors import KmsClosedError, KmsError, KmsRefusedError, KmsTimeoutError
from minikms.client.items import (
    Batch,
    CheckBatch,
    CheckOutcome,
    DecryptItem,
    EncryptItem,
    GenerateDataKey,
    Outcome,
    ReencryptBatch,
    ReencryptItem,
    Sent,
    chunks,
)

R = TypeVar("R", bound=api.Request)
A = TypeVar("A")
T = TypeVar("T")

CHUNK_ITEMS_MAX: Final = 256
CHUNKS_AT_ONCE_MAX: Final = 2
"""Requests in flight of one call for many items: the daemon works on one while this side encodes and decodes others."""


class AsyncVerbs(ABC):
    """One method for each verb, over `_call`."""

    @abstractmethod
    def _call(
        self,
        verb: Verb[R, A],
        request: R | Sent | bytearray,
        request_id: str | None = None,
        *,
        timeout_s: float | None = None,
        named: str = "",
    ) -> Coroutine[Any, Any, A]:
        """Performs one verb. Raises KmsError."""

    async def health(self) -> bool:
        """Whether the daemon answers: True, or an error. Needs no role and writes no audit line."""
        return calls.is_healthy(await self._call(api.HEALTH, api.Request()))

    async def ready(self) -> bool:
        """Whether the daemon serves: True, or an error. Needs no role and writes no audit line. Raises SealedError,
        AuditUnavailableError.
        """
        return calls.is_ready(await self._call(api.READY, api.Request()))

    async def status(self) -> api.StatusAnswer:
        """The daemon's state for operators. Answered even while the audit log can't be written; `status` is not `ok`
        then. Needs the role `monitor`."""
        return await self._call(api.STATUS, api.Request())

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
        KmsTimeoutError, there may be a key that no caller knows.
        """
        request = api.CreateDekRequest(thread_id, replaces=given(replaces), purpose=given(purpose))
        return await self._call(api.CREATE_DEK, request, request_id)

    async def get_or_create_dek_for_thread(
        self, thread_id: str, *, purpose: api.Purpose | None = None, request_id: str | None = None
    ) -> api.GetOrCreateDekAnswer:
        """The newest active key of the thread (`key_id`), or a new one (`created`), durable before this returns.

        Processes that call it at once for one thread get the same key, so it is repeated by itself. `purpose` is
        `thread` by default; keys of another purpose are not looked at. A key that only decrypts, after a restore or at
        its limit, stays as it is, and the thread gets a new one. Raises StorageUnavailableError while the daemon still
        reads its key files after a start, KeyUnreadableError when the thread's key can't be read.
        """
        request = api.GetOrCreateDekRequest(thread_id, purpose=given(purpose))
        return await self._call(api.GET_OR_CREATE_DEK, request, request_id)

    async def get_wrapped(self, key_id: str) -> bytes:
        """The key as its file holds it: sealed under the current KEK. Raises KeyNotFoundError, KeyDestroyedError."""
        return (await self._call(api.GET_WRAPPED, api.KeyRequest(key_id))).wrapped

    def encrypt(
        self,
        key_id: str,
        plaintext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> Coroutine[Any, Any, bytes]:
        """Encrypts at most 4 MiB, to nonce (24 bytes), ciphertext and tag (16 bytes).

        Concurrent calls travel in one batch.

        Raises KeyRetiredError, WrongThreadError.
        """
        item = EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)
        return self._encrypt(item)

    def decrypt(
        self,
        key_id: str,
        ciphertext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> Coroutine[Any, Any, bytes]:
        """Decrypts a result of `encrypt`, under the same key and `aad`. Concurrent calls travel in one batch.

        Raises DecryptionError, KeyNotFoundError, KeyDestroyedError, WrongThreadError.
        """
        item = DecryptItem(key_id=key_id, ciphertext=ciphertext, aad=aad, thread_id=thread_id, request_id=request_id)
        return self._decrypt(item)

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[Outcome]:
        """One ciphertext or KmsRefusedError for each item, in order. Any number of items, of at most 4 MiB of plaintext
        and 4,096 bytes of `aad` each: they are split into requests as needed.

        Returned for its item alone: KeyRetiredError, KeyNotFoundError, WrongThreadError,
        ForbiddenError. Raises TooLargeError or InvalidRequestError before anything is sent.
        """
        requests = (Batch(chunk) for chunk in chunks(items, CHUNK_ITEMS_MAX))
        return await self._call_chunks(api.ENCRYPT_BATCH, requests, calls.outcomes)

    async def decrypt_batch(self, items: Sequence[DecryptItem], *, request_id: str | None = None) -> list[Outcome]:
        """One plaintext or KmsRefusedError for each item, in order. Any number of items, of at most 4 MiB of plaintext
        and 4,096 bytes of `aad` each: they are split into requests as needed.

        Returned for its item alone: DecryptionError, KeyNotFoundError, KeyDestroyedError, WrongThreadError,
        ForbiddenError. Raises TooLargeError or InvalidRequestError before anything is sent.

        `request_id` is that of all items, in the audit log; an item may have one of its own beside it.
        """
        requests = (Batch(chunk) for chunk in chunks(items, CHUNK_ITEMS_MAX))
        return await self._call_chunks(api.DECRYPT_BATCH, requests, calls.outcomes, request_id)

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[Outcome]:
        """A ciphertext under another key of the same thread, or KmsRefusedError, for each item, in order; the `aad` (at
        most 4,096 bytes) stays the same, and plaintext (at most 4 MiB) never leaves the daemon. Any number of items.

        Returned for its item alone: DecryptionError. Raises KeyNotFoundError, KeyDestroyedError,
        KeyRetiredError (of `to_key_id`), WrongThreadError, WrongPurposeError.
        """
        requests = (ReencryptBatch(from_key_id, to_key_id, chunk) for chunk in chunks(items, CHUNK_ITEMS_MAX))
        return await self._call_chunks(api.REENCRYPT_BATCH, requests, calls.outcomes, request_id)

    async def check_batch(
        self,
        key_id: str,
        items: Sequence[ReencryptItem],
        *,
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> list[CheckOutcome]:
        """For each item, in order, None if it opens under the key, or why not. Plaintext never leaves the daemon.

        Any number of items: they are split as needed.
        """
        requests = (CheckBatch(key_id, chunk, thread_id) for chunk in chunks(items, CHUNK_ITEMS_MAX))
        return await self._call_chunks(api.CHECK_BATCH, requests, calls.check_outcomes, request_id)

    async def generate_data_key(
        self, key_id: str, *, aad: bytes = b"", with_plaintext: bool = True, request_id: str | None = None
    ) -> api.DataKeyAnswer:
        """A fresh 32-byte key sealed under `key_id`, whose purpose must be `data`; open it again with `decrypt`."""
        return await self._call(api.GENERATE_DATA_KEY, GenerateDataKey(key_id, with_plaintext, aad), request_id)

    async def random(self, count: int) -> bytes:
        """`count` random bytes from the daemon, at most `api.RANDOM_BYTES_MAX`. Needs the role `data_key`."""
        return calls.random_bytes(await self._call(api.RANDOM, api.RandomRequest(count)), count)

    async def rotate_kek(
        self,
        *,
        new_kek_hex: bytes | bytearray | str | None = None,
        wait: bool = True,
        verify: Sequence[DecryptItem] = (),
        priority: api.Priority | None = None,
        request_id: str | None = None,
        timeout_s: float = ROTATE_TIMEOUT_S,
    ) -> api.RotateKekAnswer:
        """Rotates the KEK; a key given becomes the new root key too. `verify` samples are decrypted before and after.
        `priority` is that of the rotation against requests, `normal` by default; on one that runs it is changed.

        A `bytearray` stays the caller's to zero; a `str` can't be zeroed.
        """
        body = calls.rotation(new_kek_hex, wait, verify, priority)
        return await self._call(api.ROTATE_KEK, body, request_id, timeout_s=timeout_s)

    async def list_roots(self) -> api.RootListAnswer:
        """The root keys that open the keyring, and the removed ones whose revocation has not ended."""
        return await self._call(api.LIST_ROOTS, api.Request())

    async def add_root(
        self,
        root_hex: bytes | bytearray | str,
        *,
        provider: str,
        shares: api.GivenShares | None = None,
        request_id: str | None = None,
    ) -> api.RootAnswer:
        """Adds a root key, 64 hex characters. A `bytearray` stays the caller's to zero; a `str` can't be zeroed.

        Raises ConflictError, NotPinnedError.
        """
        return await self._call(api.ADD_ROOT, calls.new_root(root_hex, provider, shares), request_id)

    async def test_root(
        self, slot_id: str, root_hex: bytes | bytearray | str, *, request_id: str | None = None
    ) -> api.RootAnswer:
        """Proves that the root key opens the slot. Raises WrongSlotError, NotFoundError."""
        return await self._call(api.TEST_ROOT, calls.proof(root_hex), request_id, named=slot_id)

    async def remove_root(self, slot_id: str, *, request_id: str | None = None) -> api.RootAnswer:
        """Removes a root key at once; a KEK rotation follows. Raises LastRootError, NotTestedError, NotFoundError."""
        return await self._call(api.REMOVE_ROOT, api.SlotRequest(slot_id), request_id)

    async def seal(self) -> api.SealAnswer:
        """Zeroes every key of the daemon at once. It answers when a restart would stay sealed too.

        Raises StorageUnavailableError: it is sealed even then, but a restart would not stay sealed.
        """
        return await self._call(api.SEAL, api.Request())

    async def unseal_status(self) -> api.UnsealStatusAnswer:
        """Whether the daemon is sealed, since when and by whom."""
        return await self._call(api.UNSEAL_STATUS, api.Request())

    async def unseal(
        self,
        *,
        root_hex: bytes | bytearray | str | None = None,
        share: bytes | bytearray | str | None = None,
        timeout_s: float = ROTATE_TIMEOUT_S,
    ) -> api.UnsealStatusAnswer:
        """Gives a sealed daemon the root key or a share of it; without either it reads its own source of the root key.

        It serves on return, unless further shares are needed: then `sealed` is true. A `bytearray` stays the caller's
        to zero; a `str` can't be zeroed. Raises WrongRootError, WrongShareError, NotSealedError, TooManyAttemptsError,
        UnsealFailedError.
        """
        return await self._call(api.UNSEAL, calls.unsealing(root_hex, share), timeout_s=timeout_s)

    async def reload_policy(self) -> api.PolicyAnswer:
        """Reads the policy file of the daemon again, and takes it into force. Raises InvalidPolicyError: the policy
        before it stays; ConflictError: the daemon was started without one.
        """
        return await self._call(api.RELOAD_POLICY, api.Request())

    async def list_keys(
        self,
        *,
        thread_id: str | None = None,
        state: api.State | None = None,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> api.KeyListAnswer:
        """A page of keys, oldest first, at most `limit` (default 100); continue with `next_cursor` if it is set."""
        request = api.ListKeysRequest(given(thread_id), given(state), given(cursor), given(limit))
        return await self._call(api.LIST_KEYS, request)

    async def get_key(self, key_id: str) -> api.KeyAnswer:
        """The state and the use counts of one key. Raises KeyNotFoundError, KeyUnreadableError."""
        return await self._call(api.GET_KEY, api.KeyRequest(key_id))

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        """The key only decrypts from now on; a retired key stays as it is. Raises KeyNotFoundError."""
        return await self._call(api.RETIRE_KEY, api.KeyRequest(key_id), request_id)

    async def destroy_key(self, key_id: str, *, request_id: str | None = None) -> api.DestroyKeyAnswer:
        """Destroys a retired key permanently; returns the receipt. Raises ConflictError for an active key."""
        return await self._call(api.DESTROY_KEY, api.DestroyKeyRequest(key_id), request_id)

    async def prune_kek(
        self, *, backups: bool = False, backups_before: str | None = None, request_id: str | None = None
    ) -> api.PruneKekAnswer:
        """Destroys retired KEK versions that no file names any more; the answer lists them, and why others are kept.

        With `backups` all rotation backups of DEK files are removed first, with `backups_before` (UTC, written
        `YYYYMMDDTHHMMSS`) only those made before that second. Raises ConflictError while a rotation runs,
        InvalidRequestError for another form of the time.
        """
        request = api.PruneKekRequest(backups, given(backups_before))
        return await self._call(api.PRUNE_KEK, request, request_id)

    async def _encrypt(self, item: EncryptItem) -> bytes:
        return (await self._call(api.ENCRYPT, item)).ciphertext

    async def _decrypt(self, item: DecryptItem) -> bytes:
        return (await self._call(api.DECRYPT, item)).plaintext

    async def _call_chunks(
        self,
        verb: Verb[Any, A],
        requests: Iterator[Batch] | Iterator[ReencryptBatch] | Iterator[CheckBatch],
        read: Callable[[A, int], list[T]],
        request_id: str | None = None,
    ) -> list[T]:
        """The outcomes of all items in order, from a few calls at once."""

        async def one(request: Batch | ReencryptBatch | CheckBatch) -> list[T]:
            return read(await self._call(verb, request, request_id), len(request.items))

        found: list[T] = []
        running: deque[asyncio.Task[list[T]]] = deque()
        try:
            for request in requests:
                if len(running) == CHUNKS_AT_ONCE_MAX:
                    found += await running[0]
                    running.popleft()
                running.append(asyncio.create_task(one(request)))
            while running:
                found += await running[0]
                running.popleft()
        finally:  # after a failure the others are not needed
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return found


class AsyncClient(AsyncVerbs):
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
        """`on_exchange` is called after each exchange: its target, the seconds it took, whether the daemon answered."""
        self._on_exchange = on_exchange
        self._path = connecting.checked_path(socket_path)
        self._server_uids = connecting.default_server_uids() if server_uids is None else frozenset(server_uids)
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        self._slots = asyncio.Semaphore(POOL_CONNECTIONS_MAX)
        self._batch_connections: dict[Verb[Any, Any], Connection] = {}
        self._closed = False
        self._msgpack = MsgpackUse()
        self._encrypts: Batcher[EncryptItem] = Batcher(self._send_encrypts, timeout_s + wait_s)
        self._decrypts: Batcher[DecryptItem] = Batcher(self._send_decrypts, timeout_s + wait_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fails every open call and closes the connections. May be repeated."""
        self._closed = True
        await self._encrypts.close()
        await self._decrypts.close()
        for connection in [*self._idle, *self._busy, *self._batch_connections.values()]:
            connection.close()
        self._idle.clear()
        self._batch_connections.clear()
        await asyncio.sleep(0)  # let the transports close their sockets

    async def _call(
        self,
        verb: Verb[R, A],
        request: R | Sent | bytearray,
        request_id: str | None = None,
        *,
        timeout_s: float | None = None,
        named: str = "",
    ) -> A:
        call = make_call(verb, request, request_id, named, msgpack=self._may_send_msgpack())
        try:
            await self._acquire_slot()
            try:
                return await self._repeat(call, timeout_s=self._timeout_s if timeout_s is None else timeout_s)
            finally:
                self._slots.release()
        finally:
            call.wipe()

    async def _acquire_slot(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s + self._wait_s):
                await self._slots.acquire()
        except TimeoutError:
            raise KmsTimeoutError("too many calls wait for a connection to the key service") from None

    # --- batches ---

    def _encrypt(self, item: EncryptItem) -> Coroutine[Any, Any, bytes]:
        return self._encrypts.submit(item)

    def _decrypt(self, item: DecryptItem) -> Coroutine[Any, Any, bytes]:
        return self._decrypts.submit(item)

    async def _send_encrypts(self, items: list[EncryptItem]) -> list[Outcome]:
        if len(items) > 1:
            many = make_call(api.ENCRYPT_BATCH, Batch(items), msgpack=self._may_send_msgpack())
            sealed = await self._repeat(many, api.ENCRYPT, timeout_s=self._timeout_s)
            return calls.outcomes(sealed, len(items))
        try:
            one = make_call(api.ENCRYPT, items[0])
            return [(await self._repeat(one, api.ENCRYPT, timeout_s=self._timeout_s)).ciphertext]
        except KmsRefusedError as refused:
            return [refused]

    async def _send_decrypts(self, items: list[DecryptItem]) -> list[Outcome]:
        if len(items) > 1:
            many = make_call(api.DECRYPT_BATCH, Batch(items), msgpack=self._may_send_msgpack())
            opened = await self._repeat(many, api.DECRYPT, timeout_s=self._timeout_s)
            return calls.outcomes(opened, len(items))
        try:
            one = make_call(api.DECRYPT, items[0])
            return [(await self._repeat(one, api.DECRYPT, timeout_s=self._timeout_s)).plaintext]
        except KmsRefusedError as refused:
            return [refused]

    # --- exchanges ---

    async def _repeat(self, call: Call[A], batched: Verb[Any, Any] | None = None, *, timeout_s: float) -> A:
        """Makes the call, again if need be. `batched`: on the connection that carries the batches of that verb."""
        loop = asyncio.get_running_loop()
        attempts = Attempts(repeatable=call.verb.repeatable, until_s=loop.time() + self._wait_s)
        while True:
            try:
                return await self._attempt(call, batched, timeout_s)
            except KmsError as error:
                in_json = self._msgpack.refused(call, error, loop.time())
                if in_json is None:
                    await asyncio.sleep(attempts.pause_s(error, loop.time()))
                else:
                    call = in_json

    def _may_send_msgpack(self) -> bool:
        return self._msgpack.may_send(asyncio.get_running_loop().time())

    async def _attempt(self, call: Call[A], batched: Verb[Any, Any] | None, timeout_s: float) -> A:
        started_s = time.monotonic()
        answered = False
        try:
            connection = await self._connection(batched)
            self._busy.add(connection)
            try:
                answer = await connection.exchange(
                    call.target, call.body, call.request_id, timeout_s, call.content_type
                )
            finally:
                self._busy.discard(connection)
            answered = True
        finally:
            if self._on_exchange is not None:
                self._on_exchange(call.target, time.monotonic() - started_s, answered)
        if batched is None:
            self._release(connection)
        return call.read(answer)

    async def _connection(self, batched: Verb[Any, Any] | None) -> Connection:
        if self._closed:
            raise KmsClosedError("the client is closed")
        if batched is not None:
            connection = self._batch_connections.get(batched)
            if connection is None or not connection.usable:
                connection = self._batch_connections[batched] = await self._open()
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
