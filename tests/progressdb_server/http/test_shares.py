"""What all connections share: the budget of bodies, and idle connections of one address."""

import contextlib
import socket
import time
from functools import partial

import pytest

from progressdb_server.api.gate.access import Proxies
from progressdb_server.api.gate.keys import Caller, KeyTable, payer
from progressdb_server.config import BODY_BYTES_MIN, ServerSection
from progressdb_server.http import limits
from progressdb_server.http.shares import BodyAccount, Shares
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import ADMIN, BACKEND, FRONTEND, signature
from tests.progressdb_server.api.http_server import HttpServer, closed_within, read_response, running

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
MIB = 1024 * 1024


def upload(user: str, sent: int, declared: int = MIB) -> bytes:
    """The beginning of a message of a signed user."""
    head = (
        f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-API-Key: {FRONTEND}\r\nX-User-ID: {user}\r\n"
        f"X-User-Signature: {signature(user)}\r\nContent-Length: {declared}\r\n\r\n"
    )
    return head.encode() + b'{"body":"'.ljust(sent, b"x")


# --- accounts ---------------------------------------------------------------------------------------------------
def caller_with(presented: str) -> Caller:
    found = KeyTable(backend=(BACKEND,), frontend=(FRONTEND,), admin=(ADMIN,)).find(presented.encode())
    assert found is not None
    return found


def taken(shares: Shares, address: str, caller: Caller | None, user: str | None, presented: bytes = b"") -> int:
    """How many mebibytes bodies of one caller get."""
    count = 0
    while True:
        account = BodyAccount(shares, shares.group(address), presented)
        if caller is not None:
            account.identify(payer(caller, user))
        if not account.grow_to(MIB):
            return count
        count += 1


def test_a_user_an_unknown_caller_and_an_address_have_shares_of_the_budget() -> None:
    shares = Shares(ServerSection(body_bytes=64 * MIB))
    assert taken(shares, "192.0.2.1", caller_with(FRONTEND), "alice") == 8
    assert taken(shares, "192.0.2.2", caller_with(FRONTEND), "alice") == 0  # from wherever he calls
    assert taken(shares, "192.0.2.1", caller_with(FRONTEND), "bob") == 8
    assert taken(shares, "192.0.2.1", None, None, b"key") == 16
    assert taken(shares, "192.0.2.1", caller_with(BACKEND), None) == 0  # the address has had its half
    assert taken(shares, "192.0.2.2", caller_with(BACKEND), None) == 32
    assert taken(shares, "192.0.2.3", caller_with(ADMIN), None) == 0
    assert shares.bodies_bytes == 64 * MIB


def test_a_proxy_and_a_peer_without_an_address_have_no_share_of_an_address() -> None:
    for address in ("10.0.0.7", "::ffff:10.0.0.7", ""):
        shares = Shares(ServerSection(body_bytes=64 * MIB), Proxies(("10.0.0.0/8",)).__contains__)
        assert taken(shares, address, caller_with(BACKEND), None) == 64


def test_a_body_is_charged_to_its_user_and_given_back_at_its_end() -> None:
    shares = Shares(ServerSection(body_bytes=64 * MIB))
    unknown = [BodyAccount(shares, "192.0.2.1", b"key") for _ in range(12)]
    assert all(account.grow_to(MIB) for account in unknown)
    assert [account.identify(payer(caller_with(FRONTEND), "alice")) for account in unknown] == [True] * 8 + [False] * 4
    assert shares.bodies_bytes == 8 * MIB
    for account in unknown:
        account.close()
        account.close()
    assert shares.bodies_bytes == 0
    assert taken(shares, "192.0.2.1", caller_with(FRONTEND), "alice") == 8


def test_no_more_is_charged_for_a_body_than_is_kept_of_it() -> None:
    shares = Shares()
    account = BodyAccount(shares, "192.0.2.1", b"key")
    assert account.grow_to(30 * MIB)
    assert shares.bodies_bytes == limits.REQUEST_BYTES_MAX


# --- bodies on connections --------------------------------------------------------------------------------------
def holds(server: HttpServer, count: int) -> bool:
    return server.shares.bodies_bytes == count


def drained(server: HttpServer) -> bool:
    return server.shares.bodies_bytes == 0


