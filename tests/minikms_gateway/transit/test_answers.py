"""Answers to requests read in the sources of OpenBao and of its clients: wrong requests, batches, recordings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.gateways import Pair
from tests.minikms_gateway.transit.recordings import (
    GO,
    RECORDINGS,
    SEAL_AFTER_A_ROTATION,
    SEAL_STARTS,
    SEAL_STARTS_AGAIN,
    Exchange,
)
from tests.minikms_gateway.transit.vault import ISSUER, Vault, errors, filled, transit_pair
from tests.minikms_gateway.transit.wrong_requests import AAD, CONTEXT, DERIVED, KEY, OTHER, WRONG, Wrong


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with transit_pair() as made:
        yield made


@pytest.fixture(scope="module")
def vault(pair: Pair) -> Iterator[Vault]:
    with pair.gateway.caller(pair.client()) as caller:
        yield Vault(caller)


@pytest.fixture(scope="module")
def ciphertexts(vault: Vault) -> dict[str, str]:
    vault.post(f"keys/{KEY}")
    vault.post(f"keys/{OTHER}")
    vault.post(f"keys/{DERIVED}", {"derived": True})
    vault.post("keys/macs", {"type": "hmac"})
    made = {"v1": vault.encrypt(KEY), "aad": vault.encrypt(KEY, associated_data=AAD), "other": vault.encrypt(OTHER)}
    vault.post(f"keys/{KEY}/rotate")
    record = made["v1"].removeprefix("vault:v1:")
    middle = len(record) // 2
    changed = record[:middle] + ("A" if record[middle] != "A" else "B") + record[middle + 1 :]
    return made | {
        "v2": vault.encrypt(KEY),
        "derived": vault.encrypt(DERIVED, context=CONTEXT),
        "changed": f"vault:v1:{changed}",
        "relabelled": f"vault:v2:{record}",
        "as v0": f"vault:v0:{record}",
    }


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.request} {wrong.body}")
def test_a_wrong_request_is_refused_like_openbao_refuses_it(
    vault: Vault, ciphertexts: dict[str, str], wrong: Wrong
) -> None:
    """By status and text; the table names the reason where they differ on purpose."""
    status, text = wrong.ours or wrong.bao
    method, _, path = wrong.request.rpartition(" ")
    answer = vault.ask(method or "POST", path, filled(wrong.body, ciphertexts))
    assert (answer.status, bool(wrong.ours)) == (status, bool(wrong.why)), answer
    assert re.fullmatch(re.escape(text).replace("…", ".*"), errors(answer)), answer


def test_a_failed_item_of_a_rewrap_makes_the_batch_400(vault: Vault, ciphertexts: dict[str, str]) -> None:
    """OpenBao answers 200 and so hides it; only its encrypt and decrypt answer 400 (batchRequestResponse)."""
    items = [{"ciphertext": ciphertexts[name], "reference": name} for name in ("v1", "changed", "v2")]
    answer = vault.ask("POST", f"rewrap/{KEY}", {"batch_input": items})
    results = answer.body["data"]["batch_results"]
    assert (answer.status, [result["reference"] for result in results]) == (400, ["v1", "changed", "v2"])
    assert [bool(result.get("ciphertext")) for result in results] == [True, False, True]


def replay(vault: Vault, headers: tuple[str, ...], exchanges: tuple[Exchange, ...], kept: dict[str, str]) -> None:
    for exchange in exchanges:
        answer = vault.ask(exchange.method, f"/v1/{exchange.path}", filled(exchange.body, kept), headers)
        assert answer.status == exchange.status or (exchange.status, answer.status) == (200, 204), (exchange, answer)
        if exchange.status != 200:
            errors(answer)
            continue
        data = answer.body["data"] if exchange.takes else {}
        for name, wanted in exchange.takes.items():
            assert meets(data[name], wanted), (exchange, name, data[name])
        if exchange.keep:
            kept[exchange.keep] = data["hmac" if "hmac" in data else "ciphertext"]


def meets(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, type):
        return type(value) is wanted  # JSON true is no number
    if isinstance(wanted, str):
        return isinstance(value, str) and re.fullmatch(wanted, value) is not None
    return type(value) is type(wanted) and bool(value == wanted)


@pytest.mark.parametrize("client", RECORDINGS)
def test_a_recorded_client_gets_what_it_asserts(pair: Pair, client: str) -> None:
    recording = RECORDINGS[client]
    token = {"token": ISSUER.token(), "mtls": "mtls"}.get(recording.shows, "")
    with pair.gateway.caller(None if recording.shows in ("token", "login") else pair.client()) as caller:
        if recording.shows == "login":  # a Kubernetes client writes {role, jwt} to the path that its operator chose
            login = {"jwt": ISSUER.token(), "role": "flux-system_decryptor"}
            answer = Vault(caller).ask("PUT", "/v1/auth/kubernetes/login", login, recording.headers)
            token = answer.body["auth"]["client_token"]
        replay(Vault(caller, token), recording.headers, recording.exchanges, {})


def test_openbaos_seal_starts_restarts_and_follows_a_rotation(pair: Pair) -> None:
    """The key service restarts too. After a rotation the seal decrypts by the old key and encrypts by the new one."""
    kept: dict[str, str] = {}
    with pair.gateway.caller(pair.client()) as caller:
        replay(Vault(caller, "mtls"), GO, SEAL_STARTS, kept)
    pair.daemon.stop()
    pair.daemon.start()
    with pair.gateway.caller(pair.client()) as caller:
        replay(Vault(caller, "mtls"), GO, SEAL_STARTS_AGAIN + SEAL_AFTER_A_ROTATION, kept)
