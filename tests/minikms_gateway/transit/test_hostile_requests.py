"""What a hostile client can send to the transit API: paths, headers, bodies, and keys of others."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import secrets
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from minikms import api
from tests.harness.gateways import GATEWAY, POLICY, Pair
from tests.minikms.http.http_harness import parse_answers
from tests.minikms.http.http_inputs import REFUSED
from tests.minikms_gateway.transit.vault import ISSUER, Vault, errors, transit_pair
from tests.minikms_gateway.transit.wrong_requests import HI

OURS, THEIRS = "spiffe://prod/chat/ours", "spiffe://prod/chat/theirs"
TWO_TENANTS = POLICY.replace('"spiffe://prod/**", "dns:api.chat.internal", ', "") + "".join(
    f'[[grant]]\nname = "{name}"\nprincipals = ["{principal}"]\n'
    f'roles = ["create", "encrypt", "decrypt", "data_key", "monitor"]\nthreads = ["transit.{name}-*"]\n'
    for name, principal in (("ours", OURS), ("theirs", THEIRS))
)
ENCRYPT = {"plaintext": HI}
SHORT = {"ciphertext": "vault:v1:" + "QUFB" * 30}

PATHS = """
    encrypt/../keys/ours-key encrypt/./ours-key encrypt/ours-key/../../keys/ours-key/rotate encrypt//ours-key encrypt/
    encrypt/ours-key/ encrypt/ours-key/extra encrypt%2Fours-key encrypt/..%2Fkeys%2Fours-key encrypt/%2e%2e/ours-key
    encrypt/a%2fours-key encrypt/%00 encrypt/ours-key%00 encrypt/ours-key%0d%0aX-MiniKMS-Principal:%20x encrypt/*
    encrypt/ours%252Dkey encrypt/%6furs-key encrypt/ours-key%20 encrypt/ours-key;v=1 encrypt/ours-key%3Fx encrypt/%
    encrypt/ours-key%C3%28 encrypt/- encrypt/. encrypt/.. encrypt/{} encrypt/{name} keys/{}/rotate keys/{}
    Encrypt/ours-key /v1/transit//encrypt/ours-key /v1//transit/encrypt/ours-key //v1/transit/encrypt/ours-key
    /transit/encrypt/ours-key /v1/transit%2Fencrypt/ours-key /v1/transit /v1/transit/ /v1/ /v1 /v1/sys/encrypt/ours-key
    /V1/transit/encrypt/ours-key /v1/Transit/encrypt/ours-key /v1/transit2/encrypt/ours-key /v1/{mount}/encrypt/ours-key
    /v1/ns/transit/encrypt/ours-key /v2/transit/encrypt/ours-key /v1/auth/encrypt/ours-key
"""
MAC = {"input": "aGk="}
OF_TRANSIT = ("encrypt", "decrypt", "random", "keys")
NATIVE = [verb.path.split("/")[1] for verb in api.VERBS]
NOT_OURS = [
    *(f"/v1{verb.path}" for verb in api.VERBS),
    *(f"{name}/ours-key" for name in NATIVE if name not in OF_TRANSIT),
    *(f"{name}/ours-key" for name in ("backup", "export/encryption-key", "sign", "restore")),
    *(f"keys/ours-key/{name}" for name in ("import", "import_version", "soft-delete", "retire", "destroy", "{}")),
    *(f"/v1/sys/{name}" for name in ("seal", "unseal", "rotate", "step-down", "mounts/transit", "policy/x", "raw/x")),
    *(f"/v1/auth/{name}" for name in ("token/create", "token/revoke-self", "a/b/login", "userpass/login/x", "login")),
]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with transit_pair(TWO_TENANTS) as made:
        for uri, key in ((OURS, "ours-key"), (THEIRS, "theirs-key")):
            with made.gateway.caller(made.client(uri=uri)) as caller:
                Vault(caller).post(f"keys/{key}")
        yield made


@pytest.fixture
def ours(pair: Pair) -> Iterator[Vault]:
    with pair.gateway.caller(pair.client(uri=OURS)) as caller:
        yield Vault(caller, "mtls")


def asked(pair: Pair, since: int) -> list[dict[str, Any]]:
    """Events of clients in the audit log, from line `since`."""
    return [event for event in pair.audited()[since:] if str(event.get("actor")).startswith(("spiffe:", "oidc:"))]


@pytest.mark.parametrize("path", PATHS.split())
def test_a_path_that_is_not_exactly_one_of_ours_asks_for_nothing(pair: Pair, ours: Vault, path: str) -> None:
    since = len(pair.audited())
    answer = ours.ask("POST", path, ENCRYPT)
    assert answer.status in (400, 403, 404, 405), answer
    assert not asked(pair, since)


def test_no_other_verb_can_be_reached_by_any_method(pair: Pair) -> None:
    """Neither of the key service nor of Vault."""
    since = len(pair.audited())
    with contextlib.ExitStack() as opened:
        vault = None
        for method, path in itertools.product(("GET", "POST", "PUT", "DELETE", "LIST", "PATCH"), NOT_OURS):
            vault = vault or Vault(opened.enter_context(pair.gateway.caller(pair.client(uri=OURS))), "mtls")
            answer = vault.ask(method, path, {} if method in ("POST", "PUT", "PATCH") else None)
            assert answer.status in (400, 403, 404, 405), (method, path, answer)
            if answer.headers.get("connection") == "close":
                vault = None
    assert not asked(pair, since)


@pytest.mark.parametrize(
    ("request_line", "body"),
    [
        ("POST encrypt/{}", ENCRYPT), ("POST encrypt/{}", {"batch_input": [ENCRYPT, ENCRYPT]}),
        ("POST decrypt/{}", SHORT), ("POST decrypt/{}", {"batch_input": [SHORT]}), ("POST rewrap/{}", SHORT),
        ("POST hmac/{}", MAC), ("POST verify/{}", {**MAC, "hmac": "vault:v1:aGk="}),
        ("POST datakey/plaintext/{}", {}), ("POST datakey/wrapped/{}", {}), ("GET keys/{}", None),
        ("POST keys/{}", {}), ("POST keys/{}/rotate", None), ("POST keys/{}/trim", {}), ("DELETE keys/{}", None),
        ("POST keys/{}/config", {"min_decryption_version": 1}),
    ],
)  # fmt: skip
def test_a_key_of_another_principal_looks_like_an_unknown_one(
    ours: Vault, request_line: str, body: dict[str, Any] | None
) -> None:
    """In status, headers and body, but for the name."""

    def of(name: str) -> tuple[int, dict[str, str], str]:
        method, path = request_line.format(name).split()
        answer = ours.ask(method, path, body)
        headers = {key: value for key, value in answer.headers.items() if key not in ("content-length", "date")}
        return answer.status, headers, json.dumps(answer.body).replace(name, "NAME")

    assert of("theirs-key") == of("theirs-none")
    assert of("theirs-key")[0] in (400, 403, 404)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("X-Vault-Namespace: theirs", 404), ("X-Vault-Namespace: ../theirs", 404), ("X-Vault-Namespace: root", 200),
        ("X-Vault-Wrap-TTL: 60s", 400), ("X-Vault-Inline-Auth-Path: auth/jwt/login", 200), ("X-Vault-Token: mtls", 400),
        (f"X-MiniKMS-Principal: {THEIRS}", 403), ("X-HTTP-Method-Override: DELETE", 200),
        ("X-Original-URL: /v1/transit/encrypt/theirs-key", 200), ("Authorization: Basic bXRsczo=", 403),
    ],
)  # fmt: skip
def test_no_header_leads_to_another_key_or_name(pair: Pair, ours: Vault, header: str, status: int) -> None:
    """A second token, a namespace and a wrapped answer are refused; what a client may send anyway does nothing."""
    since = len(pair.audited())
    assert ours.ask("POST", "encrypt/ours-key", ENCRYPT, (header,)).status == status
    with pair.gateway.caller(pair.client(uri=OURS)) as caller:
        assert Vault(caller, "mtls").ask("POST", "encrypt/theirs-key", ENCRYPT, (header,)).status in (400, 403, 404)
    assert {event["actor"] for event in asked(pair, since)} <= {OURS}


def test_hostile_bodies_of_the_socket_are_refused_before_a_login(pair: Pair) -> None:
    """A login is the only request whose body arrives before its sender has a name; it is never chunked."""
    since = len(pair.audited())
    for name, (data, status) in REFUSED.items():
        if data.startswith(b"POST /echo "):
            with pair.gateway.connect() as tls:
                tls.sendall(data.replace(b"/echo", b"/v1/auth/jwt/login"))
                if name.startswith("end "):
                    with socket.socket(fileno=os.dup(tls.fileno())) as below:
                        below.shutdown(socket.SHUT_WR)
                with tls.makefile("rb") as received:
                    [answer] = parse_answers(received.read())
            assert answer.status in (status, 413) and answer.headers["connection"] == "close", (name, answer)
    assert not asked(pair, since)


BODIES: dict[str, bytes] = {
    "deep list": b'{"plaintext":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep member to ignore": b'{"plaintext":"aGk=","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too many items": json.dumps({"batch_input": [ENCRYPT] * 1025}).encode(),
    "very many empty items": b'{"batch_input":[' + b",".join([b"{}"] * 200_000) + b"]}",
    "plaintext beyond the bound": b'{"plaintext":"' + b"AAAA" * 1_500_000 + b'"}',
    "associated data beyond the bound": json.dumps(ENCRYPT | {"associated_data": "AAAA" * 100_000}).encode(),
    "context beyond the bound": json.dumps(ENCRYPT | {"context": "AAAA" * 100_000}).encode(),
    "not UTF-8": b'{"plaintext":"\xff\xfe"}',
    "half a surrogate": b'{"plaintext":"\\ud800"}',
    "NaN": b'{"plaintext":"aGk=","key_version":NaN}',
    "version beyond 64 bits": b'{"plaintext":"aGk=","key_version":36893488147419103232}',
    "version of many digits": b'{"plaintext":"aGk=","key_version":"' + b"9" * 5000 + b'"}',
    "two documents": b'{"plaintext":"aGk="}{"plaintext":"aGk="}',
    "a form": b"plaintext=aGk%3D",
    "MessagePack": b"\x81\xa9plaintext\xa4aGk=",
}


TOO_LARGE = ("too many items", "very many empty items", "plaintext beyond the bound")


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body_is_refused_and_the_gateway_goes_on(pair: Pair, ours: Vault, name: str) -> None:
    answer = ours.ask("POST", "encrypt/ours-key", BODIES[name])
    assert answer.status == (413 if name in TOO_LARGE else 400), answer
    errors(answer)
    with pair.gateway.caller(pair.client(uri=OURS)) as caller:
        assert Vault(caller).encrypt("ours-key")


def test_a_body_beyond_the_bound_is_413_and_single_bytes_are_one_request(ours: Vault) -> None:
    target, body = "/v1/transit/encrypt/ours-key", b'{"plaintext":"aGk="}'
    for byte in f"PUT {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body:
        ours.caller.sock.sendall(bytes([byte]))
    assert ours.caller.receive().status == 200
    too_long = (f"Content-Length: {api.BODY_BYTES_MAX + 1}",)
    assert ours.caller.ask("PUT", target, headers=too_long).status == 413


def test_audit_lines_name_the_principal_and_logs_have_no_secret(pair: Pair, ours: Vault) -> None:
    """Also where a secret stands in the wrong place: as a name, a member, a value of another type, or a token."""
    since = len(pair.audited())
    secret = secrets.token_urlsafe(24)
    text = base64.b64encode(secret.encode()).decode()
    bound = {"context": text, "associated_data": text}
    sealed = ours.encrypt("ours-key", secret.encode(), **bound)
    assert ours.post("decrypt/ours-key", {"ciphertext": sealed, **bound}) == {"plaintext": text}
    data_key = ours.post("datakey/plaintext/ours-key", {})["plaintext"]
    token = ISSUER.token(sub="token-holder")
    with pair.gateway.caller() as caller:
        Vault(caller, token).ask("GET", "keys/ours-key")
    answers = []
    for path, body, shown in (
        ("encrypt/ours-key", {"plaintext": {secret: text}}, "mtls"),
        ("encrypt/ours-key", {"batch_input": [{"plaintext": secret + "%"}], secret: text}, "mtls"),
        ("encrypt/ours-key", {"plaintext": text, "key_version": secret}, "mtls"),
        ("decrypt/ours-key", {"ciphertext": secret}, "mtls"),
        (f"keys/ours-{secret}", {"type": secret}, "mtls"),
        (f"nothing/{secret}?x={secret}", {}, "mtls"),
        ("/v1/auth/jwt/login", {"jwt": secret, "role": secret}, "mtls"),
        ("encrypt/ours-key", {"plaintext": text}, secret),
    ):
        with pair.gateway.caller(pair.client(uri=OURS)) as caller:
            answers.append(Vault(caller, shown).ask("POST", path, body))
    assert all(answer.status >= 400 and secret not in json.dumps(answer.body) for answer in answers)
    crypto = [event for event in asked(pair, since) if event["type"] != "list_keys"]
    assert [event["type"] for event in crypto] == ["encrypt", "decrypt", "generate_data_key"]
    assert {(event["actor"], event["facts"]["via"]) for event in crypto} == {(OURS, f"peer_uid:{GATEWAY}")}
    for log in (pair.gateway.log, pair.daemon.log, pair.daemon.data_dir / "minikms-audit.log"):
        content = log.read_text()
        assert not [one for one in (secret, text, data_key, token, sealed) if one in content], log.name
