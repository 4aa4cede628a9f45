"""What both clients promise, against servers that misbehave. Most tests run with each of the clients."""

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import tempfile
import termios
import threading
import time
import warnings
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from minikms import api
from minikms.api import errors
from minikms.client import AsyncClient, Client, calls
from minikms.client import connecting as peer
from minikms.client.base import POOL_CONNECTIONS_MAX
from tests.harness.waiting import wait_until
from tests.minikms.client.hostile import CLOSE, FULL, SILENT, HostileServer, answer, hostile, read_request
from tests.minikms.client.using import (
    CREATE_CALL,
    CREATED,
    ENCRYPT_CALL,
    KEY,
    SEALED,
    STATUS,
    STATUS_CALL,
    WAIT_S,
    Use,
    use_blocking,
)


def test_a_connection_is_kept_for_the_next_call(use: Use) -> None:
    with hostile([STATUS, STATUS, CREATED]) as server:
        first, second, third = use(server.path, STATUS_CALL, STATUS_CALL, CREATE_CALL)
        assert (first, second, third.key_id) == (api.StatusAnswer(), api.StatusAnswer(), KEY)
        assert server.connections == 1


def test_a_server_of_another_user_gets_not_one_byte(use: Use) -> None:
    with hostile([SEALED]) as server:
        [result] = use(server.path, ENCRYPT_CALL, server_uids={54321}, wait_s=0)
        assert isinstance(result, errors.KmsUntrustedServerError)
        assert "54321" in str(result)
    assert server.requests == []


def test_a_user_that_the_kernel_can_not_name_is_not_trusted(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "overflow_uid", os.geteuid)
    with hostile([SEALED]) as server:
        [result] = use(server.path, ENCRYPT_CALL)
        assert isinstance(result, errors.KmsUntrustedServerError)
    assert server.requests == []


def test_a_socket_that_is_not_there_is_unavailable_after_the_wait(use: Use) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for path in (directory + "/missing", directory):
            began_s = time.monotonic()
            [result] = use(path, CREATE_CALL, wait_s=0.2)
            assert isinstance(result, errors.KmsUnavailableError)
            assert not result.sent
            assert time.monotonic() - began_s >= 0.2


def test_a_call_waits_for_a_daemon_that_comes_back(use: Use) -> None:
    with tempfile.TemporaryDirectory(prefix="kms") as directory:
        path = directory + "/s"

        def come() -> None:
            time.sleep(0.3)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(path)
                listener.listen()
                connection, _ = listener.accept()
                with connection:
                    read_request(connection)
                    connection.sendall(CREATED)
                    connection.recv(1)

        thread = threading.Thread(target=come, daemon=True)
        thread.start()
        [made] = use(path, CREATE_CALL, wait_s=WAIT_S)
        thread.join()
        assert made.key_id == KEY


def test_head_and_body_of_a_blocking_request_are_one_system_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    client_thread = threading.get_ident()

    def count(name: str) -> None:
        original = getattr(socket.socket, name)

        def counted(sock: socket.socket, *args: Any) -> Any:
            if threading.get_ident() == client_thread:
                calls.append(name)
            return original(sock, *args)

        monkeypatch.setattr(socket.socket, name, counted)

    for name in ("send", "sendall", "sendmsg"):
        count(name)
    with hostile([SEALED]) as server:
        use_blocking(server.path, ENCRYPT_CALL)
    assert calls == ["sendmsg"]
    assert len(server.requests) == 1


