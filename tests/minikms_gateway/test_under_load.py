"""Callers under load while certificates are replaced, and while the gateway is killed and started again."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.harness.callers import Caller
from tests.harness.gateways import HOST, Pair

CALLERS_COUNT = 4


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair() as made:
        yield made


class Load:
    """Callers in threads, from the start to the end of a `with` block. `ask` makes one call."""

    def __init__(self, ask: Callable[[int], None]) -> None:
        self._ask = ask
        self._ends = threading.Event()
        self.calls = [0] * CALLERS_COUNT
        self.errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CALLERS_COUNT)]

    def _run(self, number: int) -> None:
        try:
            while not self._ends.is_set():
                self._ask(number)
                self.calls[number] += 1
        except Exception as error:  # noqa: BLE001  the thread's end would hide it
            self.errors.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def until_more(self, count: int) -> None:
        """Returns when each caller has made `count` more calls."""
        wanted = [calls + count for calls in self.calls]
        while not self.errors and any(calls < least for calls, least in zip(self.calls, wanted, strict=True)):
            time.sleep(0.01)


def replaced_certificates(pair: Pair, times: int, pause_s: float) -> None:
    """The client's certificate is replaced on the disk; each new connection takes the newest."""
    files = pair.client().write(pair.gateway.directory.parent, "renewed")

    def ask(number: int) -> None:
        context = ssl.create_default_context(cafile=pair.gateway.ca_file)
        with lock:
            context.load_cert_chain(*files)
        with contextlib.closing(Caller(_connected(pair, context))) as caller:
            for _ in range(5):
                assert caller.post("/random", {"count": 1}).status == 200

    lock = threading.Lock()
    with Load(ask) as load:
        for _ in range(times):
            shown = pair.gateway.root.below("another issuing CA").issue(uris=["spiffe://prod/chat/api"])
            with lock:
                shown.write(pair.gateway.directory.parent, "renewed")
            own = pair.gateway.authority.issue(dns=[HOST], extended=[])
            pair.gateway.write("server.key", own.key, private=True)
            pair.gateway.write("server.pem", own.chain)
            load.until_more(2)
            time.sleep(pause_s)
    assert load.errors == []
    assert sum(load.calls) >= times


def test_no_call_fails_while_certificates_are_replaced(pair: Pair) -> None:
    """Those of clients, and the gateway's own."""
    replaced_certificates(pair, 5, 0)


@pytest.mark.torture
def test_no_call_fails_while_certificates_are_replaced_every_second(pair: Pair) -> None:
    replaced_certificates(pair, 30, 1)


def test_a_killed_gateway_loses_nothing_that_was_acknowledged(pair: Pair) -> None:
    """Its callers see a lost connection, and go on once it is back."""
    made: set[str] = set()
    shown = pair.client()
    context = ssl.create_default_context(cafile=pair.gateway.ca_file)
    context.load_cert_chain(*shown.write(pair.gateway.directory.parent, "steady"))

    def ask(number: int) -> None:
        with contextlib.suppress(OSError), contextlib.closing(Caller(_connected(pair, context))) as caller:
            while True:
                answer = caller.post("/create_dek_for_thread", {"thread_id": f"t-{number}"})
                assert answer.status == 200
                made.add(answer.body["key_id"])
                load.calls[number] += 1

    load = Load(ask)
    with load:
        for _ in range(2):
            load.until_more(5)
            pair.gateway.kill()
            pair.gateway.start()
        load.until_more(5)
        pair.gateway.kill()
    assert load.errors == []
    own = pair.daemon.caller()
    for key_id in made:
        assert own.get(f"/keys/{key_id}").status == 200
    assert len(made) >= 15 * CALLERS_COUNT


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


def _connected(pair: Pair, context: ssl.SSLContext) -> ssl.SSLSocket:
    sock = socket.create_connection(("127.0.0.1", pair.gateway.port), 60)
    try:
        return context.wrap_socket(sock, server_hostname=HOST)
    except BaseException:
        sock.close()
        raise
