"""A message server whose key service has a policy file: its own grant is enough, and its limit is a 503."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness.callers import PolicyDaemon
from tests.harness.ports import free_port
from tests.harness.waiting import wait_until

START_S_MAX = 60.0
SHIPPED = Path(__file__).parents[2] / "deploy" / "policy.toml"
ADMIN, BACKEND = "admin-key", "backend-key"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any


class Server:
    """A `progressdb` that starts no key service of its own."""

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, method: str, path: str, body: object = None, *, key: str = BACKEND) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = None if body is None else json.dumps(body)
            connection.request(
                method, path, sent, {"X-API-Key": key, "X-User-ID": "ada", "Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            text = answer.read()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, headers, json.loads(text) if text[:1] in (b"{", b"[") else text)
        finally:
            connection.close()


@contextlib.contextmanager
def server(base: Path, daemon: PolicyDaemon) -> Iterator[Server]:
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")} | {
        "PROGRESSDB_KMS_SOCKET": str(daemon.socket),
        "PROGRESSDB_KMS_SPAWN": "0",
        "PROGRESSDB_KMS_EXCLUSIVE": "1",
        "PROGRESSDB_API_BACKEND_KEYS": BACKEND,
        "PROGRESSDB_API_ADMIN_KEYS": ADMIN,
    }
    command = [sys.executable, "-m", "progressdb_server", "--addr", f"127.0.0.1:{port}", "--db", str(base / "db")]
    with (base / "server-log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    made = Server(port)
    try:
        deadline = time.monotonic() + START_S_MAX
        while True:
            with contextlib.suppress(OSError):
                if made.ask("GET", "/readyz").status == 200:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (base / "server-log").read_text()
            time.sleep(0.05)
        yield made
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def public() -> Iterator[Path]:
    """Not the temporary directory of pytest, whose parents are private."""
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        yield Path(name)


def test_the_shipped_grant_is_enough_and_its_limit_is_a_503(public: Path) -> None:
    """With the uid of this test in the place of the server's, and fewer decryptions."""
    shipped = SHIPPED.read_text()
    policy = shipped.replace("uid:0", "uid:1").replace("uid:991", "uid:0").replace("version = 1", "")
    limited = policy.replace("decrypts_per_hour = 500000", "decrypts_per_hour = 40")
    assert limited != policy
    with PolicyDaemon(public, limited) as daemon, server(public, daemon) as progressdb:
        thread = progressdb.ask("POST", "/v1/threads", {"title": "T", "author": "ada"}).body["id"]
        for number in range(5):
            posted = progressdb.ask("POST", "/v1/messages", {"thread": thread, "author": "ada", "body": number})
            assert posted.status == 200, posted
        answers = [progressdb.ask("GET", f"/v1/threads/{thread}/messages")]
        while answers[-1].status == 200:
            answers.append(progressdb.ask("GET", f"/v1/threads/{thread}/messages"))
            assert len(answers) < 40
        assert len(answers) > 3, "some were read"
        refused = answers[-1]
        assert refused.status == 503
        assert "a limit of its policy is used up" in refused.body["error"]
        assert 0 < int(refused.headers["retry-after"]) <= 450, "five of 40 in an hour"
        assert progressdb.ask("POST", "/v1/messages", {"thread": thread, "author": "ada", "body": 6}).status == 200
        wait_until(lambda: progressdb.ask("GET", "/readyz").status == 200)  # writes go on
        daemon.write_policy(policy)
        os.kill(daemon.pid, 1)
        deadline = time.monotonic() + START_S_MAX
        while progressdb.ask("GET", f"/v1/threads/{thread}/messages").status != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rotate = "/admin/rotate_thread_dek?wait=true", {"thread_id": thread}
        rotated = progressdb.ask("POST", *rotate, key=ADMIN)
        assert (rotated.status, rotated.body["status"]) == (200, "ok"), rotated