def test_unfinished_uploads_of_one_user_beyond_its_share_are_refused() -> None:
    with running(config=ServerSection(body_bytes=BODY_BYTES_MIN)) as server, contextlib.ExitStack() as opened:
        hostile = [opened.enter_context(server.connect()) for _ in range(12)]
        for number, connection in enumerate(hostile, start=1):
            connection.sendall(upload("mallory", 512 * 1024))
            if number <= 4:  # an eighth of the budget has room for so many
                held = number * 512 * 1024
                wait_until(partial(holds, server, held))
                continue
            reply = read_response(connection)
            assert (reply.status, reply.headers["retry-after"]) == (503, "2")
            assert reply.json == {"error": "too many bodies are being received: send this one again later"}
        assert server.shares.bodies_bytes <= BODY_BYTES_MIN / 8
        with server.connect() as other:
            other.sendall(upload("alice", MIB - 2) + b'"}')
            assert read_response(other).status == 200
        # A refused upload goes on to its end, and the connection is as good as before.
        last = hostile[-1]
        last.settimeout(60)
        last.sendall(b"x" * (MIB - 512 * 1024) + GET)
        assert read_response(last).status == 200
    wait_until(lambda: drained(server))


def test_every_end_of_a_request_gives_its_bytes_back() -> None:
    with running() as server:
        bodies = (b'{"body":"' + b"x" * 20_000 + b'"}', b"{" * 20_000, b"x" * 3_000_000, b'"' * 200_000)
        for body in bodies:
            with server.connect() as connection:
                connection.sendall(upload("alice", 0, len(body)).removesuffix(b'{"body":"') + body)
                read_response(connection)
            wait_until(lambda: drained(server))
        with server.connect() as gone:
            gone.sendall(GET + upload("alice", 100_000) + b"x" * 300_000)
            assert read_response(gone).status == 200
            wait_until(lambda: not drained(server))
        wait_until(lambda: drained(server))


# --- idle connections -------------------------------------------------------------------------------------------
def test_without_room_the_address_with_most_idle_connections_loses_one() -> None:
    shares, closed = Shares(), list[str]()

    class Idle:
        def __init__(self, name: str) -> None:
            self.name = name

        def close_idle(self) -> None:
            closed.append(self.name)

    connections = {name: Idle(name) for name in ("a1", "b1", "b2", "b3", "c1", "c2")}
    for name, connection in connections.items():
        shares.idle(name[0], connection)
    shares.busy("b", connections["b1"])
    assert [shares.make_room() for _ in range(6)] == [True] * 5 + [False]
    assert closed == ["b2", "c1", "a1", "b3", "c2"]


def test_an_address_loses_its_longest_idle_connection_and_none_in_use() -> None:
    with running(config=ServerSection(idle_connections=3)) as server, contextlib.ExitStack() as opened:
        first = opened.enter_context(server.connect())
        first.sendall(GET)
        assert read_response(first).status == 200
        others: list[socket.socket] = []
        for sent in (b"", GET[:9], upload("alice", 100)):  # idle is also who does not end a request
            others.append(opened.enter_context(server.connect()))
            others[-1].sendall(sent)
            time.sleep(0.05)
        assert closed_within(first, 60)
        others[1].sendall(GET[9:])
        assert read_response(others[1]).status == 200
        with server.connect() as newest:
            newest.sendall(GET)
            assert read_response(newest).status == 200
        assert closed_within(others[0], 60)


def test_a_request_that_does_not_end_behind_another_one_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_SECONDS_MAX", 600)
    with running(config=ServerSection(idle_connections=3)) as server, contextlib.ExitStack() as opened:
        connections: list[socket.socket] = []
        for _ in range(4):
            connections.append(opened.enter_context(server.connect()))
            connections[-1].sendall(GET + GET[:9])
            assert read_response(connections[-1]).status == 200
        assert closed_within(connections[0], 60)


def test_a_proxy_s_idle_connections_are_not_bounded() -> None:
    config = ServerSection(idle_connections=3, proxies=("127.0.0.0/8",))
    with running(config=config) as server, contextlib.ExitStack() as opened:
        connections = [opened.enter_context(server.connect()) for _ in range(20)]
        for connection in connections:
            connection.sendall(GET)
            assert read_response(connection).status == 200


@pytest.mark.parametrize("count", [0, 5])
def test_zero_idle_connections_is_no_bound(count: int) -> None:
    with running(config=ServerSection(idle_connections=count)) as server, contextlib.ExitStack() as opened:
        connections = [opened.enter_context(server.connect()) for _ in range(5)]
        for connection in connections:
            connection.sendall(GET)
            assert read_response(connection).status == 200
