"""The transit API through a real gateway and a real daemon."""

from __future__ import annotations

import base64
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from minikms_gateway.transit.keyring import NAME_CHARS_MAX
from tests.harness.callers import Caller, Reply
from tests.harness.gateways import GATEWAY, POLICY, Pair
from tests.harness.tokens import OIDC_TABLE, TokenIssuer

NAME = "spiffe://prod/chat/api"
OTHER = "spiffe://prod/narrow/api"
NARROW = f"""
[[grant]]
name = "narrow"
principals = ["{OTHER}"]
roles = ["create", "encrypt", "decrypt", "data_key", "monitor"]
threads = ["transit.own-*"]
"""
ISSUER = TokenIssuer()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


TEXT = b64(b"hello")


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    policy = NARROW + POLICY.replace('"spiffe://prod/**", "dns:api', '"spiffe://prod/chat/*", "dns:api')
    with Pair(policy=policy, tables=f"{OIDC_TABLE}[transit]\n", files={"oidc.json": ISSUER.jwks}) as made:
        yield made


@pytest.fixture
def caller(pair: Pair) -> Iterator[Caller]:
    with pair.gateway.caller(pair.client()) as made:
        yield made


def write(caller: Caller, path: str, body: object = None, *headers: str) -> Reply:
    return caller.ask("POST", f"/v1/transit/{path}", body, headers=headers)


def done(caller: Caller, path: str, body: object = None) -> Any:
    answer = write(caller, path, body)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json"), answer
    return answer.body["data"]


def refused(answer: Reply) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/json"
    [text] = answer.body["errors"]
    return answer.status, text


def test_what_was_encrypted_is_decrypted_by_the_principal_itself(pair: Pair, caller: Caller) -> None:
    done(caller, "keys/k-1")
    sealed = done(caller, "encrypt/k-1", {"plaintext": TEXT})
    assert (sealed["key_version"], sealed["ciphertext"][:9]) == (1, "vault:v1:")
    lines = len(pair.audited())
    assert done(caller, "decrypt/k-1", {"ciphertext": sealed["ciphertext"]}) == {"plaintext": TEXT}
    [line] = pair.audited()[lines:]
    assert (line["type"], line["actor"], line["facts"]["via"]) == ("decrypt", NAME, f"peer_uid:{GATEWAY}")


def test_context_and_associated_data_bind_a_record(caller: Caller) -> None:
    done(caller, "keys/k-2")
    bound = {"context": b64(b"ab"), "associated_data": b64(b"c")}
    sealed = done(caller, "encrypt/k-2", {"plaintext": TEXT, **bound})["ciphertext"]
    assert done(caller, "decrypt/k-2", {"ciphertext": sealed, **bound}) == {"plaintext": TEXT}
    for other in ({}, {"context": b64(b"a"), "associated_data": b64(b"bc")}, {"context": b64(b"abc")}):
        answer = write(caller, "decrypt/k-2", {"ciphertext": sealed, **other})
        assert refused(answer) == (400, "cipher: message authentication failed")
    moved = done(caller, "rewrap/k-2", {"ciphertext": sealed, **bound})["ciphertext"]
    assert moved != sealed
    assert done(caller, "decrypt/k-2", {"ciphertext": moved, **bound}) == {"plaintext": TEXT}


def test_a_derived_key_needs_a_context_in_each_request(caller: Caller) -> None:
    assert done(caller, "keys/k-3", {"derived": True})["derived"] is True
    status, text = refused(write(caller, "encrypt/k-3", {"plaintext": TEXT}))
    assert status == 400 and text.startswith("missing 'context' for key derivation")
    sealed = done(caller, "encrypt/k-3", {"plaintext": TEXT, "context": b64(b"x")})["ciphertext"]
    assert done(caller, "keys/k-3/rotate")["derived"] is True
    assert done(caller, "decrypt/k-3", {"ciphertext": sealed, "context": b64(b"x")}) == {"plaintext": TEXT}
    assert write(caller, "datakey/plaintext/k-3", {}).status == 400
    assert len(base64.b64decode(done(caller, "datakey/plaintext/k-3", {"context": b64(b"x")})["plaintext"])) == 32


