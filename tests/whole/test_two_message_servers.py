"""Two `progressdb` processes, one PostgreSQL, one miniKMS: what one has acknowledged, the other obeys."""

import os
import subprocess
import sys
from pathlib import Path

from tests.harness import postgres
from tests.harness.live_daemon import LiveDaemon
from tests.harness.message_server import ADMIN, server
from tests.harness.postgres import url_of
from tests.harness.waiting import wait_until


def command(settings: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {f"PROGRESSDB_{name}": value for name, value in settings.items()}
    return subprocess.run(
        [sys.executable, "-P", "-m", "progressdb_server", *words],
        env=environ, cwd="/", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_two_servers_on_one_database_have_one_truth(tmp_path: Path) -> None:
    one_dir, two_dir, kms_dir = (tmp_path / name for name in ("one", "two", "kms"))
    for directory in (one_dir, two_dir, kms_dir):
        directory.mkdir()
    with postgres.running() as (given, data), LiveDaemon(kms_dir) as daemon:
        url = url_of(given)
        settings = {"STORE_URL": url, "STORE_SINGLE_NODE": "1", "KMS_SOCKET": str(daemon.socket), "KMS_SPAWN": "0"}
        database = {"STORE_URL": url}
        assert command(database, "store", "init").stdout == "the store is made\n"
        assert "holds a store already" in command(database, "store", "init").stderr
        assert command(database, "store", "upgrade").stdout == "the store has schema 1\n"
        quorum = {name: value for name, value in settings.items() if name != "STORE_SINGLE_NODE"}
        refused = command(quorum, "--db", str(one_dir / "db"))
        assert refused.returncode == 1 and "set synchronous_standby_names there" in refused.stderr
        with server(one_dir, settings) as one, server(two_dir, settings) as two:
            made = one.ask("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": "the secret text"})
            assert made.status in (200, 201), made
            assert one.ask("POST", "/v1/threads/t/members", {"members": ["bob"]}, key=ADMIN).status == 200
            listed = two.ask("GET", "/v1/threads/t/messages")
            assert [message["body"] for message in listed.body["messages"]] == ["the secret text"]
            assert "bob" in two.ask("GET", "/v1/threads/t/members").body["members"]
            assert one.ask("DELETE", "/v1/threads/t/members?member=bob", key=ADMIN).status in (200, 204)
            assert "bob" not in two.ask("GET", "/v1/threads/t/members").body["members"]
            begun = two.ask("POST", "/admin/rotate_thread_dek", {"thread_id": "t"}, key=ADMIN)
            job = f"/admin/jobs/{begun.body['job_id']}"
            wait_until(lambda: one.ask("GET", job, key=ADMIN).body["status"] == "done")
            message = made.body["id"]
            assert one.ask("DELETE", f"/v1/messages/{message}").status in (200, 204)
            assert two.ask("GET", "/v1/threads/t/messages").body["messages"] == []
            assert one.ask("DELETE", "/v1/threads/t").status in (200, 204)
            assert two.ask("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": "x"}).status == 403
        found = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    assert b"kms:map:thread:t" in found and b"the secret text" not in found
