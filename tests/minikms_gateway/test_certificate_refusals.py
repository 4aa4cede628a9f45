"""Which certificates prove an identity, at a real gateway under a uid of its own. Each refusal has its reason."""

import datetime
import re
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.callers import Caller
from tests.harness.certificates import HOUR, SERVER, Authority, Issued
from tests.harness.gateways import Pair
from tests.harness.waiting import wait_until

SPIFFE = "spiffe://prod/chat/api"
MINUTE = datetime.timedelta(minutes=1)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Certificates are required, and there are revocation lists."""
    with Pair(crl=True) as made:
        yield made


ANSWERED: dict[str, tuple[dict[str, Any], str]] = {
    "two URI SANs": ({"uris": [SPIFFE, "spiffe://prod/chat/other"]}, "uri_sans"),
    "a URI SAN twice": ({"uris": [SPIFFE, SPIFFE]}, "uri_sans"),
    "a trust domain that the CA may not assert": ({"uris": ["spiffe://dev/chat/api"]}, "trust_domain"),
    "a URI that is no SPIFFE id, beside a good DNS name": (
        {"uris": ["https://prod/chat"], "dns": ["api.chat.internal"]},
        "name",
    ),
    "a SPIFFE id without a path": ({"uris": ["spiffe://prod"]}, "name"),
    "a SPIFFE id in upper case": ({"uris": ["spiffe://PROD/chat/api"]}, "name"),
    "an escape in a SPIFFE id": ({"uris": ["spiffe://prod/chat%2Fapi"]}, "name"),
    "a name that is too long": ({"uris": [f"spiffe://prod/{'x' * 200}"]}, "name"),
    "two DNS names": ({"dns": ["a.chat.internal", "b.chat.internal"]}, "dns_sans"),
    "a DNS name in upper case": ({"dns": ["API.chat.internal"]}, "name"),
    "a wildcard": ({"dns": ["*.chat.internal"]}, "name"),
    "a suffix that begins within a label": ({"dns": ["evilchat.internal"]}, "dns_suffix"),
    "another suffix": ({"dns": ["api.chat.internal.example"]}, "dns_suffix"),
    "a certificate that does not sign": ({"uris": [SPIFFE], "usage": ["key_agreement"]}, "usage"),
}
"""The handshake succeeds, and every request but /health is 401."""


@pytest.mark.parametrize("kind", ANSWERED)
def test_a_certificate_that_proves_no_identity_gets_401(pair: Pair, kind: str) -> None:
    how, reason = ANSWERED[kind]
    assert_answered_401(pair, pair.gateway.authority.issue(**how), reason)


def test_a_revoked_certificate_gets_401(pair: Pair) -> None:
    shown = pair.client()
    pair.gateway.revoke(shown)
    wait_until(lambda: _status(pair, shown) == 401)
    assert_answered_401(pair, shown, "revoked")
    assert _status(pair, pair.client()) == 200


def test_the_log_says_what_to_change_in_a_certificate_for_another_use(pair: Pair) -> None:
    shown = pair.gateway.authority.issue(uris=[SPIFFE], usage=["key_agreement"])
    assert _status(pair, shown) == 401
    wait_until(lambda: re.search("reason=usage .*digitalSignature", pair.gateway.log.read_text()))


def test_a_revoked_certificate_ends_its_open_connection(pair: Pair) -> None:
    shown = pair.client()
    before = pair.gateway.refused("revoked")
    with pair.gateway.caller(shown) as caller:
        assert caller.get("/ready").status == 200
        pair.gateway.revoke(shown)
        wait_until(lambda: _is_over(caller))
    assert pair.gateway.refused("revoked") == before + 1


def test_a_revoked_intermediate_ca_refuses_what_it_issued(pair: Pair) -> None:
    below = pair.gateway.root.below("another issuing CA")
    shown = below.issue(uris=[SPIFFE])
    lists = pair.gateway.authority.crl() + below.crl()
    pair.gateway.write("clients.crl", pair.gateway.root.crl() + lists)
    wait_until(lambda: _status(pair, shown) == 200)
    pair.gateway.write("clients.crl", pair.gateway.root.crl(below) + lists)
    wait_until(lambda: _status(pair, shown) == 401)
    assert_answered_401(pair, shown, "revoked")


@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        (lambda pair: pair.gateway.root.crl() + pair.gateway.authority.crl(ends=-MINUTE), "crl_expired"),
        (lambda pair: pair.gateway.root.crl(ends=-MINUTE) + pair.gateway.authority.crl(), "crl_expired"),
        (lambda pair: pair.gateway.root.crl(), "crl_missing"),
        (lambda pair: pair.gateway.root.crl() + Authority("test issuing CA").crl(), "crl_missing"),
    ],
    ids=["expired", "expired for the intermediate CA", "missing", "signed by another key"],
)
def test_without_a_list_in_force_no_certificate_is_accepted(pair: Pair, lists: Any, reason: str) -> None:
    shown = pair.client()
    pair.gateway.write("clients.crl", lists(pair))
    wait_until(lambda: _status(pair, shown) == 401)
    assert_answered_401(pair, shown, reason)
    pair.gateway.revoke()
    wait_until(lambda: _status(pair, shown) == 200)


IN_THE_HANDSHAKE: dict[str, tuple[dict[str, Any], str, str]] = {
    "another CA": ({}, "unknown_ca", "UNKNOWN_CA"),
    "expired": ({"ends": -MINUTE}, "expired", "EXPIRED"),
    "not yet valid": ({"starts": HOUR}, "not_yet_valid", "BAD_CERTIFICATE"),
    "signs revocation lists": ({"usage": ["digital_signature", "crl_sign"]}, "certificate", "CERTIFICATE_UNKNOWN"),
    "for servers only": ({"extended": [SERVER]}, "usage", "UNSUPPORTED"),
}
"""How it is made, the reason, and the alert."""


@pytest.mark.parametrize("kind", IN_THE_HANDSHAKE)
def test_a_bad_certificate_ends_the_handshake_with_an_alert(pair: Pair, kind: str) -> None:
    """In TLS 1.3 the client learns it when it reads: the alert comes also if the client has sent a request."""
    how, reason, alert = IN_THE_HANDSHAKE[kind]
    before = pair.gateway.refused(reason)
    another = Authority("test root").below("test issuing CA")  # by the same names
    shown = (pair.gateway.authority if how else another).issue(uris=[SPIFFE], **how)
    with pytest.raises(ssl.SSLError, match=alert), pair.gateway.caller(shown) as caller:
        caller.get("/ready")
    assert pair.gateway.refused(reason) == before + 1
    wait_until(lambda: reason in pair.gateway.logged())


def test_no_certificate_ends_the_handshake_where_there_are_no_tokens(pair: Pair) -> None:
    before = pair.gateway.refused("no_certificate")
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"), pair.gateway.caller() as caller:
        caller.get("/health")
    assert pair.gateway.refused("no_certificate") == before + 1


def test_tls_1_2_is_refused(pair: Pair) -> None:
    before = pair.gateway.refused("tls_version")
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        pair.gateway.connect(pair.client(), maximum_version=ssl.TLSVersion.TLSv1_2)
    assert pair.gateway.refused("tls_version") == before + 1


def test_plain_http_is_refused(pair: Pair) -> None:
    before = pair.gateway.refused("not_tls")
    with socket.create_connection(("127.0.0.1", pair.gateway.port), 60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP" not in sock.recv(1024)
    assert pair.gateway.refused("not_tls") == before + 1


def test_there_are_no_session_tickets(pair: Pair) -> None:
    with pair.gateway.connect(pair.client()) as tls:
        caller = Caller(tls)
        assert caller.get("/ready").status == 200
        assert tls.session is None or not tls.session.has_ticket


def test_a_certificate_that_expires_ends_its_connection(pair: Pair) -> None:
    shown = pair.gateway.authority.issue(uris=[SPIFFE], ends=datetime.timedelta(seconds=4))
    before = pair.gateway.refused("expired")
    with pair.gateway.caller(shown) as caller:
        assert caller.get("/ready").status == 200
        wait_until(lambda: _is_over(caller))
    assert pair.gateway.refused("expired") == before + 1


def test_a_ca_that_is_taken_away_ends_its_connections(pair: Pair) -> None:
    with pair.gateway.caller(pair.client()) as caller:
        assert caller.get("/ready").status == 200
        pair.gateway.write("clients.pem", Authority("another root").pem)
        try:
            wait_until(lambda: _is_over(caller))
        finally:
            pair.gateway.write("clients.pem", pair.gateway.root.pem)
    wait_until(lambda: _status(pair, pair.client()) == 200)


def assert_answered_401(pair: Pair, shown: Issued, reason: str) -> None:
    before = pair.gateway.refused(reason)
    with pair.gateway.caller(shown) as caller:
        assert caller.get("/health").status == 200
        answer = caller.get("/status")
    assert (answer.status, answer.code, answer.headers["connection"]) == (401, "unauthorized", "close")
    assert pair.gateway.refused(reason) == before + 1
    wait_until(lambda: reason in pair.gateway.logged())


def _status(pair: Pair, shown: Issued) -> int | None:
    """None: the connection was ended before the answer."""
    try:
        with pair.gateway.caller(shown) as caller:
            return int(caller.get("/ready").status)
    except OSError:
        return None


def _is_over(caller: Caller) -> bool:
    try:
        return caller.get("/ready").status == 401
    except OSError:
        return True
