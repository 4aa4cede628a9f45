"""The key service's requests through the gateway, with a client certificate."""

import base64
import datetime
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api import Verb
from minikms.client.calls import make_call
from tests.harness import forked
from tests.harness.callers import Caller, Reply
from tests.harness.gateways import GATEWAY, HOST, Pair
from tests.harness.verb_requests import example
from tests.harness.waiting import wait_until

NAME = "spiffe://prod/chat/api"
VIA = f"peer_uid:{GATEWAY}"


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as made:
        yield made


@pytest.fixture
def caller(pair: Pair) -> Iterator[Caller]:
    with pair.gateway.caller(pair.client()) as made:
        yield made


def new_key(caller: Caller, purpose: str = "thread") -> str:
    answer = caller.post("/create_dek_for_thread", {"thread_id": "t-1", "purpose": purpose})
    return str(answer.body["key_id"])


def test_every_proxied_verb_is_answered_by_the_key_service(pair: Pair, caller: Caller) -> None:
    """In the name of the certificate, by way of the gateway."""
    key, other = new_key(caller), new_key(caller)
    others = {api.GENERATE_DATA_KEY: new_key(caller, "data"), api.MAC: new_key(caller, "mac")}
    plaintext = base64.b64encode(b"hello").decode()
    sealed = caller.post("/encrypt", {"key_id": key, "plaintext": plaintext}).body["ciphertext"]
    members: dict[Verb[Any, Any], dict[str, object]] = {
        api.CREATE_DEK: {"thread_id": "t-1"},
        api.GET_OR_CREATE_DEK: {"thread_id": "t-2"},
        api.DECRYPT: {"ciphertext": sealed},
        api.DECRYPT_BATCH: {"items": [{"key_id": key, "ciphertext": sealed}]},
        api.REENCRYPT_BATCH: {"to_key_id": other, "items": [{"ciphertext": sealed}]},
        api.CHECK_BATCH: {"items": [{"ciphertext": sealed}]},
        api.LIST_KEYS: {"thread_id": "t-1", "limit": 2},
    }
    proxied = [verb for verb in api.VERBS if verb.proxied]
    lines = len(pair.audited())
    answers: dict[str, Reply] = {}
    for verb in sorted(proxied, key=lambda verb: verb is api.RETIRE_KEY):  # the key is needed until then
        call = make_call(verb, example(verb, others.get(verb, key), **members.get(verb, {})))
        answers[verb.name] = caller.ask(verb.method, call.target.decode(), call.body)
    assert {name: answer.status for name, answer in answers.items()} == dict.fromkeys(answers, 200)
    assert answers["decrypt"].body == {"plaintext": plaintext}
    assert len(answers["list_keys"].body["keys"]) == 2
    asked = answers.keys()
    assert all(pair.gateway.metric("requests_total", verb=name) >= 1 for name in asked)
    events = [event for event in pair.audited()[lines:] if event["type"] in asked]
    by = {(event["actor"], event.get("facts", {}).get("via")) for event in events}
    assert by == {(NAME, VIA)}


def test_a_batch_in_messagepack_is_answered_in_messagepack(caller: Caller) -> None:
    body = msgspec.msgpack.encode([[[new_key(caller), b"hello"]]])
    answer = caller.ask("POST", "/encrypt_batch", body, headers=(f"Content-Type: {api.MSGPACK}",))
    assert (answer.status, answer.headers["content-type"]) == (200, api.MSGPACK)
    [[sealed]] = msgspec.msgpack.decode(answer.body)
    assert len(sealed) == len(b"hello") + api.SEAL_BYTES


def test_a_body_of_the_largest_size_goes_both_ways(caller: Caller) -> None:
    plaintext = base64.b64encode(os.urandom(api.PLAINTEXT_BYTES_MAX)).decode()
    key = new_key(caller)
    sealed = caller.post("/encrypt", {"key_id": key, "plaintext": plaintext})
    opened = caller.post("/decrypt", {"key_id": key, "ciphertext": sealed.body["ciphertext"]})
    assert opened.body["plaintext"] == plaintext


