"""The bounds of connections: of those that have not proven who they are, and of each name. Bodies that are refused."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from minikms.http import LIMITS, TOO_MANY_CONNECTIONS, HttpRequest, ParsedHead
from minikms.http.head import parse_head
from minikms_gateway import application
from minikms_gateway.application import Gateway, GatewaySession, GatewayState
from minikms_gateway.certificates import CertificateChain, CertificateTrust, Identity
from minikms_gateway.issuers import Issuers
from minikms_gateway.reasons import Refusals, RefusedCertificateError
from minikms_gateway.tokens import Verified
from minikms_gateway.upstream import Upstream

CONNECTIONS_MAX = 8


class NamedTrust(CertificateTrust):
    """Accepts each chain as the name that is its only certificate; refuses the name `bad`."""

    def __init__(self) -> None:
        self.until = time.time() + 600

    def identity(self, chain: CertificateChain, now: float) -> Identity:
        [name] = chain.certificates
        if name == b"bad" or now >= self.until:
            raise RefusedCertificateError("revoked")
        return Identity(name.decode(), self.until)


class NamedIssuers:
    """Accepts each token as the name that it is. The keys for `unknown` are being fetched, and never arrive."""

    def __init__(self) -> None:
        self.until = time.time() + 600
        self.loop = asyncio.new_event_loop()

    def principal(self, authorization: str, thumbprint: bytes | None, now: float) -> Verified | asyncio.Future[None]:
        name = authorization.removeprefix("Bearer ")
        if name == "unknown":
            return self.loop.create_future()
        return Verified(name, self.until, None, 0, "key")


class UnusedUpstream:
    def send(self, data: bytes) -> bytes:
        return b"{}"


@pytest.fixture
def refusals() -> Refusals:
    return Refusals(lambda reason, count, peer: None)


@pytest.fixture
def trust() -> NamedTrust:
    return NamedTrust()


@pytest.fixture
def issuers() -> Iterator[NamedIssuers]:
    made = NamedIssuers()
    yield made
    made.loop.close()


@pytest.fixture
def gateway(trust: NamedTrust, issuers: NamedIssuers, refusals: Refusals, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setattr(application, "chain_of", lambda tls: tls)
    state = GatewayState(trust, cast(Issuers, issuers), 1)
    return Gateway(state, cast(Upstream, UnusedUpstream()), refusals, connections_max=CONNECTIONS_MAX)


class Peer:
    """The socket and the link of a connection from that address."""

    def __init__(self, address: str = "192.0.2.1") -> None:
        self.address = address
        self.aborted = False
        self.groups = 0

    def getpeername(self) -> tuple[str, int]:
        return self.address, 1

    def abort(self) -> None:
        self.aborted = True

    def regroup(self) -> None:
        self.groups += 1


def opened(gateway: Gateway, name: str, peer: Peer | None = None) -> Any:
    """A session with that name, or without a certificate if it is empty."""
    peer = peer or Peer()
    return gateway.open_session(
        cast(Any, peer), cast(Any, CertificateChain((name.encode(),), b"") if name else None), peer
    )


def head(line: str, *headers: str) -> ParsedHead:
    return parse_head("\r\n".join((f"{line} HTTP/1.1", "Host: x", *headers, "", "")).encode(), LIMITS)


def ready(gateway: Gateway, session: Any, token: str) -> Any:
    """The answer to a request with a token."""
    return gateway.handle(session, HttpRequest(head("GET /ready", f"Authorization: Bearer {token}"), memoryview(b"")))


UNPROVEN_MAX = CONNECTIONS_MAX // 4


@pytest.mark.parametrize("unproven", ["", "bad"])
def test_of_too_many_unknown_peers_the_oldest_of_the_busiest_address_ends(
    gateway: Gateway, refusals: Refusals, unproven: str
) -> None:
    """However many more come from there, the connection from another address stays."""
    other = Peer("192.0.2.2")
    opened(gateway, unproven, other)
    flood = [Peer() for _ in range(3 * UNPROVEN_MAX)]
    for peer in flood:
        assert isinstance(opened(gateway, unproven, peer), GatewaySession)
    assert [peer.aborted for peer in flood] == [True] * (2 * UNPROVEN_MAX + 1) + [False] * (UNPROVEN_MAX - 1)
    assert (other.aborted, refusals.counts["connections"]) == (False, 2 * UNPROVEN_MAX + 1)


def test_the_addresses_of_one_ipv6_network_share_a_bound(gateway: Gateway) -> None:
    other = Peer("2001:db8:0:1::1")
    opened(gateway, "", other)
    for number in range(2 * UNPROVEN_MAX):
        opened(gateway, "", Peer(f"2001:db8:0:2::{number}"))
    assert not other.aborted


def test_a_peer_that_has_ended_or_proven_a_name_leaves_its_place(gateway: Gateway) -> None:
    first, second, third = Peer(), Peer(), Peer()
    gateway.close_session(opened(gateway, "", first))
    ready(gateway, opened(gateway, "", second), "oidc:x")
    for _ in range(UNPROVEN_MAX - 1):
        opened(gateway, "")
    opened(gateway, "", third)
    assert (first.aborted, second.aborted, third.aborted) == (False, False, False)


def test_a_token_moves_the_connection_to_the_group_of_its_name(gateway: Gateway) -> None:
    peer = Peer()
    session = opened(gateway, "", peer)
    assert (gateway.group(session), peer.groups) == (peer.address, 0)
    for token in ("oidc:x", "oidc:y"):
        ready(gateway, session, token)
        assert (gateway.group(session), peer.groups) == ("oidc:x", 1)


def test_a_token_of_a_connection_that_has_ended_takes_no_place_of_its_name(gateway: Gateway) -> None:
    """The keys of its issuer arrived later."""
    for _ in range(CONNECTIONS_MAX):
        session = opened(gateway, "")
        gateway.close_session(session)
        assert ready(gateway, session, "oidc:x") == b"{}"
    assert ready(gateway, opened(gateway, ""), "oidc:x") == b"{}"


def test_a_name_gets_half_of_the_connections(gateway: Gateway) -> None:
    sessions = [opened(gateway, "spiffe://prod/x") for _ in range(CONNECTIONS_MAX // 2)]
    assert opened(gateway, "spiffe://prod/x") is TOO_MANY_CONNECTIONS
    assert isinstance(opened(gateway, "spiffe://prod/y"), GatewaySession)
    gateway.close_session(sessions[0])
    assert isinstance(opened(gateway, "spiffe://prod/x"), GatewaySession)


@pytest.mark.parametrize("unproven", ["", "bad"])
def test_a_peer_that_proves_nothing_in_time_may_not_stay(
    gateway: Gateway, unproven: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, good = opened(gateway, unproven), opened(gateway, "spiffe://prod/x")
    assert gateway.may_stay(session)
    monkeypatch.setattr(application, "UNPROVEN_SECONDS_MAX", 0.0)
    assert (gateway.may_stay(session), gateway.may_stay(good)) == (False, True)


def test_a_certificate_that_has_become_bad_is_counted_once(
    gateway: Gateway, trust: NamedTrust, refusals: Refusals
) -> None:
    session = opened(gateway, "spiffe://prod/x")
    trust.until = 0.0
    gateway.state = GatewayState(trust, None, 2)
    assert [gateway.may_stay(session) for _ in range(3)] == [False] * 3
    assert refusals.counts["revoked"] == 1


def test_the_name_of_a_token_gets_half_of_the_connections(gateway: Gateway, refusals: Refusals) -> None:
    """Beside unknown peers it leaves some for others. Further ones are closed, and end as unknown peers do."""
    sessions = []
    for _ in range(CONNECTIONS_MAX // 2):
        sessions.append(opened(gateway, ""))
        assert ready(gateway, sessions[-1], "oidc:x") == ready(gateway, sessions[-1], "oidc:x") == b"{}"
    beyond = opened(gateway, "")
    refused = ready(gateway, beyond, "oidc:x")
    assert (refused.status, refused.close, refusals.counts["connections"]) == (503, True, 1)
    assert ready(gateway, opened(gateway, ""), "oidc:y") == b"{}"
    gateway.close_session(sessions[0])
    assert ready(gateway, beyond, "oidc:x") == b"{}"


def test_a_connection_does_not_outlast_its_last_token(
    gateway: Gateway, issuers: NamedIssuers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "UNPROVEN_SECONDS_MAX", 0.0)
    session = opened(gateway, "")
    ready(gateway, session, "oidc:x")
    assert gateway.may_stay(session)
    other = opened(gateway, "")
    issuers.until = 0.0
    ready(gateway, other, "oidc:x")
    assert (gateway.may_stay(session), gateway.may_stay(other)) == (True, False)


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        ("GET /health", (), 401),
        ("POST /random", (), 401),
        ("POST /random", ("Authorization: Bearer unknown",), 503),
        ("POST /random", ("Authorization: Bearer oidc:x",), None),
    ],
)
def test_a_body_is_received_only_of_a_peer_with_a_name(
    gateway: Gateway, line: str, headers: tuple[str, ...], status: int | None
) -> None:
    """Not while the keys for its token are being fetched either."""
    answer = gateway.admit(opened(gateway, ""), head(line, *headers, "Content-Length: 9"))
    assert (None if answer is None else (answer.status, answer.close)) == (None if status is None else (status, True))
