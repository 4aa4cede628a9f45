"""hvac, unmodified, at a real gateway over TLS: with a client certificate, and with a token.

With the assertions of its tests/integration_tests/api/secrets_engines/test_transit.py that apply; its unit tests have
none of transit.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.harness.gateways import Pair
from tests.minikms_gateway.transit.vault import ISSUER, LIMITED, transit_pair

hvac = needs.library("hvac")

PLAINTEXT = base64.urlsafe_b64encode(b"hi itsame hvac").decode()
SHOWN = ("certificate", "token")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with transit_pair() as made:
        yield made


@pytest.fixture
def make(pair: Pair, tmp_path: Path) -> Iterator[Make]:
    """Makes a client that shows a certificate beside the token `mtls`, or a token of the issuer."""
    made = []

    def client(shows: str, *, uri: str = "spiffe://prod/chat/api", **how: Any) -> Any:
        cert = tuple(map(str, pair.client(uri=uri).write(tmp_path))) if shows == "certificate" else None
        token = how.pop("token", "mtls" if cert else ISSUER.token())
        url = f"https://localhost:{pair.gateway.port}"
        made.append(hvac.Client(url=url, token=token, cert=cert, verify=str(pair.gateway.ca_file), **how))
        return made[-1]

    yield client
    for one in made:
        one.adapter.close()


@pytest.fixture(params=SHOWN)
def client(make: Make, request: pytest.FixtureRequest) -> Any:
    return make(request.param)


@pytest.fixture
def key(client: Any, request: pytest.FixtureRequest) -> str:
    """A new key, made by the client."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name).strip("-")
    assert client.secrets.transit.create_key(name=name)
    return name


def test_hvacs_own_tests_of_keys_hold(client: Any, key: str) -> None:
    transit = client.secrets.transit
    assert transit.read_key(name=key)["data"]["name"] == key
    assert key in transit.list_keys()["data"]["keys"]
    assert transit.rotate_key(name=key)
    assert transit.create_key(name=key)  # it stays as it is
    read = transit.read_key(name=key)["data"]
    assert (read["latest_version"], sorted(read["keys"])) == (2, ["1", "2"])


def test_hvacs_own_tests_of_data_hold(client: Any, key: str) -> None:
    transit = client.secrets.transit
    sealed = transit.encrypt_data(name=key, plaintext=PLAINTEXT)["data"]["ciphertext"]
    assert transit.decrypt_data(name=key, ciphertext=sealed)["data"]["plaintext"] == PLAINTEXT
    transit.rotate_key(name=key)
    rewrapped = transit.rewrap_data(name=key, ciphertext=sealed)["data"]["ciphertext"]
    assert (sealed[:9], rewrapped[:9]) == ("vault:v1:", "vault:v2:")
    assert transit.decrypt_data(name=key, ciphertext=rewrapped)["data"]["plaintext"] == PLAINTEXT
    assert len(base64.b64decode(transit.generate_random_bytes(n_bytes=32)["data"]["random_bytes"])) == 32
    assert len(bytes.fromhex(transit.generate_random_bytes(output_format="hex")["data"]["random_bytes"])) == 32
    made = transit.generate_data_key(name=key, key_type="plaintext")["data"]
    assert len(base64.b64decode(made["plaintext"])) == 32
    assert transit.decrypt_data(name=key, ciphertext=made["ciphertext"])["data"]["plaintext"] == made["plaintext"]
    assert "plaintext" not in transit.generate_data_key(name=key, key_type="wrapped", bits=256)["data"]


def test_hvacs_batches_keep_their_order(client: Any, key: str) -> None:
    """hvac sends `"plaintext": null` beside them."""
    transit = client.secrets.transit
    texts = [base64.b64encode(b"%d" % number).decode() for number in range(128)]
    items = [{"plaintext": text, "reference": str(at)} for at, text in enumerate(texts)]
    sealed = transit.encrypt_data(name=key, batch_input=items)["data"]["batch_results"]
    assert [one["reference"] for one in sealed] == [str(at) for at in range(128)]
    transit.rotate_key(name=key)
    old = [{"ciphertext": one["ciphertext"]} for one in sealed]
    again = transit.rewrap_data(name=key, ciphertext=None, batch_input=old)["data"]["batch_results"]
    opened = transit.decrypt_data(name=key, batch_input=again)["data"]["batch_results"]
    assert [one["plaintext"] for one in opened] == texts


