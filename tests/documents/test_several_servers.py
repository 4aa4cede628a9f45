"""The commands of docs/several-servers.md, in their order, on a PostgreSQL of the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.documents.machine import blocks
from tests.harness import postgres
from tests.harness.live_daemon import LiveDaemon
from tests.harness.message_server import ADMIN, server

PAGE = Path(__file__).parents[2] / "docs" / "several-servers.md"


class Host:
    """Where the commands run; a variable that one block exports is there in the next ones."""

    def __init__(self, base: Path, socket_directory: str) -> None:
        programs = (str(Path(sys.executable).parent), needs.postgresql(), os.environ["PATH"])
        self.environ = {
            "PATH": os.pathsep.join(programs),
            "PGHOST": socket_directory,
            "PGUSER": "test",
            "PROGRESSDB_STORE_SINGLE_NODE": "1",
        }
        self._instead = {
            "/run/postgresql": socket_directory,
            "/var/lib/progressdb": str(base / "one" / "db"),
            "/backup/": f"{base}/",
        }

    def run(self, block: str, *, status: int = 0) -> str:
        for there, here in self._instead.items():
            block = block.replace(there, here)
        for line in block.splitlines():
            if line.startswith("export "):
                name, _, value = line.removeprefix("export ").partition("=")
                self.environ[name] = value.strip("'")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            env=self.environ, cwd="/", capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == status, (block, done.stdout, done.stderr)
        return done.stdout


def test_the_commands_for_several_servers_do_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up, move, alone, back_up, forget, look = blocks(PAGE)
    for name in ("kms", "one", "two"):
        (tmp_path / name).mkdir()
    with postgres.running() as (given, _), LiveDaemon(tmp_path / "kms") as daemon:
        host = Host(tmp_path, given.split()[0].removeprefix("host="))
        host.environ["PROGRESSDB_KMS_SOCKET"] = str(daemon.socket)
        settings = {"KMS_SOCKET": str(daemon.socket), "KMS_SPAWN": "0"}
        with server(tmp_path / "one", settings) as before:
            before.ask("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": "the text"})
        assert host.run(set_up) == "the store is made\n"
        copied = host.run(move)
        assert "are the same on both sides" in copied and copied.endswith("all is right\n")
        host.run(alone)
        listed = host.run(back_up)
        assert "monday is registered: begin it now" in listed and "of the database" in listed
        assert (tmp_path / "monday" / "PG_VERSION").exists()
        settings |= {"STORE_URL": host.environ["PROGRESSDB_STORE_URL"], "STORE_SINGLE_NODE": "1"}
        monkeypatch.setenv("PGUSER", host.environ["PGUSER"])
        with server(tmp_path / "two", settings) as after:
            answer = after.ask("GET", "/v1/threads/t/messages").body
            assert [message["body"] for message in answer["messages"]] == ["the text"]
            host.environ |= {"PROGRESSDB_ADDR": f"127.0.0.1:{after.port}", "PROGRESSDB_API_ADMIN_KEYS": ADMIN}
            assert host.run(forget).startswith("monday is forgotten")
            seen = host.run(look, status=1)  # this PostgreSQL runs without fsync
            assert "all is right" in seen
            assert "database: schema 1, takes writes, no synchronous standby, a Unix socket" in seen
            assert "problem: the database has fsync = off" in seen