def test_a_chunked_request_is_sent_on_whole(caller: Caller) -> None:
    body = json.dumps({"count": 3}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    caller.sock.sendall(b"POST /random HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert len(base64.b64decode(caller.receive().body["random"])) == 3


def test_request_ids_reach_the_audit_log_and_come_back(pair: Pair, caller: Caller) -> None:
    answer = caller.ask("POST", "/random", {"count": 1}, headers=("X-Request-ID: trace-1",))
    assert answer.headers["x-request-id"] == "trace-1"
    assert pair.audited()[-1]["request_id"] == "trace-1"


def test_refusals_of_the_key_service_come_through_unchanged(pair: Pair, caller: Caller) -> None:
    unknown = "k_00000000000000000000000000"
    answers: list[Reply] = [
        caller.get(f"/keys/{unknown}"),
        caller.post("/encrypt", {"key_id": unknown, "plaintext": ""}),
        caller.post("/encrypt", {"key_id": 1}),
        caller.post("/random", {"count": api.RANDOM_BYTES_MAX + 1}),
    ]
    own = pair.daemon.caller()
    direct = [
        own.get(f"/keys/{unknown}"),
        own.post("/encrypt", {"key_id": unknown, "plaintext": ""}),
        own.post("/encrypt", {"key_id": 1}),
        own.post("/random", {"count": api.RANDOM_BYTES_MAX + 1}),
    ]
    assert [(one.status, one.body) for one in answers] == [(one.status, one.body) for one in direct]


def test_a_name_without_a_grant_gets_403_and_a_line_in_the_audit_log(pair: Pair) -> None:
    with pair.gateway.caller(pair.gateway.authority.issue(dns=["nobody.chat.internal"])) as caller:
        assert (caller.get("/status").status, caller.get("/health").status) == (403, 200)
    wait_until(lambda: any(event["type"] == "refused" and event["actor"] == VIA for event in pair.audited()))


@pytest.mark.parametrize("verb", [verb for verb in api.VERBS if not verb.proxied], ids=lambda verb: verb.name)
def test_any_other_verb_is_403_without_a_request_to_the_key_service(pair: Pair, caller: Caller, verb: Any) -> None:
    lines, before = len(pair.audited()), pair.gateway.refused("verb")
    target = re.sub(r"\{.*?\}", "k_00000000000000000000000000", verb.path)
    answer = caller.ask(verb.method, target, {} if verb.method == "POST" else None)
    assert (answer.status, answer.code) == (403, "forbidden")
    assert (len(pair.audited()), pair.gateway.refused("verb")) == (lines, before + 1)


def test_other_paths_and_methods_are_answered_by_the_gateway(pair: Pair, caller: Caller) -> None:
    lines = len(pair.audited())
    assert (caller.get("/nothing").status, caller.get("/keys/a/b/c").status) == (404, 404)
    for target, allowed in (("/encrypt", "POST"), ("/ready", "GET")):
        answer = caller.ask("PUT", target, headers=("Content-Length: 0",))
        assert (answer.status, answer.headers["allow"]) == (405, allowed)
    assert len(pair.audited()) == lines


@pytest.mark.parametrize("header", ["X-MiniKMS-Principal: spiffe://prod/x", "x-minikms-principal:", "X-MiniKMS-X: 1"])
def test_headers_of_proxies_are_refused_from_the_network(pair: Pair, caller: Caller, header: str) -> None:
    lines, before = len(pair.audited()), pair.gateway.refused("reserved_header")
    assert caller.ask("GET", "/status", headers=(header,)).status == 403
    assert (len(pair.audited()), pair.gateway.refused("reserved_header")) == (lines, before + 1)


def test_the_gateway_is_hardened_and_opens_no_network_socket(pair: Pair) -> None:
    """Without an issuer whose keys are fetched."""
    assert pair.gateway.process is not None
    status = Path(f"/proc/{pair.gateway.process.pid}/status").read_text()
    for wanted in (rf"Uid:\t{GATEWAY}\t{GATEWAY}\t", "NoNewPrivs:\t1", "Seccomp:\t2", "CapEff:\t0{16}"):
        assert re.search(wanted, status), (wanted, status)
    log = pair.gateway.log.read_text()
    assert re.findall(r'"hardening measure not in force".*?measure=(\w+)', log) in ([], ["memory_locked"])


def test_a_key_service_that_is_away_is_503_and_comes_back(pair: Pair, caller: Caller) -> None:
    pair.daemon.stop()
    try:
        answer = caller.post("/random", {"count": 1})
        assert (answer.status, answer.code) == (503, "shutting_down")
        assert pair.gateway.metric("kms_reachable") == 0
        assert caller.get("/health").status == 200
        wait_until(lambda: "can't be reached" in pair.gateway.log.read_text())
        assert "no key service answers at" in pair.gateway.log.read_text()
    finally:
        pair.daemon.start()
    assert caller.post("/random", {"count": 1}).status == 200
    assert pair.gateway.metric("kms_reachable") == 1
    wait_until(lambda: "reached again" in pair.gateway.log.read_text())


def test_check_config_reads_what_a_start_reads(pair: Pair) -> None:
    def check() -> subprocess.CompletedProcess[str]:
        words = ("minikms_gateway", "check-config", "--config", pair.gateway.config)
        return forked.run(*words, cwd="/", user=(GATEWAY, GATEWAY, ()))

    good = pair.gateway.config.read_text()
    checked = check()
    assert (checked.returncode, checked.stderr) == (0, "")
    try:
        for text, wanted in {
            good + "\n[extra]\n": "unknown field `extra`",
            good.replace('"server.key"', '"missing.key"'): "No such file",
            good.replace("version = 1", "version = 2"): "version",
            good.replace('"server.pem"', '"clients.pem"'): "is not the private key of the certificate",
            good.replace('"prod"', '"PROD"'): "trust_domains",
            good.replace(f'metrics = "127.0.0.1:{pair.gateway.metrics_port}"', 'metrics = "9103"'): "no address",
            good.replace('"server.key"', '"server.\\u0000"'): "NUL",
            good.replace(str(pair.daemon.socket), ""): "kms_socket is a path of 1 to 107 bytes",
            good.replace(str(pair.daemon.socket), "/" + "s" * 200): "kms_socket is a path of 1 to 107 bytes",
            good.replace("kms_server_uids = [0]", "kms_server_uids = [-1]"): "kms_server_uids",
        }.items():
            pair.gateway.configure(text)
            checked = check()
            assert checked.returncode == 2 and wanted in checked.stderr, (wanted, checked.stderr)
    finally:
        pair.gateway.configure(good)


def test_a_private_key_that_others_read_is_refused(pair: Pair) -> None:
    (pair.gateway.directory / "server.key").chmod(0o644)
    try:
        done = subprocess.run(
            pair.gateway.command("check-config"), cwd="/", capture_output=True, text=True, check=False
        )
        assert done.returncode == 2 and "other users can read the private key" in done.stderr
    finally:
        (pair.gateway.directory / "server.key").chmod(0o640)


def test_a_new_certificate_of_the_gateway_is_taken_up(pair: Pair) -> None:
    """Open connections go on."""
    new = pair.gateway.authority.issue(dns=["gateway.internal"], extended=[])

    def shown() -> bytes | None:
        with pair.gateway.connect(pair.client()) as tls:
            return tls.getpeercert(binary_form=True)

    with pair.gateway.caller(pair.client()) as open_before:
        assert open_before.get("/ready").status == 200
        before = shown()
        pair.gateway.write("server.key", new.key, private=True)
        pair.gateway.write("server.pem", new.chain)
        wait_until(lambda: shown() != before)
        assert open_before.get("/ready").status == 200


def test_an_expired_certificate_does_not_replace_the_gateways_own(pair: Pair) -> None:
    """The gateway goes on with the one that it has."""
    expired = pair.gateway.authority.issue(dns=[HOST], ends=-datetime.timedelta(seconds=1))
    pair.gateway.write("server.key", expired.key, private=True)
    pair.gateway.write("server.pem", expired.chain)
    try:
        wait_until(lambda: pair.gateway.metric("reload_failed") == 1)
        assert re.search('level=error event="certificate not taken up" .*has expired', pair.gateway.log.read_text())
        assert pair.gateway.metric("certificate_expiry_timestamp_seconds") > time.time()
        with pair.gateway.caller(pair.client()) as caller:
            assert caller.get("/ready").status == 200
        command = pair.gateway.command("check-config")
        checked = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
        assert checked.returncode == 2 and "server.pem has expired" in checked.stderr
    finally:
        pair.gateway.write("server.key", pair.gateway.own.key, private=True)
        pair.gateway.write("server.pem", pair.gateway.own.chain)
        wait_until(lambda: pair.gateway.metric("reload_failed") == 0)


def test_a_stop_answers_what_has_begun_and_closes_the_rest() -> None:
    with Pair() as pair, pair.gateway.caller(pair.client()) as idle, pair.gateway.caller(pair.client()) as caller:
        assert idle.get("/ready").status == 200
        body = b'{"count":4096}'
        head = b"POST /random HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        caller.sock.sendall(head % len(body))
        assert caller.sock.recv(100).startswith(b"HTTP/1.1 100 ")
        assert pair.gateway.process is not None
        pair.gateway.process.terminate()
        assert idle.sock.recv(1) == b""
        caller.sock.sendall(body)
        answer = caller.receive()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert pair.gateway.process.wait(60) == 0
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", pair.gateway.port), 1):
        pass
