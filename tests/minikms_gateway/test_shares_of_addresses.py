"""While one address does its worst, clients of another, 100 ms away, are served, by certificates and by tokens.

The delay is a proxy's: not every kernel has netem.
"""

import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness.callers import WAIT_S, Caller
from tests.harness.gateways import HOST, Pair
from tests.harness.tokens import OIDC_TABLE, TokenIssuer
from tests.harness.waiting import wait_until
from tests.minikms_gateway.one_address import CLIENTS

OIDC = TokenIssuer()
ATTACKS = {"handshakes": "handshake_timeout", "connections": "connections"}
"""By the reason that is counted when the first connection of the attack loses its place."""
AT_ONCE = 10


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair(tables=OIDC_TABLE, files={"oidc.json": OIDC.jwks}) as made:
        yield made


@contextlib.contextmanager
def beside(pair: Pair, name: str) -> Iterator[str]:
    """A process of `one_address`. Yields the line that it begins with."""
    command = [sys.executable, "-m", "tests.minikms_gateway.one_address", name, str(pair.gateway.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def served(pair: Pair, port: int, context: ssl.SSLContext, headers: tuple[str, ...]) -> bool:
    with contextlib.suppress(OSError, AssertionError), contextlib.ExitStack() as opened:
        sock = opened.enter_context(socket.create_connection((CLIENTS, port), WAIT_S))
        caller = Caller(opened.enter_context(context.wrap_socket(sock, server_hostname=HOST)))
        return bool(caller.ask("GET", "/ready", headers=headers).status == 200)
    return False


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.torture)])
@pytest.mark.parametrize("attacks", [["handshakes"], ["connections"], ["handshakes", "connections"]], ids="+".join)
def test_clients_far_away_are_served_while_one_address_attacks(pair: Pair, attacks: list[str], count: int) -> None:
    """99 of 100 tries succeed."""
    with_certificate = ssl.create_default_context(cafile=pair.gateway.ca_file)
    without = ssl.create_default_context(cafile=pair.gateway.ca_file)
    with_certificate.load_cert_chain(*pair.client().write(pair.gateway.ca_file.parent, "far"))
    ways = [(with_certificate, ()), (without, (f"Authorization: Bearer {OIDC.token()}",))]
    before = {name: pair.gateway.refused(reason) for name, reason in ATTACKS.items()}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as threads:
        port = int(stack.enter_context(beside(pair, "proxy")))
        for attack in attacks:
            stack.enter_context(beside(pair, attack))
        wait_until(lambda: pair.gateway.refused(ATTACKS[attacks[0]]) > before[attacks[0]])
        for context, headers in ways:
            tries = [threads.submit(served, pair, port, context, headers) for _ in range(count)]
            assert sum(each.result() for each in tries) >= 0.99 * count, headers
        for attack in attacks:
            print(attack, pair.gateway.refused(ATTACKS[attack]) - before[attack])
