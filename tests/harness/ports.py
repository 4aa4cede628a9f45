"""Ports for programs whose port is chosen before they start.

Owns: the choice of a TCP port. Invariants: no outgoing connection takes it, and no other process of the same run of the
tests chooses it, so that it is still free when the program binds it, and after its restart.
"""

import contextlib
import os
import random
import socket

PORTS = (20_000, 32_000)
"""Below the ports that the kernel gives to connections."""
WORKERS_COUNT_MAX = 64


def free_port() -> int:
    """A port that nobody listens on. Each process of pytest-xdist has ports of its own."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ones."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS_COUNT_MAX
    ports: list[int] = []
    with contextlib.ExitStack() as listeners:
        while len(ports) < count:
            port = random.randrange(PORTS[0] + worker, PORTS[1], WORKERS_COUNT_MAX)
            with contextlib.suppress(OSError):
                listeners.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
    return ports
