"""What a hostile network peer can send, or not send, over TLS: the table of the engine, and idle connections."""

import contextlib
import json
import os
import socket
import ssl
from collections.abc import Iterator

import pytest

from minikms.http.tls import HANDSHAKES_COUNT_MAX
from tests import needs
from tests.harness.gateways import Pair
from tests.harness.waiting import wait_until
from tests.minikms.http.http_harness import parse_answers, post
from tests.minikms.http.http_inputs import REFUSED


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as made:
        yield made


@pytest.mark.parametrize("name", REFUSED)
def test_the_hostile_input_of_the_socket_is_refused_over_tls(pair: Pair, name: str) -> None:
    """The status is as the table says, the connection ends, and the key service is not asked."""
    data, status = REFUSED[name]
    lines = len(pair.audited())
    with pair.gateway.connect(pair.client()) as tls:
        tls.sendall(data)
        if name.startswith("end "):
            with socket.socket(fileno=os.dup(tls.fileno())) as below:
                below.shutdown(socket.SHUT_WR)
        [answer] = parse_answers(rest(tls))
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert len(pair.audited()) == lines


@pytest.mark.parametrize("cut", [1, 5, 100, 2000])
def test_a_request_in_pieces_is_one_request(pair: Pair, cut: int) -> None:
    """Each piece is a TLS record of its own."""
    data = post("/random", b'{"count":' + b" " * 4000 + b"3}")
    with pair.gateway.caller(pair.client()) as caller:
        for start in range(0, len(data), cut):
            caller.sock.sendall(data[start : start + cut])
        assert caller.receive().status == 200


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.torture)])
def test_idle_connections_leave_room_for_another(pair: Pair, count: int) -> None:
    with contextlib.ExitStack() as opened, needs.descriptors(count + 256):
        shown = pair.client()
        context = ssl.create_default_context(cafile=pair.gateway.ca_file)
        context.load_cert_chain(*shown.write(pair.gateway.ca_file.parent, "idle"))
        for _ in range(count):
            sock = opened.enter_context(socket.create_connection(("127.0.0.1", pair.gateway.port), 60))
            opened.enter_context(context.wrap_socket(sock, server_hostname="gateway.internal"))
        wait_until(lambda: pair.gateway.metric("connections") >= count)
        other = pair.client(uri="spiffe://prod/chat/other")
        with pair.gateway.caller(other) as caller:
            assert caller.post("/random", {"count": 1}).status == 200
        assert pair.gateway.metric("handshakes") == 0


def test_handshakes_that_never_end_keep_nobody_out(pair: Pair) -> None:
    """There are more of them than may be open: the oldest end."""
    with contextlib.ExitStack() as opened, needs.descriptors(3 * HANDSHAKES_COUNT_MAX):
        before = pair.gateway.refused("handshake_timeout")
        for number in range(HANDSHAKES_COUNT_MAX + 64):
            sock = opened.enter_context(socket.create_connection(("127.0.0.1", pair.gateway.port), 60))
            if number % 2:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # begins a ClientHello
        wait_until(lambda: pair.gateway.refused("handshake_timeout") >= before + 64)
        assert pair.gateway.metric("handshakes") <= HANDSHAKES_COUNT_MAX
        with pair.gateway.caller(pair.client()) as caller:
            assert caller.post("/random", {"count": 1}).status == 200


def test_an_answer_that_nobody_reads_reaches_no_other_principal(pair: Pair) -> None:
    """The peer asks, and goes away before the answer: what others ask for is theirs."""
    other = pair.client(uri="spiffe://prod/chat/other")
    with pair.gateway.caller(other) as caller:
        for count in range(1, 60):
            with pair.gateway.connect(pair.client()) as tls:
                tls.sendall(post("/random", b'{"count":4000}') * 3)
            answer = caller.post("/random", {"count": count})
            assert len(answer.body["random"]) == (count + 2) // 3 * 4


def test_a_cancelled_request_is_carried_out_and_answers_nobody_else(pair: Pair) -> None:
    """Its connection to the key service carries the next request only after its own answer."""
    shown, other = pair.client(), pair.client(uri="spiffe://prod/chat/other")
    body = json.dumps({"thread_id": "cancelled"}).encode()
    with pair.gateway.caller(other) as caller:
        for number in range(20):
            with pair.gateway.connect(shown) as tls:
                head = b"POST /create_dek_for_thread HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                tls.sendall(head % len(body) + body)
            answer = caller.post("/get_or_create_dek_for_thread", {"thread_id": f"own-{number}"})
            assert (answer.status, set(answer.body)) == (200, {"key_id", "created"})


def rest(tls: ssl.SSLSocket) -> bytes:
    received = b""
    while part := tls.recv(65536):
        received += part
    return received