def test_a_rotation_makes_the_next_version_and_a_rewrap_moves_to_it(pair: Pair, caller: Caller) -> None:
    done(caller, "keys/k-4")
    old = done(caller, "encrypt/k-4", {"plaintext": TEXT})["ciphertext"]
    key = done(caller, "keys/k-4/rotate")
    assert (key["latest_version"], sorted(key["keys"])) == (2, ["1", "2"])
    assert abs(key["keys"]["2"] - time.time()) < 600
    lines = len(pair.audited())
    new = done(caller, "rewrap/k-4", {"ciphertext": old})
    assert (new["key_version"], new["ciphertext"][:9]) == (2, "vault:v2:")
    assert [line["type"] for line in pair.audited()[lines:]] == ["reencrypt_batch"]
    for ciphertext in (old, new["ciphertext"]):
        assert done(caller, "decrypt/k-4", {"ciphertext": ciphertext}) == {"plaintext": TEXT}
    swapped = old.replace(":v1:", ":v2:")
    assert refused(write(caller, "decrypt/k-4", {"ciphertext": swapped}))[1] == "cipher: message authentication failed"


def test_a_gateway_that_missed_a_rotation_encrypts_with_the_new_version(pair: Pair, caller: Caller) -> None:
    """It was made at the key service, which the gateway does not hear of."""
    done(caller, "keys/k-5")
    done(caller, "encrypt/k-5", {"plaintext": TEXT})
    own = pair.daemon.caller()
    [first] = own.get("/keys?thread_id=transit.k-5").body["keys"]
    body = {"thread_id": "transit.k-5", "purpose": "data", "numbered": True, "replaces": first["key_id"]}
    assert own.post("/create_dek_for_thread", body).status == 200
    batch = {"batch_input": [{"plaintext": TEXT}]}
    assert done(caller, "encrypt/k-5", batch)["batch_results"][0]["key_version"] == 2
    assert done(caller, "encrypt/k-5", {"plaintext": TEXT})["key_version"] == 2


def test_rotations_at_once_make_versions_with_numbers_of_their_own(pair: Pair, caller: Caller) -> None:
    done(caller, "keys/k-6")
    with contextlib.ExitStack() as opened, ThreadPoolExecutor(4) as pool:
        callers = [opened.enter_context(pair.gateway.caller(pair.client())) for _ in range(4)]
        assert {answer.status for answer in pool.map(lambda one: write(one, "keys/k-6/rotate"), callers)} == {200}
    key = caller.get("/v1/transit/keys/k-6").body["data"]
    assert (key["latest_version"], sorted(key["keys"])) == (5, ["1", "2", "3", "4", "5"])


def test_a_batch_has_a_result_for_each_item_in_order(caller: Caller) -> None:
    done(caller, "keys/k-7")
    items = [{"plaintext": b64(b"%d" % number), "reference": f"r{number}"} for number in range(20)]
    sealed = done(caller, "encrypt/k-7", {"plaintext": None, "batch_input": items})["batch_results"]
    assert [one["reference"] for one in sealed] == [one["reference"] for one in items]
    done(caller, "keys/k-7/rotate")
    for path in ("decrypt/k-7", "rewrap/k-7"):
        wanted = [{"ciphertext": one["ciphertext"], "reference": one["reference"]} for one in sealed]
        answer = done(caller, path, {"ciphertext": None, "batch_input": wanted})["batch_results"]
        assert [one["reference"] for one in answer] == [one["reference"] for one in items]
        if path.startswith("decrypt"):
            assert [one["plaintext"] for one in answer] == [one["plaintext"] for one in items]
        else:
            assert {one["key_version"] for one in answer} == {2}


def test_one_failed_item_makes_a_batch_400_or_what_was_asked_for(caller: Caller) -> None:
    done(caller, "keys/k-8")
    good = done(caller, "encrypt/k-8", {"plaintext": TEXT})["ciphertext"]
    items = [{"ciphertext": good}, {"ciphertext": good[:-4] + "AAA="}, {"ciphertext": "x"}]
    for asked, status in ((None, 400), (207, 207), ("202", 202), (204, 400), (99, 400), (600, 400)):
        answer = write(caller, "decrypt/k-8", {"batch_input": items, "partial_failure_response_code": asked})
        assert answer.status == status and "errors" not in answer.body
        assert answer.body["data"]["batch_results"] == [
            {"plaintext": TEXT, "reference": ""},
            {"plaintext": "", "error": "cipher: message authentication failed", "reference": ""},
            {"plaintext": "", "error": "invalid ciphertext: no prefix", "reference": ""},
        ]
    failed = {"batch_input": items[1:], "partial_failure_response_code": 207}
    assert write(caller, "decrypt/k-8", failed).status == 400


