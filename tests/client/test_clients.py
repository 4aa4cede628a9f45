"""What both clients promise, against servers that misbehave. Most tests run with each of the clients."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hostile import CLOSE, SILENT, answer, hostile, read_request

import minikms
from minikms.client import AsyncClient, Client, DecryptItem, EncryptItem, errors, peer

KEY = "k_" + "0" * 26
CREATED = answer(b'{"key_id":"%b","wrapped":"eA=="}' % KEY.encode())
SEALED = answer(b'{"ciphertext":"eA=="}')
STATUS = answer(b'{"a":1}')
WAIT_S = 5.0

Use = Callable[..., list[Any]]


def use_blocking(path: str, *calls: tuple[str, dict[str, Any]], **options: Any) -> list[Any]:
    """Makes the calls one after the other with one client; a KmsError is a result."""
    with Client(path, **options) as client:
        results = []
        for name, arguments in calls:
            try:
                results.append(getattr(client, name)(**arguments))
            except errors.KmsError as error:
                results.append(error)
            time.sleep(0.02)  # the far side does meanwhile what it has to do
        return results


def use_asyncio(path: str, *calls: tuple[str, dict[str, Any]], **options: Any) -> list[Any]:
    async def main() -> list[Any]:
        async with AsyncClient(path, **options) as client:
            results = []
            for name, arguments in calls:
                try:
                    results.append(await getattr(client, name)(**arguments))
                except errors.KmsError as error:
                    results.append(error)
                await asyncio.sleep(0.02)  # as above
            return results

    return asyncio.run(main())


def use_uvloop(path: str, *calls: tuple[str, dict[str, Any]], **options: Any) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "run", uvloop.run)
        return use_asyncio(path, *calls, **options)


@pytest.fixture(params=[use_blocking, use_asyncio, use_uvloop], ids=["blocking", "asyncio", "uvloop"])
def use(request: pytest.FixtureRequest) -> Use:
    return request.param  # type: ignore[no-any-return]  # pytest types it as Any


STATUS_CALL = ("status", {})
CREATE_CALL = ("create_dek_for_thread", {"thread_id": "t"})
ENCRYPT_CALL = ("encrypt", {"key_id": KEY, "plaintext": b"x"})


def test_a_connection_is_kept_for_the_next_call(use: Use) -> None:
    with hostile([STATUS, STATUS, CREATED]) as server:
        first, second, third = use(server.path, STATUS_CALL, STATUS_CALL, CREATE_CALL)
        assert (first, second, third.key_id) == ({"a": 1}, {"a": 1}, KEY)
        assert server.connections == 1


def test_a_server_of_another_user_gets_not_one_byte(use: Use) -> None:
    with hostile([SEALED]) as server:
        [result] = use(server.path, ENCRYPT_CALL, server_uids={54321}, wait_s=0)
        assert isinstance(result, errors.KmsUntrustedServerError)
        assert "54321" in str(result)
    assert server.requests == []


def test_a_user_that_the_kernel_can_not_name_is_not_trusted(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_overflow_uid", os.geteuid)
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

        thread = threading.Thread(target=come)
        thread.start()
        [made] = use(path, CREATE_CALL, wait_s=WAIT_S)
        thread.join()
        assert made.key_id == KEY


def test_a_daemon_that_says_nothing_is_a_timeout_and_its_late_answer_reaches_nobody(use: Use) -> None:
    with hostile([SILENT], [STATUS]) as server:
        first, second = use(server.path, ENCRYPT_CALL, STATUS_CALL, timeout_s=0.2, wait_s=WAIT_S)
        assert isinstance(first, errors.KmsTimeoutError)
        assert second == {"a": 1}
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

            thread = threading.Thread(target=trickle)
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
        assert second == {"a": 1}
        assert len(server.requests) == 2


def test_a_value_that_is_too_much_for_base64_is_a_protocol_error(use: Use) -> None:
    with hostile([answer(b'{"ciphertext":"===="}')]) as server:
        [result] = use(server.path, ENCRYPT_CALL)
        assert isinstance(result, errors.KmsProtocolError)


def test_a_harmless_call_is_made_again_when_its_connection_breaks(use: Use) -> None:
    for call, wire in ((STATUS_CALL, STATUS), (ENCRYPT_CALL, SEALED)):
        with hostile([SILENT, CLOSE], [wire[:20], CLOSE], [wire]) as server:
            server_kills = threading.Timer(0.2, lambda server=server: server._open[0].shutdown(socket.SHUT_RDWR))
            server_kills.start()
            [result] = use(server.path, call, wait_s=WAIT_S)
            server_kills.join()
            assert result in ({"a": 1}, b"x")
            assert len(server.requests) >= 2


def test_a_create_is_not_made_again_once_it_may_have_arrived(use: Use) -> None:
    with hostile([CREATED[:20], CLOSE], [CREATED]) as server:
        [result] = use(server.path, CREATE_CALL, wait_s=WAIT_S)
        assert isinstance(result, errors.KmsUnavailableError)
        assert result.sent
        assert len(server.requests) == 1


def test_a_create_survives_a_restart_of_the_daemon_between_two_calls(use: Use) -> None:
    with hostile([STATUS, CLOSE], [CREATED]) as server:
        [_, made] = use(server.path, STATUS_CALL, CREATE_CALL, wait_s=WAIT_S)
        assert made.key_id == KEY


def test_a_daemon_that_is_stopping_did_nothing_so_even_a_create_is_made_again(use: Use) -> None:
    stopping = answer(b'{"error":"stopping","code":"shutting_down"}', 503, b"Connection: close\r\n")
    with hostile([stopping], [stopping], [CREATED]) as server:
        [made] = use(server.path, CREATE_CALL, wait_s=WAIT_S)
        assert made.key_id == KEY
        assert server.connections == 3


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
        assert (first.status, first.code, str(first)) == (409, "key_retired", "The key decrypts only. (key_retired)")
        assert second == {"a": 1}


def test_bytes_planted_on_an_idle_connection_answer_no_later_call(use: Use) -> None:
    planted = threading.Event()
    with tempfile.TemporaryDirectory(prefix="kms") as directory:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(directory + "/s")
            listener.listen()

            def serve() -> None:
                first, _ = listener.accept()
                with first:
                    read_request(first)
                    first.sendall(STATUS)
                    time.sleep(0.005)
                    with suppress(OSError):
                        first.sendall(answer(b'{"planted":true}'))
                    planted.set()
                    second, _ = listener.accept()
                    with second:
                        read_request(second)
                        second.sendall(STATUS)
                        second.recv(1)

            thread = threading.Thread(target=serve)
            thread.start()
            if use is use_blocking:
                with Client(directory + "/s") as client:
                    client.status()
                    planted.wait(WAIT_S)
                    assert client.status() == {"a": 1}
            else:
                assert use(directory + "/s", STATUS_CALL, STATUS_CALL) == [{"a": 1}, {"a": 1}]
            thread.join()


def test_a_connection_that_the_daemon_closes_after_its_answer_is_not_used_again(use: Use) -> None:
    with hostile([answer(b'{"a":1}', 200, b"Connection: close\r\n"), SILENT], [STATUS]) as server:
        assert use(server.path, STATUS_CALL, STATUS_CALL) == [{"a": 1}, {"a": 1}]
        assert server.connections == 2


def test_health_is_ok_and_nothing_else(use: Use) -> None:
    with hostile([answer(b"ok"), answer(b"okay")]) as server:
        first, second = use(server.path, ("health", {}), ("health", {}))
        assert first is True
        assert isinstance(second, errors.KmsProtocolError)


def test_a_new_root_key_does_not_stay_in_the_client(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies: list[bytearray] = []
    real = minikms.client.verbs.rotate_kek

    def spy(*arguments: Any) -> Any:
        call = real(*arguments)
        assert isinstance(call.body, bytearray)
        bodies.append(call.body)
        return call

    monkeypatch.setattr(minikms.client.verbs, "rotate_kek", spy)
    with hostile([answer(b'{"status":"ok","kek_version":2,"rewrapped":3}')]) as server:
        [result] = use(server.path, ("rotate_kek", {"new_kek_hex": bytearray(b"ab" * 32)}))
        assert (result.status, result.kek_version, result.rewrapped) == ("ok", 2, 3)
        assert b'{"new_kek_hex":"' + b"ab" * 32 + b'","wait":true}' in server.requests[0]
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


def test_every_verb_goes_to_its_place(use: Use) -> None:
    key = b'{"key_id":"%b","thread_id":"t","purpose":"thread","state":"retired","kek_version":1,' % KEY.encode()
    key += b'"created_at":"2026-01-01T00:00:00Z","uses_max":65536}'
    batch = answer(b'{"items":[{"ciphertext":"eA=="}]}')
    plain = answer(b'{"items":[{"plaintext":"eA=="}]}')
    exchanges: list[tuple[tuple[str, dict[str, Any]], bytes, bytes]] = [
        (("health", {}), answer(b"ok"), b"GET /health"),
        (STATUS_CALL, STATUS, b"GET /status"),
        (CREATE_CALL, CREATED, b"POST /create_dek_for_thread"),
        (("get_wrapped", {"key_id": KEY}), answer(b'{"wrapped":"eA=="}'), b"GET /get_wrapped?key_id=k_000"),
        (ENCRYPT_CALL, SEALED, b"POST /encrypt "),
        (("decrypt", {"key_id": KEY, "ciphertext": b"x"}), answer(b'{"plaintext":"eA=="}'), b"POST /decrypt "),
        (("encrypt_batch", {"items": [EncryptItem(key_id=KEY, plaintext=b"")]}), batch, b"POST /encrypt_batch"),
        (("decrypt_batch", {"items": [DecryptItem(key_id=KEY, ciphertext=b"")]}), plain, b"POST /decrypt_batch"),
        (
            (
                "reencrypt_batch",
                {"from_key_id": KEY, "to_key_id": KEY, "items": [minikms.client.ReencryptItem(ciphertext=b"")]},
            ),
            batch,
            b"POST /reencrypt_batch",
        ),
        (
            ("generate_data_key", {"key_id": KEY}),
            answer(b'{"key_id":"k","ciphertext":"eA==","plaintext":"eA=="}'),
            b"POST /generate_data_key",
        ),
        (("random", {"count": 1}), answer(b'{"random":"eA=="}'), b"POST /random"),
        (
            ("rotate_kek", {"wait": False}),
            answer(b'{"status":"running","kek_version":2,"rewrapped":0}', 202),
            b"POST /rotate_kek",
        ),
        (
            ("list_keys", {"state": "active", "limit": 5}),
            answer(b'{"keys":[%b]}' % key),
            b"GET /keys?state=active&limit=5",
        ),
        (("get_key", {"key_id": KEY}), answer(key), b"GET /keys/k_000"),
        (("retire_key", {"key_id": KEY}), answer(key), b"POST /keys/k_00000000000000000000000000/retire"),
        (
            ("destroy_key", {"key_id": KEY}),
            answer(b'{"key_id":"k","state":"destroyed","backups_removed":0,"archives":[]}'),
            b"POST /keys/k_00000000000000000000000000/destroy",
        ),
        (
            ("prune_kek", {"backups": True}),
            answer(b'{"destroyed":[1],"kept":[],"backups_removed":3}'),
            b"POST /kek/prune",
        ),
    ]
    for call, wire, line in exchanges:
        with hostile([wire]) as server:
            [result] = use(server.path, call)
            assert not isinstance(result, Exception), result
            assert server.requests[0].startswith(line)
    verbs = {name for name in vars(Client) if not name.startswith("_")} - {"close"}
    assert verbs == {call[0] for call, _, _ in exchanges}
    assert verbs == {name for name in vars(AsyncClient) if not name.startswith("_")} - {"close"}


def test_more_items_than_a_request_takes_are_split_and_come_back_in_order(use: Use, daemon_socket: str) -> None:
    [made] = use(daemon_socket, CREATE_CALL)
    count = 2 * 1024 + 3
    items = [
        EncryptItem(key_id=made.key_id if index != 1500 else KEY, plaintext=b"%d" % index) for index in range(count)
    ]
    [sealed] = use(daemon_socket, ("encrypt_batch", {"items": items}))
    assert isinstance(sealed.pop(1500), errors.KeyNotFoundError)
    opened_items = [DecryptItem(key_id=made.key_id, ciphertext=ciphertext) for ciphertext in sealed]
    [opened] = use(daemon_socket, ("decrypt_batch", {"items": opened_items}))
    assert opened == [b"%d" % index for index in range(count) if index != 1500]


def test_when_one_request_of_a_large_batch_fails_the_whole_call_does_and_nothing_is_left_under_way(use: Use) -> None:
    refused = answer(b'{"error":"no","code":"audit_unavailable"}', 503)
    with hostile(*[[refused] * 10] * 10) as server:
        items = [EncryptItem(key_id=KEY, plaintext=b"")] * 5000
        [result] = use(server.path, ("encrypt_batch", {"items": items}))
        assert isinstance(result, errors.AuditUnavailableError)
        assert len(server.requests) <= 4


def test_no_items_are_no_request(use: Use) -> None:
    with hostile() as server:
        assert use(server.path, ("encrypt_batch", {"items": []})) == [[]]
        assert server.connections == 0


def test_threads_share_a_blocking_client() -> None:
    with hostile(*[[STATUS] * 50] * 8) as server, Client(server.path) as client:
        results: list[object] = []
        threads = [
            threading.Thread(target=lambda: results.extend(client.status() for _ in range(20))) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [{"a": 1}] * 160
        assert server.connections <= 8


@pytest.mark.parametrize("path", ["", "a\0b", "/" + "x" * 107])
def test_a_path_that_no_socket_can_have_is_refused_at_once(path: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ValueError, match="socket path"):
            kind(path)


def test_the_clients_are_found_under_the_packages_own_name() -> None:
    assert minikms.Client is Client
    assert minikms.AsyncClient is AsyncClient
    with pytest.raises(AttributeError):
        minikms.NoSuchThing  # noqa: B018 - the access is what is tested


def test_the_daemons_own_imports_do_not_load_the_clients() -> None:

    program = "import minikms.api, sys; sys.exit('minikms.client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_on_bsd_and_macos_the_uid_comes_from_local_peercred(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        version = 0

        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (0, 1)
            return (self.version.to_bytes(4, "little") + (501).to_bytes(4, "little")).ljust(size, b"\0")

    monkeypatch.setattr(peer.sys, "platform", "darwin")
    assert peer.server_uid(Peer()) == 501  # type: ignore[arg-type]  # all of a socket that is asked
    Peer.version = 1
    with pytest.raises(errors.KmsUntrustedServerError):
        peer.server_uid(Peer())  # type: ignore[arg-type]  # as above


def test_path_objects_are_paths() -> None:
    with hostile([STATUS]) as server, Client(Path(server.path)) as client:
        assert client.status() == {"a": 1}
