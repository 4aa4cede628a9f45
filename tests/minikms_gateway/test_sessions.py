"""The bounds of connections: of those that have not proven who they are, and of each name."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from minikms.http import TOO_MANY_CONNECTIONS
from minikms_gateway import application
from minikms_gateway.application import Gateway, Session, State
from minikms_gateway.certificates import Chain, Identity, Trust
from minikms_gateway.reasons import Refusals, RefusedCertificateError
from minikms_gateway.upstream import Upstream

CONNECTIONS_MAX = 8


class NamedTrust(Trust):
    """Accepts each chain as the name that is its only certificate; refuses the name `bad`."""

    def __init__(self) -> None:
        self.until = time.time() + 600

    def identity(self, chain: Chain, now: float) -> Identity:
        [name] = chain.certificates
        if name == b"bad" or now >= self.until:
            raise RefusedCertificateError("revoked")
        return Identity(name.decode(), self.until)


@pytest.fixture
def refusals() -> Refusals:
    return Refusals(lambda reason, count, peer: None)


@pytest.fixture
def trust() -> NamedTrust:
    return NamedTrust()


@pytest.fixture
def gateway(trust: NamedTrust, refusals: Refusals, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setattr(application, "chain_of", lambda tls: tls)
    return Gateway(State(trust, None, 1), cast(Upstream, None), refusals, connections_max=CONNECTIONS_MAX)


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as made,
    ):
        yield made


def opened(gateway: Gateway, sock: socket.socket, name: str) -> Any:
    """A session with that name, or without a certificate if it is empty."""
    return gateway.open_session(sock, cast(Any, Chain((name.encode(),), b"") if name else None))


@pytest.mark.parametrize("unproven", ["", "bad"])
def test_unknown_peers_get_half_of_the_connections(gateway: Gateway, sock: socket.socket, unproven: str) -> None:
    sessions = [opened(gateway, sock, unproven) for _ in range(CONNECTIONS_MAX // 2)]
    assert all(isinstance(session, Session) for session in sessions)
    assert opened(gateway, sock, "") is TOO_MANY_CONNECTIONS
    assert isinstance(opened(gateway, sock, "spiffe://prod/x"), Session)
    gateway.close_session(sessions[0])
    assert isinstance(opened(gateway, sock, ""), Session)


def test_a_name_gets_half_of_the_connections(gateway: Gateway, sock: socket.socket) -> None:
    sessions = [opened(gateway, sock, "spiffe://prod/x") for _ in range(CONNECTIONS_MAX // 2)]
    assert opened(gateway, sock, "spiffe://prod/x") is TOO_MANY_CONNECTIONS
    assert isinstance(opened(gateway, sock, "spiffe://prod/y"), Session)
    gateway.close_session(sessions[0])
    assert isinstance(opened(gateway, sock, "spiffe://prod/x"), Session)


@pytest.mark.parametrize("unproven", ["", "bad"])
def test_a_peer_that_proves_nothing_in_time_may_not_stay(
    gateway: Gateway, sock: socket.socket, unproven: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, good = opened(gateway, sock, unproven), opened(gateway, sock, "spiffe://prod/x")
    assert gateway.may_stay(session)
    monkeypatch.setattr(application, "UNPROVEN_SECONDS_MAX", 0.0)
    assert (gateway.may_stay(session), gateway.may_stay(good)) == (False, True)


def test_a_certificate_that_has_become_bad_is_counted_once(
    gateway: Gateway, sock: socket.socket, trust: NamedTrust, refusals: Refusals
) -> None:
    session = opened(gateway, sock, "spiffe://prod/x")
    trust.until = 0.0
    gateway.use(State(trust, None, 2))
    assert [gateway.may_stay(session) for _ in range(3)] == [False] * 3
    assert refusals.counts["revoked"] == 1
