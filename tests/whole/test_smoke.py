"""The first work of each program. `make quick` always runs these."""

from pathlib import Path

import pytest

from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.message_server import server


def test_the_message_server_stores_what_the_key_service_encrypts(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon, server(tmp_path, {"KMS_SOCKET": str(daemon.socket), "KMS_SPAWN": "0"}) as made:
        sent = made.ask("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": "secret"})
        assert sent.status == 200, sent
        [row] = made.ask("GET", "/v1/threads/t/messages").body["messages"]
        assert row["body"] == "secret"
        keys = forked.run("minikms", "keys", "list", "--socket", daemon.socket)
        assert (keys.returncode, keys.stdout.count("active")) == (0, 1), keys


@pytest.mark.parametrize(
    ("program", "command"),
    [
        ("minikms_auditor", "check-config"),
        ("minikms_gateway", "check-config"),
        ("minikms_replicator", "status"),
        ("minikms_unlock", "doctor"),
    ],
)
def test_a_helper_reads_its_configuration(tmp_path: Path, program: str, command: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text("version = 1\nunknown = 1\n")
    done = forked.run(program, command, "--config", config)
    assert (done.returncode, "unknown" in done.stderr) == (2, True), done
