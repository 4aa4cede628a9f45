"""The blocking client, for scripts and threads.

Owns: a few kept connections, shared by the threads of a process, never with a forked child. Invariants: a connection is
used by one thread at a time and carries one request; a connection in doubt is closed; every call has a deadline,
however slowly bytes arrive. It does not batch: `encrypt_batch` and `decrypt_batch` are for many values. It must never
use a connection that its parent process opened.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from minikms import api
from minikms.api import Verb
from minikms.client import calls, connecting
from minikms.client.calls import Attempts, Call, MsgpackUse, given, make_call
from minikms.client.connecting import POOL_CONNECTIONS_MAX, POOL_IDLE_S_MAX, ROTATE_TIMEOUT_S, TIMEOUT_S, WAIT_S
from minikms.client.errors import KmsClosedError, KmsError, KmsTimeoutError, KmsUnavailableError
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
from minikms.client.wire import Answer, AnswerParser, request_head

R = TypeVar("R", bound=api.Request)
A = TypeVar("A")
T = TypeVar("T")

_RECEIVE_BYTES_MAX: Final = 256 * 1024

_clients: Final[weakref.WeakSet[Client]] = weakref.WeakSet()


class Client:
    """A client of one miniKMS, safe to share between threads.

        with Client("/run/minikms/minikms.sock") as kms:
            key = kms.create_dek_for_thread("thread-1")
            sealed = kms.encrypt(key.key_id, b"hello", aad=b"message-1")
            assert kms.decrypt(key.key_id, sealed, aad=b"message-1") == b"hello"

    Arguments and errors are those of AsyncClient.
    """

    def __init__(
        self,
        socket_path: str | os.PathLike[str],
        *,
        server_uids: Collection[int] | None = None,
        timeout_s: float = TIMEOUT_S,
        wait_s: float = WAIT_S,
    ) -> None:
        self._path = connecting.checked_path(socket_path)
        self._server_uids = connecting.default_server_uids() if server_uids is None else frozenset(server_uids)
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._idle: list[tuple[float, socket.socket]] = []
        self._closed = False
        self._msgpack = MsgpackUse()
        _clients.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the kept connections; calls in other threads end by themselves. May be repeated."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _since_s, sock in idle:
            sock.close()

    def _begin_in_child(self) -> None:
        """After a fork: closes the kept connections, which are the parent's. If both processes used one, each would
        read answers to the other. The lock is new, because another thread may have held it.
        """
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for _since_s, sock in idle:
            sock.close()

    # --- verbs ---

    def health(self) -> bool:
        """Whether the daemon answers: True, or an error. Needs no role and writes no audit line."""
        return calls.is_healthy(self._call(api.HEALTH, api.Request()))

    def ready(self) -> bool:
        """Whether the daemon serves: True, or an error. Needs no role and writes no audit line. Raises SealedError,
        AuditUnavailableError.
        """
        return calls.is_ready(self._call(api.READY, api.Request()))

    def status(self) -> api.StatusAnswer:
        """The daemon's state for operators. Answered even while the audit log can't be written; `status` is not `ok`
        then. Needs the role `monitor`."""
        return self._call(api.STATUS, api.Request())

    def create_dek_for_thread(
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
        return self._call(api.CREATE_DEK, request, request_id)

    def get_or_create_dek_for_thread(
        self, thread_id: str, *, purpose: api.Purpose | None = None, request_id: str | None = None
    ) -> api.GetOrCreateDekAnswer:
        """The newest active key of the thread (`key_id`), or a new one (`created`), durable before this returns.

        Processes that call it at once for one thread get the same key, so it is repeated by itself. `purpose` is
        `thread` by default; keys of another purpose are not looked at. A key that only decrypts, after a restore or at
        its limit, stays as it is, and the thread gets a new one. Raises StorageUnavailableError while the daemon still
        reads its key files after a start, KeyUnreadableError when the thread's key can't be read.
        """
        request = api.GetOrCreateDekRequest(thread_id, purpose=given(purpose))
        return self._call(api.GET_OR_CREATE_DEK, request, request_id)

    def get_wrapped(self, key_id: str) -> bytes:
        """The key as its file holds it: sealed under the current KEK. Raises KeyNotFoundError, KeyDestroyedError."""
        return self._call(api.GET_WRAPPED, api.KeyRequest(key_id)).wrapped

    def encrypt(
        self,
        key_id: str,
        plaintext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> bytes:
        """Encrypts at most 4 MiB, to nonce (24 bytes), ciphertext and tag (16 bytes).

        Raises KeyRetiredError, WrongThreadError.
        """
        item = EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)
        return self._call(api.ENCRYPT, item).ciphertext

    def decrypt(
        self,
        key_id: str,
        ciphertext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> bytes:
        """Decrypts a result of `encrypt`, under the same key and `aad`.

        Raises DecryptionError, KeyNotFoundError, KeyDestroyedError, WrongThreadError.
        """
        item = DecryptItem(key_id=key_id, ciphertext=ciphertext, aad=aad, thread_id=thread_id, request_id=request_id)
        return self._call(api.DECRYPT, item).plaintext

    def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[Outcome]:
        """One ciphertext or KmsRefusedError for each item, in order. Any number of items, of at most 4 MiB of plaintext
        and 4,096 bytes of `aad` each: they are split into requests as needed.

        Returned for its item alone: KeyRetiredError, KeyNotFoundError, WrongThreadError,
        ForbiddenError. Raises TooLargeError or InvalidRequestError before anything is sent.
        """
        requests = (Batch(chunk) for chunk in chunks(items))
        return self._call_chunks(api.ENCRYPT_BATCH, requests, calls.outcomes)

    def decrypt_batch(self, items: Sequence[DecryptItem], *, request_id: str | None = None) -> list[Outcome]:
        """One plaintext or KmsRefusedError for each item, in order. Any number of items, of at most 4 MiB of plaintext
        and 4,096 bytes of `aad` each: they are split into requests as needed.

        Returned for its item alone: DecryptionError, KeyNotFoundError, KeyDestroyedError, WrongThreadError,
        ForbiddenError. Raises TooLargeError or InvalidRequestError before anything is sent.

        `request_id` is that of all items, in the audit log; an item may have one of its own beside it.
        """
        requests = (Batch(chunk) for chunk in chunks(items))
        return self._call_chunks(api.DECRYPT_BATCH, requests, calls.outcomes, request_id)

    def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[Outcome]:
        """A ciphertext under another key of the same thread, or KmsRefusedError, for each item, in order; the `aad` (at
        most 4,096 bytes) stays the same, and plaintext (at most 4 MiB) never leaves the daemon. Any number of items.

        Returned for its item alone: DecryptionError. Raises KeyNotFoundError, KeyDestroyedError,
        KeyRetiredError (of `to_key_id`), WrongThreadError, WrongPurposeError.
        """
        requests = (ReencryptBatch(from_key_id, to_key_id, chunk) for chunk in chunks(items))
        return self._call_chunks(api.REENCRYPT_BATCH, requests, calls.outcomes, request_id)

    def check_batch(
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
        requests = (CheckBatch(key_id, chunk, thread_id) for chunk in chunks(items))
        return self._call_chunks(api.CHECK_BATCH, requests, calls.check_outcomes, request_id)

    def generate_data_key(
        self, key_id: str, *, aad: bytes = b"", with_plaintext: bool = True, request_id: str | None = None
    ) -> api.DataKeyAnswer:
        """A fresh 32-byte key sealed under `key_id`, whose purpose must be `data`; open it again with `decrypt`."""
        return self._call(api.GENERATE_DATA_KEY, GenerateDataKey(key_id, with_plaintext, aad), request_id)

    def random(self, count: int) -> bytes:
        """`count` random bytes from the daemon, at most `api.RANDOM_BYTES_MAX`. Needs the role `data_key`."""
        return calls.random_bytes(self._call(api.RANDOM, api.RandomRequest(count)), count)

    def rotate_kek(
        self,
        *,
        new_kek_hex: bytes | bytearray | str | None = None,
        wait: bool = True,
        verify: Sequence[DecryptItem] = (),
        priority: api.Priority | None = None,
        request_id: str | None = None,
        timeout_s: float = ROTATE_TIMEOUT_S,
    ) -> api.RotateKekAnswer:
        """Rotates the KEK within `timeout_s` seconds; a key given becomes the new root key too. `verify` samples are
        decrypted before and after.

        A `bytearray` stays the caller's to zero; a `str` can't be zeroed.
        """
        body = calls.rotation(new_kek_hex, wait, verify, priority)
        return self._call(api.ROTATE_KEK, body, request_id, timeout_s=timeout_s)

    def list_roots(self) -> api.RootListAnswer:
        """The root keys that open the keyring, and the removed ones whose revocation has not ended."""
        return self._call(api.LIST_ROOTS, api.Request())

    def add_root(
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
        return self._call(api.ADD_ROOT, calls.new_root(root_hex, provider, shares), request_id)

    def test_root(
        self, slot_id: str, root_hex: bytes | bytearray | str, *, request_id: str | None = None
    ) -> api.RootAnswer:
        """Proves that the root key opens the slot. Raises WrongSlotError, NotFoundError."""
        return self._call(api.TEST_ROOT, calls.proof(root_hex), request_id, named=slot_id)

    def remove_root(self, slot_id: str, *, request_id: str | None = None) -> api.RootAnswer:
        """Removes a root key at once; a KEK rotation follows. Raises LastRootError, NotTestedError, NotFoundError."""
        return self._call(api.REMOVE_ROOT, api.SlotRequest(slot_id), request_id)

    def seal(self) -> api.SealAnswer:
        """Zeroes every key of the daemon at once. It answers when a restart would stay sealed too.

        Raises StorageUnavailableError: it is sealed even then, but a restart would not stay sealed.
        """
        return self._call(api.SEAL, api.Request())

    def unseal_status(self) -> api.UnsealStatusAnswer:
        """Whether the daemon is sealed, since when and by whom."""
        return self._call(api.UNSEAL_STATUS, api.Request())

    def unseal(
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
        return self._call(api.UNSEAL, calls.unsealing(root_hex, share), timeout_s=timeout_s)

    def reload_policy(self) -> api.PolicyAnswer:
        """Reads the policy file of the daemon again, and takes it into force. Raises InvalidPolicyError: the policy
        before it stays; ConflictError: the daemon was started without one.
        """
        return self._call(api.RELOAD_POLICY, api.Request())

    def list_keys(
        self,
        *,
        thread_id: str | None = None,
        state: api.State | None = None,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> api.KeyListAnswer:
        """A page of keys, oldest first, at most `limit` (default 100); continue with `next_cursor` if it is set."""
        request = api.ListKeysRequest(given(thread_id), given(state), given(cursor), given(limit))
        return self._call(api.LIST_KEYS, request)

    def get_key(self, key_id: str) -> api.KeyAnswer:
        """The state and the use counts of one key. Raises KeyNotFoundError, KeyUnreadableError."""
        return self._call(api.GET_KEY, api.KeyRequest(key_id))

    def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        """The key only decrypts from now on; a retired key stays as it is. Raises KeyNotFoundError."""
        return self._call(api.RETIRE_KEY, api.KeyRequest(key_id), request_id)

    def destroy_key(self, key_id: str, *, request_id: str | None = None) -> api.DestroyKeyAnswer:
        """Destroys a retired key permanently; returns the receipt. Raises ConflictError for an active key."""
        return self._call(api.DESTROY_KEY, api.DestroyKeyRequest(key_id), request_id)

    def prune_kek(
        self, *, backups: bool = False, backups_before: str | None = None, request_id: str | None = None
    ) -> api.PruneKekAnswer:
        """Destroys retired KEK versions that no file names any more; the answer lists them, and why others are kept.

        With `backups` all rotation backups of DEK files are removed first, with `backups_before` (UTC, written
        `YYYYMMDDTHHMMSS`) only those made before that second. Raises ConflictError while a rotation runs,
        InvalidRequestError for another form of the time.
        """
        request = api.PruneKekRequest(backups, given(backups_before))
        return self._call(api.PRUNE_KEK, request, request_id)

    # --- exchanges ---

    def _call(
        self,
        verb: Verb[R, A],
        request: R | Sent | bytearray,
        request_id: str | None = None,
        *,
        timeout_s: float | None = None,
        named: str = "",
    ) -> A:
        call = make_call(verb, request, request_id, named, msgpack=self._msgpack.may_send(time.monotonic()))
        attempts = Attempts(repeatable=verb.repeatable, until_s=time.monotonic() + self._wait_s)
        try:
            while True:
                try:
                    return call.read(self._exchange(call, self._timeout_s if timeout_s is None else timeout_s))
                except KmsError as error:
                    now_s = time.monotonic()
                    in_json = self._msgpack.refused(call, error, now_s)
                    if in_json is None:
                        time.sleep(attempts.pause_s(error, now_s))
                    else:
                        call = in_json
        finally:
            call.wipe()

    def _call_chunks(
        self,
        verb: Verb[Any, A],
        requests: Iterator[Batch] | Iterator[ReencryptBatch] | Iterator[CheckBatch],
        read: Callable[[A, int], list[T]],
        request_id: str | None = None,
    ) -> list[T]:
        found: list[T] = []
        for request in requests:
            found += read(self._call(verb, request, request_id), len(request.items))
        return found

    def _exchange(self, call: Call[Any], timeout_s: float) -> Answer:
        sock = self._connection()
        try:
            answer = _exchange(sock, call, time.monotonic() + timeout_s)
        except TimeoutError:
            sock.close()
            raise KmsTimeoutError(f"the key service did not answer within {timeout_s:g} s") from None
        except OSError as error:
            sock.close()
            raise KmsUnavailableError(
                "the connection to the key service was lost before it answered", sent=True
            ) from error
        except BaseException:
            sock.close()
            raise
        if answer.reusable:
            self._release(sock)
        else:
            sock.close()
        return answer

    def _connection(self) -> socket.socket:
        fresh_s = time.monotonic() - POOL_IDLE_S_MAX
        while True:
            with self._lock:
                if self._closed:
                    raise KmsClosedError("the client is closed")
                if not self._idle:
                    break
                since_s, sock = self._idle.pop()
            if since_s >= fresh_s and not _has_input(sock):
                return sock
            sock.close()
        return connecting.connect(self._path, self._server_uids)

    def _release(self, sock: socket.socket) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < POOL_CONNECTIONS_MAX:
                self._idle.append((time.monotonic(), sock))
                return
        sock.close()


def _has_input(sock: socket.socket) -> bool:
    """Whether an idle connection has anything to read: its end, or unexpected bytes."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _exchange(sock: socket.socket, call: Call[Any], until_s: float) -> Answer:
    """Sends the request and reads its answer. Raises TimeoutError, OSError and KmsProtocolError."""
    head = request_head(call.target, None if call.body is None else len(call.body), call.request_id, call.content_type)
    _send(sock, head, until_s)
    if call.body:
        _send(sock, call.body, until_s)
    parser = AnswerParser()
    while True:
        sock.settimeout(_left_s(until_s))
        data = sock.recv(_RECEIVE_BYTES_MAX)
        if not data:
            raise ConnectionResetError("end of stream")
        answer = parser.feed(data)
        if answer is not None:
            return answer


def _send(sock: socket.socket, data: bytes | bytearray, until_s: float) -> None:
    # sendall counts its timeout over the whole of the data (since Python 3.5), recv only until the next bytes come
    sock.settimeout(_left_s(until_s))
    sock.sendall(data)


def _left_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _begin_in_child() -> None:
    for client in list(_clients):
        client._begin_in_child()


os.register_at_fork(after_in_child=_begin_in_child)
