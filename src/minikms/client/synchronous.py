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
import ssl
import threading
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast

from minikms import api
from minikms.api.errors import KmsClosedError, KmsError, KmsTimeoutError
from minikms.client.base import POOL_CONNECTIONS_MAX, BaseClient
from minikms.client.calls import Attempts, Call, check_proxied
from minikms.client.connecting import POOL_IDLE_S_MAX, Endpoint
from minikms.client.verbs import BlockingRunner, ClientOperation, Many, One, Verbs
from minikms.client.wire import Answer, AnswerParser, request_head

if TYPE_CHECKING:
    from minikms.client.streams import StreamCopy, StreamSource, StreamTarget

T = TypeVar("T")

_RECEIVE_BYTES_MAX: Final = 256 * 1024

_clients: Final[weakref.WeakSet[Client]] = weakref.WeakSet()


class Client(BaseClient, Verbs, BlockingRunner):
    """A client of one miniKMS, safe to share between threads.

        with Client("/run/minikms/minikms.sock") as kms:
            key = kms.get_or_create_dek_for_thread("thread-1", purpose="data")
            sealed = kms.encrypt(key.key_id, b"hello", aad=b"message-1")
            assert kms.decrypt(key.key_id, sealed, aad=b"message-1") == b"hello"

    Arguments and errors are those of AsyncClient.
    """

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[tuple[float, socket.socket, Endpoint]] = []
        self._closed = False
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
        for _since_s, sock, _endpoint in idle:
            sock.close()

    def encrypt_stream(self, source: StreamSource, target: StreamTarget, *, key_id: str | None = None) -> StreamCopy:
        """Encrypts all of `source` to `target`, any number of bytes, in the format of `minikms encrypt`.

        `key_id` is a key of purpose `data`; default: the newest one of the thread `STREAM_THREAD`, made at first use.
        If it raises, the target is no stream. Needs the library `cryptography`, of the extra `daemon`.
        """
        from minikms.client import streams

        key_id = key_id or self.get_or_create_dek_for_thread(api.STREAM_THREAD, purpose="data").key_id
        answer = self.generate_data_key(key_id, aad=streams.WRAP_AAD)
        return streams.seal_to(target, key_id, answer, streams.parts(source))

    def decrypt_stream(self, source: StreamSource, target: StreamTarget) -> StreamCopy:
        """Decrypts a stream of `encrypt_stream`. What it has written is whole only if it returns: raises
        DecryptionError for one that was altered or truncated, after authentic parts of it were written.
        """
        from minikms.client import streams

        header, rest = streams.split_header(streams.parts(source))
        data_key = self.decrypt(header.key_id, header.wrapped_key, aad=streams.WRAP_AAD)
        return streams.open_to(target, header, data_key, rest)

    def _begin_in_child(self) -> None:
        """After a fork: closes the kept connections, which are the parent's. If both processes used one, each would
        read answers to the other. The lock is new, because another thread may have held it.
        """
        self._lock = threading.Lock()
        idle, self._idle = self._idle, []
        for _since_s, sock, _endpoint in idle:
            sock.close()

    # --- exchanges ---

    def _run(self, operation: ClientOperation[T]) -> T:
        if isinstance(operation, Many):
            return cast("T", [outcome for one in operation.split() for outcome in self._run_one(one)])
        return self._run_one(cast("One[T]", operation))

    def _run_one(self, one: One[T]) -> T:
        if self._proxied:
            check_proxied(one.verb)
        call = one.call()
        timeout_s = self._timeout_s if one.timeout_s is None else one.timeout_s
        attempts = self._attempts(one.verb, timeout_s, time.monotonic())
        try:
            while True:
                try:
                    return one.value(call.read(self._exchange(call, attempts)))
                except KmsError as error:
                    pause_s = attempts.pause_s(error, time.monotonic())
                    if pause_s is None or call.is_wiped:
                        raise
                time.sleep(pause_s)
        finally:
            call.wipe()

    def _exchange(self, call: Call[Any], attempts: Attempts) -> Answer:
        endpoint = attempts.endpoint
        sock = self._connection(attempts)
        try:
            answer = _exchange(sock, call, time.monotonic() + attempts.timeout_s, endpoint.origin)
        except TimeoutError:
            sock.close()
            raise KmsTimeoutError(f"the key service did not answer within {attempts.timeout_s:g} s") from None
        except OSError as error:
            lost = endpoint.lost(error, sent=True, sock=sock)
            sock.close()
            raise lost from error
        except BaseException:
            sock.close()
            raise
        if answer.reusable:
            self._release(sock, endpoint)
        else:
            sock.close()
        return answer

    def _connection(self, attempts: Attempts) -> socket.socket:
        endpoint = attempts.endpoint
        fresh_s = time.monotonic() - POOL_IDLE_S_MAX
        while True:
            with self._lock:
                if self._closed:
                    raise KmsClosedError("the client is closed")
                if not self._idle:
                    break
                since_s, sock, connection = self._idle.pop()
            is_fresh = connection is endpoint and since_s >= fresh_s
            if is_fresh and not _has_input(sock) and (not self._proxied or endpoint.is_current(sock)):
                return sock
            sock.close()
        return endpoint.connect(attempts.connect_s)

    def _release(self, sock: socket.socket, endpoint: Endpoint) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < POOL_CONNECTIONS_MAX:
                self._idle.append((time.monotonic(), sock, endpoint))
                return
        sock.close()


def _has_input(sock: socket.socket) -> bool:
    """Whether an idle connection has anything to read: its end, or unexpected bytes."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _exchange(sock: socket.socket, call: Call[Any], until_s: float, origin: bytes) -> Answer:
    """Sends the request and reads its answer. Raises TimeoutError, OSError and KmsProtocolError."""
    length = None if call.body is None else len(call.body)
    head = request_head(call.target, length, call.request_id, call.content_type, origin)
    _send(sock, head, call.body or b"", until_s)
    call.wipe()
    parser = AnswerParser()
    while True:
        sock.settimeout(_left_s(until_s))
        data = sock.recv(_RECEIVE_BYTES_MAX)
        if not data:
            raise ConnectionResetError("end of stream")
        answer = parser.feed(data)
        if answer is not None:
            return answer


def _send(sock: socket.socket, head: bytes, body: bytes | bytearray, until_s: float) -> None:
    """Head and body with one system call, if the kernel takes them whole. TLS has no sendmsg."""
    sent = 0
    if not isinstance(sock, ssl.SSLSocket):
        sock.settimeout(_left_s(until_s))
        sent = sock.sendmsg([head, body])
    # sendall counts its timeout over the whole of the data (since Python 3.5), recv only until the next bytes come
    for data, start in ((head, sent), (body, max(sent - len(head), 0))):
        if start < len(data):
            sock.settimeout(_left_s(until_s))
            with memoryview(data) as whole, whole[start:] as rest:
                sock.sendall(rest)


def _left_s(until_s: float) -> float:
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s


def _begin_in_child() -> None:
    for client in list(_clients):
        client._begin_in_child()


os.register_at_fork(after_in_child=_begin_in_child)
