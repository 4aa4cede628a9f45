"""hmac and verify of the transit API through a real gateway and a real daemon."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.gateways import Pair
from tests.minikms_gateway.transit.vault import LIMITED, Vault, errors, transit_pair

TEXT = base64.b64encode(b"ada@example.org").decode()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with transit_pair() as made:
        yield made


@pytest.fixture
def vault(pair: Pair) -> Iterator[Vault]:
    with pair.gateway.caller(pair.client()) as caller:
        yield Vault(caller)


@pytest.fixture
def name(vault: Vault) -> str:
    name = f"m-{uuid.uuid4()}"
    assert vault.post(f"keys/{name}", {"type": "hmac"})["supports_encryption"] is False
    return name


def results(vault: Vault, path: str, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = vault.post(path, {"batch_input": items})["batch_results"]
    return made


def test_a_mac_is_that_of_the_native_verb_bound_to_the_name(pair: Pair, vault: Vault, name: str) -> None:
    """By docs/spec/transit.md."""
    own = pair.daemon.caller()
    [key] = own.get(f"/keys?thread_id=transit.{name}").body["keys"]
    assert key["purpose"] == "mac"
    aad = b"minikms/transit/mac/v1\0" + len(name).to_bytes(4, "big") + name.encode()
    item = {"plaintext": TEXT, "aad": base64.b64encode(aad).decode()}
    [mac] = own.post("/mac", {"key_id": key["key_id"], "items": [item]}).body["macs"]
    for path in (f"hmac/{name}", f"hmac/{name}/sha2-256"):
        assert vault.post(path, {"input": TEXT}) == {"hmac": f"vault:v1:{mac}"}


def test_a_batch_answers_for_each_item_in_order(vault: Vault, name: str) -> None:
    made = results(vault, f"hmac/{name}", [{"input": TEXT, "reference": "a"}, {}, {"input": "%"}, {"input": ""}])
    assert [list(each) for each in made] == [
        ["hmac", "reference"],
        *[["error", "reference"]] * 2,
        ["hmac", "reference"],
    ]
    vault.post(f"keys/{name}/rotate")
    old, new = made[0]["hmac"], vault.post(f"hmac/{name}", {"input": TEXT})["hmac"]
    assert (old[:9], new[:9]) == ("vault:v1:", "vault:v2:")
    claims = {
        old: True,
        new: True,
        old.replace("v1", "v2"): False,
        made[3]["hmac"]: False,
        old[:-4]: False,
        "vault:v2:": False,
        f"vault:v2:{old[9:]}{old[9:]}": "illegal base64 data",
        "vault:v2:" + base64.b64encode(bytes(64)).decode(): False,
        old.replace("v1", "v3"): "invalid HMAC: version is too new",
        old.replace("v1", "v0"): "cannot verify HMAC: version is too old (disallowed by policy)",
        "x": "invalid HMAC: no prefix",
        "": "missing HMAC to verify",
    }
    verdicts = results(vault, f"verify/{name}", [{"input": TEXT, "hmac": mac} for mac in claims])
    assert [each.get("valid", each.get("error")) for each in verdicts] == list(claims.values())


def test_an_item_costs_one_mac_whatever_it_claims(pair: Pair, vault: Vault, name: str) -> None:
    mac = vault.post(f"hmac/{name}", {"input": TEXT})["hmac"]
    for claim in (mac, mac.replace("v1", "v9"), mac.replace("v1", "v0"), "vault:v1:", "vault:v1:AAAA"):
        lines = len(pair.audited())
        vault.ask("POST", f"verify/{name}", {"input": TEXT, "hmac": claim})
        assert [line["count"] for line in pair.audited()[lines:] if line["type"] == "mac"] == [1], claim


def test_a_destroyed_version_is_too_old_and_a_rotation_elsewhere_counts(pair: Pair, vault: Vault, name: str) -> None:
    first = vault.post(f"hmac/{name}", {"input": TEXT})["hmac"]
    own = pair.daemon.caller()
    [key] = own.get(f"/keys?thread_id=transit.{name}").body["keys"]
    body = {"thread_id": f"transit.{name}", "purpose": "mac", "numbered": True, "replaces": key["key_id"]}
    assert own.post("/create_dek_for_thread", body).status == 200
    assert vault.post(f"hmac/{name}", {"input": TEXT})["hmac"].startswith("vault:v2:")
    assert vault.post(f"verify/{name}", {"input": TEXT, "hmac": first}) == {"valid": True}
    assert own.post(f"/keys/{key['key_id']}/destroy", {"key_id": key["key_id"]}).status == 200
    answer = vault.ask("POST", f"verify/{name}", {"input": TEXT, "hmac": first})
    assert errors(answer) == "cannot verify HMAC: version is too old (disallowed by policy)"


@pytest.mark.parametrize(("purpose", "kind"), [("mac", "hmac"), ("thread", "aes256-gcm96")])
def test_a_key_that_the_key_service_made_has_its_type_and_rotates(
    pair: Pair, vault: Vault, purpose: str, kind: str
) -> None:
    thread = f"transit.native-{purpose}"
    own = pair.daemon.caller()
    assert own.post("/create_dek_for_thread", {"thread_id": thread, "purpose": purpose, "numbered": True}).status == 200
    for method, path in (("GET", thread[8:]), ("POST", f"{thread[8:]}/rotate"), ("POST", f"{thread[8:]}/rotate")):
        answer = vault.ask(method, f"keys/{path}")
        assert (answer.status, answer.body["data"]["type"]) == (200, kind)
    assert answer.body["data"]["latest_version"] == 3


def test_guesses_are_bounded_by_the_limit_of_the_caller(pair: Pair, name: str) -> None:
    """`decrypts_per_hour` is 1: a MAC, and one to compare with, tell as much as a decryption."""
    with pair.gateway.caller(pair.client(uri=LIMITED)) as caller:
        limited = Vault(caller)
        mac = limited.post(f"hmac/{name}", {"input": TEXT})["hmac"]
        for body in ({"input": TEXT}, {"batch_input": [{"input": TEXT}]}):
            assert limited.ask("POST", f"hmac/{name}", body).status == 429
        assert limited.ask("POST", f"verify/{name}", {"input": TEXT, "hmac": mac}).status == 429
