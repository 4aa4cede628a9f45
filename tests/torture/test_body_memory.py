"""The memory that unfinished uploads take in the real server."""

import contextlib
import re
import socket
from pathlib import Path

import pytest

from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import BACKEND, FRONTEND, signature
from tests.progressdb_server.api.real_server import real_server

MIB = 1024 * 1024
UPLOADS = 200
BUDGET_BYTES = 64 * MIB
OVERHEAD_BYTES = 48 * MIB
"""Of buffers of the connections and of the allocator."""


def resident_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.torture
@pytest.mark.parametrize(
    ("caller", "share"),
    [
        (f"X-API-Key: {FRONTEND}\r\nX-User-ID: mallory\r\nX-User-Signature: {signature('mallory')}\r\n", 1 / 8),
        (f"X-API-Key: {BACKEND}\r\n", 1 / 2),
    ],
)
def test_unfinished_uploads_take_no_more_memory_than_the_budget(tmp_path: Path, caller: str, share: float) -> None:
    head = f"POST /v1/messages HTTP/1.1\r\nHost: x\r\n{caller}Content-Length: {MIB}\r\n\r\n".encode()
    environment = {"PROGRESSDB_BODY_BYTES": str(BUDGET_BYTES)}
    with real_server(tmp_path, environment=environment) as server, contextlib.ExitStack() as opened:
        before = resident_bytes(server.pid)
        refused = 0
        for _ in range(UPLOADS):
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60))
            connection.sendall(head + b'"'.ljust(MIB - 1, b"x"))
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                refused += connection.recv(12) == b"HTTP/1.1 503"
        assert refused >= UPLOADS - share * BUDGET_BYTES / MIB - 20  # an answer may come later
        grown = resident_bytes(server.pid) - before
        print(f"{UPLOADS} uploads, {refused} refused: {grown / MIB:.0f} MiB more memory")
        assert grown < share * BUDGET_BYTES + OVERHEAD_BYTES
        assert server("GET", "/healthz").status == 200
        if share == 1 / 8:
            wait_until(lambda: server("POST", "/v1/messages", {"author": "ann", "body": "x" * 500_000}).status == 200)