def test_hvac_needs_the_same_context_and_associated_data(client: Any, key: str) -> None:
    transit = client.secrets.transit
    transit.create_key(name=f"{key}-derived", derived=True)
    one, two = (base64.b64encode(text).decode() for text in (b"tenant 1", b"tenant 2"))
    how = {"name": f"{key}-derived", "context": one, "associated_data": two}
    sealed = transit.encrypt_data(plaintext=PLAINTEXT, **how)["data"]["ciphertext"]
    assert transit.decrypt_data(ciphertext=sealed, **how)["data"]["plaintext"] == PLAINTEXT
    for wrong in ({"context": two}, {"associated_data": one}, {"associated_data": None}, {"name": key}):
        with pytest.raises(hvac.exceptions.InvalidRequest):
            transit.decrypt_data(ciphertext=sealed, **(how | wrong))


def test_hvacs_own_tests_of_hmac_hold(client: Any, key: str) -> None:
    """A blind index: a MAC of each version verifies, under a name of the type hmac alone."""
    transit, name = client.secrets.transit, f"{key}-macs"
    made = client.write_data(f"transit/keys/{name}", data={"type": "hmac"})  # its create_key knows no such type
    assert made["data"]["type"] == "hmac"
    first = transit.generate_hmac(name=name, hash_input=PLAINTEXT, algorithm="sha2-256")["data"]["hmac"]
    assert first.startswith("vault:v1:") and len(base64.b64decode(first[9:])) == 32
    assert transit.generate_hmac(name=name, hash_input=PLAINTEXT)["data"]["hmac"] == first
    transit.rotate_key(name=name)
    second = transit.generate_hmac(name=name, hash_input=PLAINTEXT, key_version=2)["data"]["hmac"]
    assert second.startswith("vault:v2:") and second[9:] != first[9:]
    for mac in (first, second):
        right = transit.verify_signed_data(name=name, hash_input=PLAINTEXT, hmac=mac, hash_algorithm="sha2-256")
        assert right["data"]["valid"] is True
    for how in ({"hash_input": ""}, {"hmac": first.replace(":v1:", ":v2:")}):
        wrong = transit.verify_signed_data(**{"name": name, "hash_input": PLAINTEXT, "hmac": first, **how})
        assert wrong["data"]["valid"] is False
    calls: tuple[Make, ...] = (
        lambda: transit.encrypt_data(name=name, plaintext=PLAINTEXT),
        lambda: transit.decrypt_data(name=name, ciphertext=first),
        lambda: transit.generate_data_key(name=name, key_type="plaintext"),
        lambda: transit.generate_hmac(name=name, hash_input=PLAINTEXT, algorithm="sha2-512"),
        lambda: transit.generate_hmac(name=name, hash_input=PLAINTEXT, key_version=1),
        lambda: transit.verify_signed_data(name=name, hash_input=PLAINTEXT, signature=first),
        lambda: client.write_data(f"transit/keys/{name}-2", data={"type": "hmac", "derived": True}),
    )
    for call in calls:
        with pytest.raises(hvac.exceptions.InvalidRequest):
            call()


