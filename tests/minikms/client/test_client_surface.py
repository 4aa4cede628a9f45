"""The methods of both clients: where each goes, how many items it takes, and how the clients are found and made."""

import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest

import minikms
from minikms import api
from minikms.api import errors
from minikms.client import AsyncClient, Client, DecryptItem, EncryptItem, MacItem, ReencryptItem, connecting
from minikms.client.base import ROTATE_TIMEOUT_S
from tests.harness.verb_requests import example
from tests.minikms.client.hostile import answer, array_answer, hostile
from tests.minikms.client.using import CREATE_CALL, CREATED, ENCRYPT_CALL, KEY, SEALED, STATUS, STATUS_CALL, Use


def test_health_is_ok_and_nothing_else(use: Use) -> None:
    with hostile([answer(b"ok"), answer(b"okay")]) as server:
        first, second = use(server.path, ("health", {}), ("health", {}))
        assert first is True
        assert isinstance(second, errors.KmsProtocolError)


def test_ready_is_ready_and_nothing_else(use: Use) -> None:
    with hostile([answer(b"ready"), answer(b"ok")]) as server:
        first, second = use(server.path, ("ready", {}), ("ready", {}))
        assert first is True
        assert isinstance(second, errors.KmsProtocolError)


def test_every_verb_goes_to_its_place(use: Use) -> None:
    key = b'{"key_id":"%b","thread_id":"t","purpose":"thread","state":"retired","kek_version":1,' % KEY.encode()
    key += b'"created_at":"2026-01-01T00:00:00Z"}'
    root = b'{"slot_id":"s1","fingerprint":"00","provider":"file","state":"active","in_use":true}'
    batch = array_answer([[b"x"]])
    exchanges: list[tuple[tuple[str, dict[str, Any]], bytes, bytes]] = [
        (("health", {}), answer(b"ok"), b"GET /health"),
        (("ready", {}), answer(b"ready"), b"GET /ready"),
        (("reload_policy", {}), answer(b'{"sha256":"","generation":2}'), b"POST /policy/reload"),
        (
            ("report_audit_position", {"origin": "o", "log_id": "", "seq": 0, "mac": b""}),
            answer(b'{"log_id":"","durable":{"seq":1,"mac":""},"public_key":""}'),
            b"POST /audit/position",
        ),
        (("seal", {}), answer(b'{"sealed":true,"since":""}'), b"POST /seal"),
        (("unseal_status", {}), answer(b'{"sealed":true}'), b"GET /unseal"),
        (("unseal", {"root_hex": "0" * 64}), answer(b'{"sealed":false}'), b"POST /unseal"),
        (STATUS_CALL, STATUS, b"GET /status"),
        (CREATE_CALL, CREATED, b"POST /create_dek_for_thread"),
        (
            ("get_or_create_dek_for_thread", {"thread_id": "t"}),
            answer(b'{"key_id":"k","created":true}'),
            b"POST /get_or_create_dek_for_thread",
        ),
        (("get_wrapped", {"key_id": KEY}), answer(b'{"wrapped":"eA=="}'), b"GET /get_wrapped?key_id=k_000"),
        (ENCRYPT_CALL, SEALED, b"POST /encrypt "),
        (("decrypt", {"key_id": KEY, "ciphertext": b"x"}), answer(b'{"plaintext":"eA=="}'), b"POST /decrypt "),
        (("encrypt_batch", {"items": [EncryptItem(key_id=KEY, plaintext=b"")]}), batch, b"POST /encrypt_batch"),
        (("decrypt_batch", {"items": [DecryptItem(key_id=KEY, ciphertext=b"")]}), batch, b"POST /decrypt_batch"),
        (
            (
                "reencrypt_batch",
                {"from_key_id": KEY, "to_key_id": KEY, "items": [ReencryptItem(ciphertext=b"")]},
            ),
            batch,
            b"POST /reencrypt_batch",
        ),
        (
            (
                "check_batch",
                {"key_id": KEY, "items": [ReencryptItem(ciphertext=b"")], "thread_id": "t"},
            ),
            array_answer([1, []]),
            b"POST /check_batch",
        ),
        (("mac", {"key_id": KEY, "items": [MacItem(plaintext=b"")]}), array_answer([[bytes(32)]]), b"POST /mac "),
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
        (("list_roots", {}), answer(b'{"roots":[%b]}' % root), b"GET /roots "),
        (("add_root", {"root_hex": "ab" * 32, "provider": "file"}), answer(root), b"POST /roots "),
        (("test_root", {"slot_id": "s1", "root_hex": b"ab" * 32}), answer(root), b"POST /roots/s1/test "),
        (("remove_root", {"slot_id": "s1"}), answer(root), b"POST /roots/s1/remove "),
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
    report = {"member_id": "m1", "name": "a", "mode": "serving", "number": 1, "term": 1, "version": "1", "policy": ""}
    position = {
        "keyring_id": "kr_1",
        "member_id": "m1",
        "mode": "serving",
        "number": 1,
        "term": 1,
        "tombstones": 0,
        "seals": 0,
        "ready": True,
        "wants": False,
        "begins": False,
        "report": {**report, "pin": "", "why": "", "seen_seconds": 0.0},
    }
    requests = {verb: example(verb, KEY) for verb in api.REPLICA_VERBS}
    member = answer(b'{"member_id":"m2","name":"b","slot_id":"s2","fingerprint":""}')
    invitation = answer(b'{"format":"f","keyring_id":"k","member_id":"m2","slot_id":"s2","public_key":"","seals":0}')
    next_answer = answer(msgspec.json.encode({"position": position}))
    exchanges += [
        (
            ("replica_follow", {"request": requests[api.REPLICA_FOLLOW]}),
            answer(msgspec.json.encode(position)),
            b"POST /replica/follow ",
        ),
        (("replica_next", {"request": requests[api.REPLICA_NEXT]}), next_answer, b"POST /replica/next "),
        (("replica_status", {}), answer(b'{"enabled":false}'), b"GET /replica "),
        (("promote_replica", {}), answer(b'{"enabled":true}'), b"POST /replica/promote "),
        (("invite_replica", {}), invitation, b"POST /replica/invite "),
        (("add_replica", {"request": requests[api.ADD_REPLICA]}), member, b"POST /members "),
        (("remove_replica", {"member_id": "m2"}), member, b"POST /members/m2/remove "),
    ]
    for call, wire, line in exchanges:
        with hostile([wire]) as server:
            [result] = use(server.path, call)
            assert not isinstance(result, Exception), result
            assert server.requests[0].startswith(line)
    others = {"address", "addresses", "close", "decrypt_stream", "encrypt_stream", "on_exchange", "warnings"}
    verbs = {name for name in dir(Client) if not name.startswith("_")} - others
    assert verbs == {call[0] for call, _, _ in exchanges}
    assert verbs == {name for name in dir(AsyncClient) if not name.startswith("_")} - others


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
    checked_items = [ReencryptItem(ciphertext=ciphertext) for ciphertext in sealed]
    checked_items[1500] = ReencryptItem(ciphertext=sealed[1500], aad=b"elsewhere")
    [found] = use(daemon_socket, ("check_batch", {"key_id": made.key_id, "items": checked_items}))
    assert isinstance(found.pop(1500), errors.DecryptionError)
    assert found == [None] * (count - 2)


def test_one_failed_request_of_a_large_batch_fails_the_whole_call(use: Use) -> None:
    """No other request of the call is still running afterwards."""
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
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_synchronous_client_does_without_asyncio() -> None:
    program = "import minikms, sys; minikms.Client; sys.exit('asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_on_bsd_and_macos_the_uid_comes_from_local_peercred(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peer:
        version = 0

        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            assert (level, option) == (0, 1)
            return (self.version.to_bytes(4, "little") + (501).to_bytes(4, "little")).ljust(size, b"\0")

    monkeypatch.setattr(sys, "platform", "darwin")
    assert connecting.server_uid(Peer()) == 501  # type: ignore[arg-type]  # all of a socket that is asked
    Peer.version = 1
    with pytest.raises(errors.KmsUntrustedServerError):
        connecting.server_uid(Peer())  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("verb", ["rotate_kek", "prune_kek"])
def test_a_call_that_reads_every_key_may_take_an_hour(verb: str) -> None:
    for kind in (Client, AsyncClient):
        assert inspect.signature(getattr(kind, verb)).parameters["timeout_s"].default == ROTATE_TIMEOUT_S


def test_path_objects_are_paths() -> None:
    with hostile([STATUS]) as server, Client(Path(server.path)) as client:
        assert client.status() == api.StatusAnswer()


def test_every_error_is_a_name_of_the_package() -> None:
    kinds: list[type[errors.KmsError]] = [errors.KmsError, *errors.KmsError.__subclasses__(), *errors.BY_CODE.values()]
    for kind in kinds:
        assert getattr(minikms, kind.__name__) is kind


def test_the_package_names_its_version() -> None:
    assert minikms.__version__ == metadata.version("progressdb-minikms")