def test_lists_and_reads_are_answered_for_both_kinds_of_clients(caller: Caller) -> None:
    done(caller, "keys/k-9")
    for method, target in (("LIST", "keys"), ("LIST", "keys/"), ("GET", "keys?list=true"), ("GET", "keys/?list=1")):
        answer = caller.ask(method, f"/v1/transit/{target}")
        assert answer.status == 200 and "k-9" in answer.body["data"]["keys"]
        assert answer.body["data"]["keys"] == sorted(answer.body["data"]["keys"])
    assert write(caller, "keys/k-9").body["warnings"] == ["key k-9 already existed"]
    unknown = caller.get("/v1/transit/keys/unknown")
    assert (unknown.status, unknown.body) == (404, {"errors": []})
    put = caller.ask("PUT", "/v1/transit/keys/k-9/rotate", headers=("Content-Length: 0",))
    assert put.body["data"]["latest_version"] == 2


def test_another_principals_key_is_answered_like_an_unknown_one(pair: Pair, caller: Caller) -> None:
    for name in ("secret", "own-1"):
        done(caller, f"keys/{name}")
    sealed = done(caller, "encrypt/secret", {"plaintext": TEXT})["ciphertext"]
    bodies = {
        "encrypt": {"plaintext": TEXT},
        "decrypt": {"ciphertext": sealed},
        "rewrap": {"ciphertext": sealed},
        "datakey/wrapped": {},
        "keys": {},
    }
    with pair.gateway.caller(pair.client(uri=OTHER)) as other:
        assert done(other, "encrypt/own-1", {"plaintext": TEXT})["key_version"] == 1
        for operation, body in bodies.items():
            answers = [write(other, f"{operation}/{name}", body) for name in ("secret", "unknown")]
            assert refused(answers[0]) == refused(answers[1]), operation
        assert other.get("/v1/transit/keys/secret").body == other.get("/v1/transit/keys/unknown").body
        assert other.ask("LIST", "/v1/transit/keys").body["data"]["keys"] == ["own-1"]
        for path in ("keys/secret/rotate", "keys/secret/config"):
            assert write(other, path).status == write(other, path.replace("secret", "unknown")).status == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("DELETE", "transit/keys/k-1", 403),
        ("POST", "transit/keys/k-1/trim", 403),
        ("GET", "transit/encrypt/k-1", 405),
        ("POST", "transit/encrypt/..", 404),
        ("POST", "transit/encrypt//k-1", 404),
        ("POST", "transit//encrypt/k-1", 404),
        ("POST", "transit/encrypt%2Fk-1", 404),
        ("POST", "transit/encrypt/k%2D1", 404),
        ("POST", "transit/encrypt/k-1/", 404),
        ("POST", "transit/encrypt/" + "k" * 121, 404),
        ("POST", "transit/export/k-1", 404),
        ("POST", "other/encrypt/k-1", 404),
        ("POST", "encrypt", 404),
    ],
)
def test_other_paths_reach_no_verb(pair: Pair, caller: Caller, method: str, path: str, status: int) -> None:
    lines = len(pair.audited())
    answer = caller.ask(method, f"/v1/{path}", headers=("Content-Length: 0",) if method == "DELETE" else ())
    assert refused(answer)[0] == status
    assert len(pair.audited()) == lines


def test_namespaces_and_wrapped_answers_are_refused(caller: Caller) -> None:
    assert write(caller, "random", None, "X-Vault-Namespace: team").status == 404
    assert write(caller, "random", None, "X-Vault-Wrap-TTL: 60").status == 400
    assert write(caller, "random", None, "X-Vault-Namespace: root/", "X-Vault-Request: true").status == 200


def test_random_bytes_have_the_form_that_was_asked_for(caller: Caller) -> None:
    assert len(base64.b64decode(done(caller, "random")["random_bytes"])) == 32
    assert len(bytes.fromhex(done(caller, "random/7", {"format": "hex"})["random_bytes"])) == 7
    assert len(base64.b64decode(done(caller, "random", {"bytes": "5"})["random_bytes"])) == 5