def test_what_is_not_offered_raises_what_hvac_means_by_it(client: Any, key: str) -> None:
    transit, raised = client.secrets.transit, hvac.exceptions
    calls = {
        lambda: transit.delete_key(name=key): raised.Forbidden,
        lambda: transit.trim_key(name=key, min_version=1): raised.Forbidden,
        lambda: transit.create_key(name="new", key_type="ed25519"): raised.InvalidRequest,
        lambda: transit.create_key(name="new", derived=True, convergent_encryption=True): raised.InvalidRequest,
        lambda: transit.export_key(name=key, key_type="encryption-key"): raised.InvalidPath,
        lambda: transit.generate_hmac(name=key, hash_input=PLAINTEXT): raised.InvalidRequest,
        lambda: transit.sign_data(name=key, hash_input=PLAINTEXT): raised.InvalidPath,
        lambda: transit.read_key(name="nothing"): raised.InvalidPath,
        client.auth.token.renew_self: raised.InvalidRequest,
        lambda: client.sys.enable_secrets_engine(backend_type="transit"): raised.InvalidPath,
    }
    for call, kind in calls.items():
        with pytest.raises(kind) as error:
            call()
        assert error.value.text.startswith('{"errors":')
    with pytest.raises(raised.InvalidRequest) as error:
        transit.encrypt_data(name="nothing", plaintext=PLAINTEXT)
    assert error.value.errors == ["encryption key not found"]


def test_hvac_knows_whether_it_is_authenticated(make: Make) -> None:
    for shows in SHOWN:
        client = make(shows)
        assert client.is_authenticated()
        data = client.auth.token.lookup_self()["data"]
        assert all(type(data[name]) is int for name in ("ttl", "creation_ttl"))
    for token in (ISSUER.token(exp=1, iat=0), "mtls", "nothing"):
        assert not make("token", token=token).is_authenticated()


def test_hvacs_jwt_login_gives_the_same_token(make: Make) -> None:
    client, token = make("token", token=""), ISSUER.token()
    answer = client.auth.jwt.jwt_login(role="any", jwt=token)
    assert (client.token, answer["auth"]["renewable"]) == (token, False)
    assert 0 < answer["auth"]["lease_duration"] <= 600
    assert client.is_authenticated()
    with pytest.raises((hvac.exceptions.Forbidden, hvac.exceptions.InvalidRequest)):
        client.auth.jwt.jwt_login(role="any", jwt=ISSUER.token(exp=1, iat=0))


def test_hvac_reads_health_seal_status_and_lists_without_the_verb_list(make: Make) -> None:
    client, strict = make("token"), make("certificate", strict_http=True)
    assert client.sys.read_health_status().status_code == 200
    health = client.sys.read_health_status(method="GET")
    assert (health["initialized"], health["sealed"], health["standby"]) == (True, False, False)
    assert client.sys.is_sealed() is False
    strict.secrets.transit.create_key(name="listed")
    assert "listed" in strict.secrets.transit.list_keys()["data"]["keys"]


def test_a_used_up_limit_is_a_rate_limit_of_the_principal(make: Make) -> None:
    limited, other = make("certificate", uri=LIMITED), make("token")
    other.secrets.transit.create_key(name="limited")
    sealed = limited.secrets.transit.encrypt_data(name="limited", plaintext=PLAINTEXT)["data"]["ciphertext"]
    assert limited.secrets.transit.decrypt_data(name="limited", ciphertext=sealed)["data"]["plaintext"] == PLAINTEXT
    for how in ({"ciphertext": sealed}, {"batch_input": [{"ciphertext": sealed}]}):
        with pytest.raises(hvac.exceptions.RateLimitExceeded):
            limited.secrets.transit.decrypt_data(name="limited", **how)
    assert other.secrets.transit.decrypt_data(name="limited", ciphertext=sealed)["data"]["plaintext"] == PLAINTEXT


def test_a_sealed_key_service_is_vault_down(pair: Pair, make: Make) -> None:
    client = make("certificate")
    own = pair.daemon.caller()
    assert own.post("/seal", {}).status == 200
    try:
        with pytest.raises(hvac.exceptions.VaultDown):
            client.secrets.transit.encrypt_data(name="listed", plaintext=PLAINTEXT)
        assert client.sys.is_sealed() is True
        assert client.sys.read_health_status().status_code == 503
    finally:
        assert own.post("/unseal", {"from_source": True}).status == 200
