"""What the versions of a large message cost a real server: bytes on the disk, and memory while they are read.

Each change of reactions once stored the whole message again, and all versions were loaded at once: 120 reactions to a
message of 1 MB cost 120 MB on the disk, and reading its versions several times as much memory.
"""

import contextlib
import http.client
import json
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.progressdb_server.api.asgi_client import FRONTEND, signed
from tests.progressdb_server.api.real_server import RealServer, real_server

MEGABYTE = 1_000_000
DISK_BYTES_MAX = 5 * MEGABYTE
MEMORY_BYTES_MAX = 30 * 1024 * 1024
READ_BYTES = 256 * 1024


class Cost(NamedTuple):
    disk_bytes: int
    memory_bytes: int
    received_bytes: int


def memory(server: RealServer, field: str) -> int:
    """VmRSS: bytes in memory now; VmHWM: the most since the start."""
    for line in Path(f"/proc/{server.pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def stored_bytes(server: RealServer) -> int:
    size = 0
    for path in (server.db / "store").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the engine has removed it meanwhile
            size += path.stat().st_size
    return size


def read_versions(server: RealServer, message: str, query: str = "", wait_s: float = 0.0) -> tuple[int, int]:
    """The bytes received, and the most memory of the server that was seen meanwhile. `wait_s` makes a slow reader."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        headers = {"X-API-Key": FRONTEND, **signed("ann")}
        connection.request("GET", f"/v1/messages/{message}/versions{query}", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200
        received = seen = 0
        while part := answer.read(READ_BYTES):
            received += len(part)
            seen = max(seen, memory(server, "VmRSS"))
            time.sleep(wait_s)
        return received, seen
    finally:
        connection.close()


def cost_of(directory: Path, *, reactions: int, edits: int, wait_s: float) -> Cost:
    """Of changes by a signed user of a front end to his own message, and of reading all its versions."""
    with real_server(directory) as server:

        def call(method: str, target: str, body: object) -> bytes:
            reply = server(method, target, body, key=FRONTEND, headers=signed("ann"))
            assert reply.status == 200, reply
            return reply.body

        message = json.loads(call("POST", "/v1/messages", {"body": "x" * MEGABYTE}))["id"]
        before = stored_bytes(server)
        for number in range(reactions):
            call("POST", f"/v1/messages/{message}/reactions", {"id": "ann", "reaction": str(number)})
        disk = stored_bytes(server) - before
        for number in range(edits):
            call("PUT", f"/v1/messages/{message}", {"body": str(number) * MEGABYTE})
        read_versions(server, message, "?limit=2")  # loads what any request needs
        idle, peak = memory(server, "VmRSS"), memory(server, "VmHWM")
        received, seen = read_versions(server, message, wait_s=wait_s)
        highest = memory(server, "VmHWM")
        return Cost(disk, max(seen, highest if highest > peak else 0) - idle, received)


def check(cost: Cost, versions: int) -> None:
    assert cost.received_bytes > versions * MEGABYTE
    assert cost.disk_bytes < DISK_BYTES_MAX, cost
    assert cost.memory_bytes < MEMORY_BYTES_MAX, cost


def test_reactions_to_a_large_message_cost_little_disk_and_memory(tmp_path: Path) -> None:
    """A slice of the torture below."""
    check(cost_of(tmp_path, reactions=40, edits=2, wait_s=0.0), 43)


@pytest.mark.torture
@pytest.mark.timeout(600)
@pytest.mark.parametrize("wait_s", [0.0, 0.005], ids=["a fast reader", "a slow reader"])
def test_many_reactions_and_edits_of_a_large_message_cost_little(tmp_path: Path, wait_s: float) -> None:
    check(cost_of(tmp_path, reactions=120, edits=0, wait_s=wait_s), 121)
    (tmp_path / "edited").mkdir()
    check(cost_of(tmp_path / "edited", reactions=1000, edits=60, wait_s=wait_s), 1061)