@pytest.mark.parametrize("taken", [1, 100, 200])
def test_a_request_that_the_kernel_takes_in_parts_arrives_whole(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    def in_part(sock: socket.socket, buffers: list[bytes]) -> int:
        part = b"".join(buffers)[:taken]
        sock.sendall(part)
        return len(part)

    monkeypatch.setattr(socket.socket, "sendmsg", in_part)
    with hostile([CREATED]) as server:
        [made] = use_blocking(server.path, ("create_dek_for_thread", {"thread_id": "t" * 100}))
    assert made.key_id == KEY
    assert b'"' + b"t" * 100 + b'"' in server.requests[0]


def test_a_silent_daemon_is_a_timeout_and_its_late_answer_is_discarded(use: Use) -> None:
    with hostile([SILENT], [STATUS]) as server:
        first, second = use(server.path, ENCRYPT_CALL, STATUS_CALL, timeout_s=1.0, wait_s=WAIT_S)
        assert isinstance(first, errors.KmsTimeoutError)
        assert second == api.StatusAnswer()
        assert server.connections == 2


def test_a_daemon_that_trickles_its_answer_is_a_timeout(use: Use) -> None:
    with tempfile.TemporaryDirectory(prefix="kms") as directory:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(directory + "/s")
            listener.listen()

            def trickle() -> None:
                connection, _ = listener.accept()
                with connection:
                    read_request(connection)
                    try:
                        for byte in STATUS:
                            connection.sendall(bytes([byte]))
                            time.sleep(0.05)
                    except OSError:
                        pass

            thread = threading.Thread(target=trickle, daemon=True)
            thread.start()
            [result] = use(directory + "/s", STATUS_CALL, timeout_s=0.3)
            thread.join()
        assert isinstance(result, errors.KmsTimeoutError)


@pytest.mark.parametrize(
    "wire",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        STATUS + b"more",
        answer(b"not json"),
        answer(b'["a list"]'),
        answer(b'{"error":"x"}', 500),
        b"\x00" * 20000,
    ],
)
def test_an_answer_that_is_none_is_a_protocol_error_and_not_repeated(use: Use, wire: bytes) -> None:
    with hostile([wire, STATUS], [STATUS]) as server:
        first, second = use(server.path, STATUS_CALL, STATUS_CALL, wait_s=WAIT_S)
        assert isinstance(first, errors.KmsProtocolError)
        assert second == api.StatusAnswer()
        assert len(server.requests) == 2


def test_a_value_that_is_too_much_for_base64_is_a_protocol_error(use: Use) -> None:
    with hostile([answer(b'{"ciphertext":"===="}')]) as server:
        [result] = use(server.path, ENCRYPT_CALL)
        assert isinstance(result, errors.KmsProtocolError)


def test_a_harmless_call_is_made_again_when_its_connection_breaks(use: Use) -> None:
    for call, wire in ((STATUS_CALL, STATUS), (ENCRYPT_CALL, SEALED)):
        with hostile([SILENT, CLOSE], [wire[:20], CLOSE], [wire]) as server:

            def kill_first(server: HostileServer = server) -> None:
                wait_until(lambda: server.requests)
                server.sockets[0].shutdown(socket.SHUT_RDWR)

            server_kills = threading.Thread(target=kill_first)
            server_kills.start()
            [result] = use(server.path, call, wait_s=WAIT_S)
            server_kills.join()
            assert result in (api.StatusAnswer(), b"x")
            assert len(server.requests) >= 2


def test_a_create_is_not_made_again_once_it_may_have_arrived(use: Use) -> None:
    with hostile([CREATED[:20], CLOSE], [CREATED]) as server:
        [result] = use(server.path, CREATE_CALL, wait_s=WAIT_S)
        assert isinstance(result, errors.KmsUnavailableError)
        assert result.sent
        assert len(server.requests) == 1


def test_a_create_survives_a_restart_of_the_daemon_between_two_calls(use: Use) -> None:
    with hostile([STATUS, CLOSE], [CREATED]) as server:
        [_, made] = use(server.path, STATUS_CALL, CREATE_CALL, wait_s=WAIT_S, between=server.ended.wait)
        assert made.key_id == KEY


def test_a_create_refused_by_a_stopping_daemon_is_sent_again(use: Use) -> None:
    """The refusal says that the daemon did nothing."""
    stopping = answer(b'{"error":"stopping","code":"shutting_down"}', 503, b"Connection: close\r\n")
    with hostile([stopping], [stopping], [CREATED]) as server:
        [made] = use(server.path, CREATE_CALL, wait_s=WAIT_S)
        assert made.key_id == KEY
        assert server.connections == 3


def test_a_call_that_a_stopping_daemon_began_is_repeated_only_if_harmless(use: Use) -> None:
    interrupted = answer(b'{"error":"stopped","code":"interrupted"}', 503, b"Connection: close\r\n")
    with hostile([interrupted], [CREATED]) as server:
        [result] = use(server.path, CREATE_CALL, wait_s=WAIT_S)
        assert isinstance(result, errors.RequestInterruptedError)
        assert server.connections == 1
    with hostile([interrupted], [SEALED]) as server:
        assert use(server.path, ENCRYPT_CALL, wait_s=WAIT_S) == [b"x"]


