"""Which tokens prove an identity, at a real gateway with an OpenID issuer and an issuer of JWT-SVIDs."""

import hmac
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.harness.certificates import Issued
from tests.harness.gateways import Pair
from tests.harness.tokens import ISSUER, TokenIssuer, encoded
from tests.harness.waiting import wait_until

OIDC, SVID = TokenIssuer(), TokenIssuer(issuer="ignored", kid="svid-1")
TABLES = f"""
[[issuer]]
kind = "oidc"
issuer = "{ISSUER}"
audience = "minikms"
algorithms = ["ES256", "EdDSA", "RS256"]
jwks_file = "oidc.json"
[[issuer]]
kind = "jwt-svid"
trust_domain = "prod"
audience = "minikms"
algorithms = ["ES256"]
jwks_file = "svid.json"
"""


class TokenPair(Pair):
    def __init__(self) -> None:
        super().__init__(tables=TABLES, files={"oidc.json": OIDC.jwks, "svid.json": SVID.jwks})


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with TokenPair() as made:
        yield made


def asked(pair: Pair, token: str, shown: Issued | None = None) -> Any:
    with pair.gateway.caller(shown) as caller:
        return caller.ask("GET", "/status", headers=(f"Authorization: Bearer {token}",))


def test_an_openid_token_is_its_subject(pair: Pair) -> None:
    assert asked(pair, OIDC.token(sub="auth0|12")).status == 200
    escaped = f"oidc:{ISSUER}|auth0%7C12".replace("%", "%25")  # in the audit log
    assert pair.audited()[-1]["actor"] == escaped


def test_a_jwt_svid_is_its_spiffe_id(pair: Pair) -> None:
    assert asked(pair, SVID.token(sub="spiffe://prod/chat/job", without="iss", header={"typ": "JWT"})).status == 200
    assert pair.audited()[-1]["actor"] == "spiffe://prod/chat/job"


def test_a_token_that_is_bound_to_the_certificate_beside_it_is_accepted(pair: Pair) -> None:
    shown = pair.client()
    token = OIDC.token(cnf={"x5t#S256": encoded(shown.thumbprint)})
    assert asked(pair, token, shown).status == 200
    assert pair.audited()[-1]["actor"] == f"oidc:{ISSUER}|service-7"


def test_a_certificate_alone_is_its_own_name_where_there_are_issuers(pair: Pair) -> None:
    with pair.gateway.caller(pair.client()) as caller:
        assert caller.get("/status").status == 200
    assert pair.audited()[-1]["actor"] == "spiffe://prod/chat/api"


def _hs256_with_the_public_key() -> str:
    public = OIDC.key.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    text = OIDC.token(header={"alg": "HS256"}).rpartition(".")[0]
    return f"{text}.{encoded(hmac.digest(public, text.encode(), 'sha256'))}"


def _at(seconds: int) -> int:
    return int(time.time()) + seconds