# --- who asks ----------------------------------------------------------------------------------------------------


def test_a_token_counts_in_either_header_and_a_login_answers_it(pair: Pair) -> None:
    token = ISSUER.token()
    for header in (f"X-Vault-Token: {token}", f"Authorization: Bearer {token}"):
        with pair.gateway.caller() as caller:
            found = caller.ask("GET", "/v1/auth/token/lookup-self", headers=(header,)).body["data"]
            assert found["display_name"] == "oidc:https://issuer.example|service-7"
            assert 0 < found["ttl"] <= found["creation_ttl"] == 600
    with pair.gateway.caller() as caller:
        auth = caller.post("/v1/auth/jwt/login", {"role": "any", "jwt": token}).body["auth"]
        assert auth["client_token"] == token and auth["renewable"] is False and 0 < auth["lease_duration"] <= 600
        renewed = caller.ask("POST", "/v1/auth/token/renew-self", {}, headers=(f"X-Vault-Token: {token}",))
        assert refused(renewed) == (400, "lease is not renewable")
    assert token not in pair.gateway.log.read_text()


def test_a_certificate_counts_without_a_token_and_beside_mtls(pair: Pair) -> None:
    for headers in ((), ("X-Vault-Token: mtls",), ("X-Vault-Token:",)):
        with pair.gateway.caller(pair.client()) as caller:
            found = caller.ask("GET", "/v1/auth/token/lookup-self", headers=headers).body["data"]
            assert found["display_name"] == NAME


def test_nobody_is_known_by_less_and_two_tokens_are_none(pair: Pair) -> None:
    token = ISSUER.token()
    for headers in ((), ("X-Vault-Token: mtls",), (f"X-Vault-Token: {token}x",), (f"X-Vault-Token: {NAME}",)):
        with pair.gateway.caller() as caller:
            answer = caller.ask("GET", "/v1/sys/health", headers=headers)
            assert refused(answer) == (403, "permission denied") and answer.headers["connection"] == "close"
    with pair.gateway.caller(pair.client()) as caller:  # a token that is not bound to the certificate
        assert caller.ask("GET", "/v1/sys/health", headers=(f"X-Vault-Token: {token}",)).status == 403
    with pair.gateway.caller() as caller:
        both = (f"X-Vault-Token: {token}", f"Authorization: Bearer {token}")
        assert caller.ask("GET", "/v1/sys/health", headers=both).status == 403


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"role_id": "x", "secret_id": "x"},
        {"jwt": "mtls"},
        {"jwt": "x.y.z"},
        {"jwt": "é.é.é"},
        {"jwt": "\ud800"},
        {"jwt": 5},
        {"jwt": "x" * 20_000},
    ],
)
def test_a_login_without_a_good_token_is_refused(pair: Pair, body: dict[str, object]) -> None:
    with pair.gateway.caller() as caller:
        answer = caller.post(f"/v1/auth/{'k' * NAME_CHARS_MAX}/login", body)
        assert answer.status in (400, 403, 413) and list(answer.body) == ["errors"]


def test_a_sealed_key_service_is_503_and_health_says_so(pair: Pair, caller: Caller) -> None:
    done(caller, "keys/k-10")
    own = pair.daemon.caller()
    assert caller.get("/v1/sys/seal-status").body["sealed"] is False
    assert own.post("/seal", {}).status == 200
    try:
        answer = write(caller, "encrypt/k-10", {"plaintext": TEXT})
        assert refused(answer) == (503, "Vault is sealed") and int(answer.headers["retry-after"]) > 0
        assert caller.get("/v1/sys/seal-status").body["sealed"] is True
        health = caller.get("/v1/sys/health")
        assert (health.status, health.body["sealed"]) == (503, True)
    finally:
        assert own.post("/unseal", {"from_source": True}).status == 200
    assert caller.get("/v1/sys/health").status == 200


def test_without_its_table_the_gateway_has_no_transit_api() -> None:
    with Pair() as plain, plain.gateway.caller(plain.client()) as caller:
        assert (caller.get("/v1/sys/health").status, caller.get("/v1/sys/health").code) == (404, "not_found")