def test_a_daemon_that_stays_stopping_is_an_error_of_that_name(use: Use) -> None:
    stopping = answer(b'{"error":"stopping","code":"shutting_down"}', 503)
    with hostile([stopping] * 100) as server:
        [result] = use(server.path, CREATE_CALL, wait_s=0.1)
        assert isinstance(result, errors.ShuttingDownError)


def test_a_refusal_is_an_error_of_its_code_and_ends_the_call(use: Use) -> None:
    refused = answer(b'{"error":"The key decrypts only.","code":"key_retired"}', 409)
    with hostile([refused, STATUS], [STATUS]) as server:
        first, second = use(server.path, ENCRYPT_CALL, STATUS_CALL, wait_s=WAIT_S)
        assert isinstance(first, errors.KeyRetiredError)
        assert (first.status, first.code, str(first)) == (409, "key_retired", "The key decrypts only.")
        assert second == api.StatusAnswer()


NOTHING_UNREAD = bytes(4)


def test_bytes_planted_on_an_idle_connection_answer_no_later_call(use: Use) -> None:
    planted = threading.Event()
    with tempfile.TemporaryDirectory(prefix="kms") as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(directory + "/s")
        listener.listen()

        def serve() -> None:
            first, _ = listener.accept()
            with first:
                read_request(first)
                first.sendall(STATUS)
                while fcntl.ioctl(first, termios.TIOCOUTQ, NOTHING_UNREAD) != NOTHING_UNREAD:
                    time.sleep(0.001)
                time.sleep(0.005)  # until the client has taken it for the whole answer
                with suppress(OSError):
                    first.sendall(answer(b'{"status":"planted"}'))
                planted.set()
                second, _ = listener.accept()
                with second:
                    read_request(second)
                    second.sendall(STATUS)
                    second.recv(1)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        results = use(directory + "/s", STATUS_CALL, STATUS_CALL, between=partial(planted.wait, WAIT_S))
        assert results == [api.StatusAnswer(), api.StatusAnswer()]
        thread.join()


def test_a_connection_closed_after_an_answer_is_not_used_again(use: Use) -> None:
    with hostile([answer(b'{"a":1}', 200, b"Connection: close\r\n"), SILENT], [STATUS]) as server:
        assert use(server.path, STATUS_CALL, STATUS_CALL) == [api.StatusAnswer(), api.StatusAnswer()]
        assert server.connections == 2


def test_a_new_root_key_does_not_stay_in_the_client(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytearray] = []
    real = calls.rotation

    def spy(*arguments: Any) -> bytearray:
        bodies.append(real(*arguments))
        return bodies[-1]

    monkeypatch.setattr(calls, "rotation", spy)
    with hostile([answer(b'{"status":"ok","kek_version":2,"rewrapped":3}')]) as server:
        [result] = use(server.path, ("rotate_kek", {"new_kek_hex": bytearray(b"ab" * 32)}))
        assert (result.status, result.kek_version, result.rewrapped) == ("ok", 2, 3)
        assert b'{"wait":true,"new_kek_hex":"' + b"ab" * 32 + b'"}' in server.requests[0]
    assert bodies == [bytearray(len(bodies[0]))]


def test_a_closed_client_says_so(use: Use) -> None:
    with hostile([STATUS]) as server:
        if use is use_blocking:
            client = Client(server.path)
            client.close()
            client.close()
            with pytest.raises(errors.KmsClosedError):
                client.status()
        else:

            async def main() -> None:
                client = AsyncClient(server.path)
                await client.close()
                await client.close()
                for call in (client.status(), client.encrypt(KEY, b"x")):
                    with pytest.raises(errors.KmsClosedError):
                        await call

            asyncio.run(main())
        assert server.connections == 0


def test_threads_share_a_blocking_client() -> None:
    with hostile(*[[STATUS] * 160] * 8) as server, Client(server.path) as client:
        results: list[object] = []
        threads = [
            threading.Thread(target=lambda: results.extend(client.status() for _ in range(20)), daemon=True)
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [api.StatusAnswer()] * 160
        assert server.connections <= 8


def test_a_forked_child_uses_no_connection_of_its_parent() -> None:
    """On one that both use, each would read answers to the other."""
    locks: list[threading.Lock] = []
    made = threading.Lock

    def noting() -> threading.Lock:
        locks.append(made())
        return locks[-1]

    with hostile([STATUS, STATUS], [STATUS]) as server, contextlib.ExitStack() as opened:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "Lock", noting)
            client = opened.enter_context(Client(server.path))
        [lock] = locks
        assert client.status() == api.StatusAnswer()
        lock.acquire()  # as another thread of the parent may have
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forks beside threads
            pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(60)
                os._exit(0 if client.status() == api.StatusAnswer() else 1)
            finally:
                os._exit(2)
        lock.release()
        assert os.waitpid(pid, 0)[1] == 0
        assert client.status() == api.StatusAnswer()
        assert server.connections == 2