REFUSED: dict[str, tuple[Callable[[], str], str]] = {
    "alg none": (lambda: OIDC.token(header={"alg": "none"}).rpartition(".")[0] + ".", "token_algorithm"),
    "HS256 with the public key": (_hs256_with_the_public_key, "token_algorithm"),
    "an algorithm of the list that is not the key's": (lambda: OIDC.token(header={"alg": "RS256"}), "token_algorithm"),
    "an unknown kid": (lambda: OIDC.token(header={"kid": "key-2"}), "token_key"),
    "no kid": (lambda: OIDC.token(header={"kid": None}), "token_key"),
    "the kid of another issuer": (lambda: OIDC.token(header={"kid": "svid-1"}), "token_key"),
    "a signature by another key": (lambda: TokenIssuer().token(), "token_signature"),
    "another iss": (lambda: OIDC.token(iss="https://issuer.example.evil"), "token_issuer"),
    "iss with a slash": (lambda: OIDC.token(iss=f"{ISSUER}/"), "token_issuer"),
    "no iss": (lambda: OIDC.token(without="iss"), "token_issuer"),
    "another aud": (lambda: OIDC.token(aud="other"), "token_audience"),
    "no aud": (lambda: OIDC.token(without="aud"), "token_audience"),
    "aud that is no text": (lambda: OIDC.token(aud={"minikms": 1, "x": 2}), "token_audience"),
    "an SVID without aud": (lambda: SVID.token(sub="spiffe://prod/x", without="aud"), "token_audience"),
    "expired": (lambda: OIDC.token(exp=_at(-60), iat=_at(-120)), "token_expired"),
    "no exp": (lambda: OIDC.token(without="exp"), "token_expired"),
    "exp that is no number": (lambda: OIDC.token(exp="tomorrow"), "token_malformed"),
    "exp that is not finite": (lambda: OIDC.token(exp=float("inf")), "token_malformed"),
    "nbf in the future": (lambda: OIDC.token(nbf=_at(120)), "token_not_yet_valid"),
    "iat in the future": (lambda: OIDC.token(iat=_at(120)), "token_not_yet_valid"),
    "more than a day": (lambda: OIDC.token(exp=_at(25 * 3600)), "token_lifetime"),
    "more than a day without iat": (lambda: OIDC.token(exp=_at(25 * 3600), without="iat"), "token_lifetime"),
    "crit": (lambda: OIDC.token(header={"crit": ["exp"]}), "token_crit"),
    "b64 and crit": (lambda: OIDC.token(header={"crit": ["b64"], "b64": False}), "token_crit"),
    "a logout token": (lambda: OIDC.token(header={"typ": "logout+jwt"}), "token_type"),
    "bound, without a certificate": (lambda: OIDC.token(cnf={"x5t#S256": encoded(bytes(32))}), "token_binding"),
    "unknown cnf": (lambda: OIDC.token(cnf={"jkt": "x"}), "token_cnf"),
    "unknown cnf beside a known one": (
        lambda: OIDC.token(cnf={"x5t#S256": encoded(bytes(32)), "kid": "x"}),
        "token_cnf",
    ),
    "cnf that is no object": (lambda: OIDC.token(cnf=None), "token_cnf"),
    "too large": (lambda: OIDC.token(pad="x" * 8192), "token_size"),
    "no subject": (lambda: OIDC.token(without="sub"), "token_name"),
    "a subject that makes the name too long": (lambda: OIDC.token(sub="x" * 200), "token_name"),
    "an SVID of another trust domain": (lambda: SVID.token(sub="spiffe://dev/x", without="iss"), "token_issuer"),
    "an SVID that is no SPIFFE id": (lambda: SVID.token(sub="spiffe://prod/", without="iss"), "token_name"),
    "an SVID by the OpenID issuer": (lambda: OIDC.token(sub="spiffe://prod/x", iss="ignored"), "token_key"),
    "four parts": (lambda: OIDC.token() + ".x", "token_malformed"),
    "encrypted (five parts)": (lambda: "a.b.c.d.e", "token_malformed"),
    "no JSON": (lambda: f"{encoded(b'[]')}.{encoded(b'{}')}.x", "token_malformed"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_bad_token_gets_401(pair: Pair, kind: str) -> None:
    made, reason = REFUSED[kind]
    assert_refused(pair, made(), reason)


def test_an_unbound_token_beside_a_certificate_is_refused(pair: Pair) -> None:
    """Nobody gets the grants of two identities, and a stolen token needs more than any certificate of the CA."""
    assert_refused(pair, OIDC.token(), "token_unbound", pair.client())


def test_a_token_that_is_bound_to_another_certificate_is_refused(pair: Pair) -> None:
    """Also once the gateway has verified it for its owner."""
    owner = pair.client()
    token = OIDC.token(cnf={"x5t#S256": encoded(owner.thumbprint)})
    assert asked(pair, token, owner).status == 200
    assert_refused(pair, token, "token_binding", pair.client())
    assert_refused(pair, token, "token_binding")


def test_a_verified_token_is_refused_once_it_has_expired(pair: Pair) -> None:
    token = OIDC.token(exp=_at(-28), iat=_at(-60))  # good for two more seconds, with the skew
    with pair.gateway.caller() as caller:
        assert caller.ask("GET", "/status", headers=(f"Authorization: Bearer {token}",)).status == 200
    wait_until(lambda: asked(pair, token).status == 401)
    assert_refused(pair, token, "token_expired")


@pytest.mark.parametrize("header", ["Basic dXNlcjpwYXNz", "Bearer", "Bearer ", "DPoP abc"])
def test_another_scheme_is_refused(pair: Pair, header: str) -> None:
    before = pair.gateway.refused("token_malformed")
    with pair.gateway.caller() as caller:
        assert caller.ask("GET", "/status", headers=(f"Authorization: {header}",)).status == 401
    assert pair.gateway.refused("token_malformed") == before + 1


def test_without_certificate_and_token_only_health_answers(pair: Pair) -> None:
    before = pair.gateway.refused("no_identity")
    with pair.gateway.caller() as caller:
        assert caller.get("/health").status == 200
        answer = caller.get("/ready")
    assert (answer.status, answer.code) == (401, "unauthorized")
    assert pair.gateway.refused("no_identity") == before + 1


def test_a_new_key_set_is_taken_up_and_an_old_key_is_forgotten(pair: Pair) -> None:
    """Also for tokens that were verified before."""
    new, token = TokenIssuer(kid="key-9"), OIDC.token()
    assert asked(pair, token).status == 200
    pair.gateway.write("oidc.json", new.jwks)
    try:
        wait_until(lambda: asked(pair, new.token()).status == 200)
        assert_refused(pair, token, "token_key")
    finally:
        pair.gateway.write("oidc.json", OIDC.jwks)
    wait_until(lambda: asked(pair, OIDC.token()).status == 200)


def test_a_damaged_key_set_leaves_the_one_before_in_force(pair: Pair) -> None:
    shared = {"keys": [{"kty": "oct", "kid": "key-1", "k": "AAAA"}]}
    pair.gateway.write("oidc.json", json.dumps(shared).encode())
    try:
        wait_until(lambda: pair.gateway.metric("reload_failed") == 1)
        assert asked(pair, OIDC.token()).status == 200
    finally:
        pair.gateway.write("oidc.json", OIDC.jwks)
    wait_until(lambda: pair.gateway.metric("reload_failed") == 0)


def assert_refused(pair: Pair, token: str, reason: str, shown: Issued | None = None) -> None:
    before = pair.gateway.refused(reason)
    answer = asked(pair, token, shown)
    assert (answer.status, answer.code, answer.headers["connection"]) == (401, "unauthorized", "close")
    assert pair.gateway.refused(reason) == before + 1
    wait_until(lambda: reason in pair.gateway.logged())