def test_closing_an_asynchronous_client_ends_what_is_under_way() -> None:
    async def main(path: str) -> None:
        client = AsyncClient(path, timeout_s=60, wait_s=0)
        calls = [asyncio.ensure_future(client.status()), asyncio.ensure_future(client.create_dek_for_thread("t"))]
        while len(server.requests) < 2:
            await asyncio.sleep(0.001)
        await client.close()
        async with asyncio.timeout(60):
            repeatable, other = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(repeatable, errors.KmsError)
        assert isinstance(other, errors.KmsUnavailableError)
        assert other.sent

    with hostile([SILENT], [SILENT]) as server:
        asyncio.run(main(server.path))


def test_a_key_is_wiped_while_the_answer_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the blocking client."""
    bodies: list[bytearray] = []
    new_root = calls.new_root

    def noting(*given: Any) -> bytearray:
        bodies.append(new_root(*given))
        return bodies[-1]

    def ask() -> None:
        with suppress(errors.KmsError):
            client.add_root(key, provider="file")

    monkeypatch.setattr(calls, "new_root", noting)
    key = calls.OneTimeKey(b"ab" * 32)
    with hostile([SILENT]) as server, Client(server.path, timeout_s=1, wait_s=0) as client:
        asking = threading.Thread(target=ask)
        asking.start()
        wait_until(lambda: bool(server.requests))
        wait_until(lambda: bodies[0] == bytes(len(bodies[0])))
        assert asking.is_alive()
        assert not any(key)
        asking.join()


def test_a_call_is_repeated_while_the_service_is_full(use: Use) -> None:
    """Any call, whether the daemon read it or not, and without `wait_s`: nothing of it was begun."""
    with hostile([FULL], [FULL], [CREATED]) as server:
        [key] = use(server.path, CREATE_CALL, wait_s=0)
        assert key.key_id == KEY
        assert (server.connections, len(server.requests)) == (3, 1)
    with hostile(*[[FULL]] * 400) as server:
        [full] = use(server.path, CREATE_CALL, wait_s=0, timeout_s=0.2)
        assert (type(full), full.status) == (errors.TooManyError, 503)
        assert server.connections > 1


def test_a_request_that_is_too_large_is_not_repeated(use: Use) -> None:
    """`too_many` is also the code of such a refusal."""
    refused = answer(b'{"error":"x","code":"too_many"}', status=413)
    with hostile([refused, STATUS]) as server:
        [error] = use(server.path, STATUS_CALL)
        assert isinstance(error, errors.TooManyError)
        assert len(server.requests) == 1


def test_a_request_with_a_key_is_not_repeated() -> None:
    """Even if the daemon has certainly not carried it out: it was wiped."""
    stopping = answer(b'{"error":"later","code":"shutting_down"}', status=503)
    with hostile([stopping, stopping]) as server, Client(server.path, wait_s=WAIT_S) as client:
        with pytest.raises(errors.ShuttingDownError):
            client.add_root("ab" * 32, provider="file")
        assert len(server.requests) == 1


def test_a_key_is_wiped_also_when_the_call_never_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotations without an answer, for which a client waits long, have all of its connections."""
    bodies: list[bytearray] = []
    rotation = calls.rotation

    def noting(*given: Any) -> bytearray:
        bodies.append(rotation(*given))
        return bodies[-1]

    async def main(path: str) -> None:
        client = AsyncClient(path, timeout_s=0.05, wait_s=0)
        others = [asyncio.ensure_future(client.rotate_kek()) for _ in range(POOL_CONNECTIONS_MAX)]
        await asyncio.sleep(0)
        monkeypatch.setattr(calls, "rotation", noting)
        with pytest.raises(errors.KmsTimeoutError):
            await client.rotate_kek(new_kek_hex="ab" * 32)
        [body] = bodies
        assert body == bytes(len(body))
        await client.close()
        await asyncio.gather(*others, return_exceptions=True)

    with hostile(*[[SILENT]] * POOL_CONNECTIONS_MAX) as server:
        asyncio.run(main(server.path))
