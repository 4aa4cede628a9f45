"""A message server under its own uid, whose key service is behind a gateway."""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import needs
from tests.harness import forked
from tests.harness.certificates import Authority
from tests.harness.gateways import Pair
from tests.harness.message_server import ADMIN, Server, server
from tests.harness.waiting import wait_until

MESSAGE_SERVER = 45_691
"""Its uid, which belongs to nobody on the machine."""
NAME = "spiffe://prod/chat/api"


@contextlib.contextmanager
def remote_server(pair: Pair) -> Iterator[tuple[Server, Path]]:
    """The server, and the directory of its files."""
    needs.interpreter_for(MESSAGE_SERVER)
    user = [needs.program("setpriv"), f"--reuid={MESSAGE_SERVER}", f"--regid={MESSAGE_SERVER}", "--clear-groups"]
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        base = Path(name)
        base.chmod(0o755)
        (base / "db").mkdir()
        for path in (base / "db", *pair.client(uri=NAME).write(base)):
            subprocess.run(["chown", str(MESSAGE_SERVER), path], check=True)
        settings = {
            "KMS_URL": f"https://localhost:{pair.gateway.port}",
            "KMS_CA": str(pair.gateway.ca_file),
            "KMS_CERT": str(base / "client.pem"),
            "KMS_KEY": str(base / "client.key"),
        }
        with server(base, settings, launcher=user) as progressdb:
            yield progressdb, base


def run(progressdb: Server, base: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return forked.run("progressdb_server", *words, "--db", base / "db", env=progressdb.environ)


def test_messages_are_appended_and_rotated_through_a_gateway() -> None:
    with Pair() as pair, remote_server(pair) as (progressdb, base):
        thread = progressdb.ask("POST", "/v1/threads", {"title": "T", "author": "ada"}).body["id"]
        for number in range(5):
            posted = progressdb.ask("POST", "/v1/messages", {"thread": thread, "author": "ada", "body": number})
            assert posted.status == 200, posted
        rotate = {"thread_id": thread}
        rotated = progressdb.ask("POST", "/admin/rotate_thread_dek?wait=true", rotate, key=ADMIN)
        assert (rotated.status, rotated.body["status"]) == (200, "ok"), rotated
        listed = progressdb.ask("GET", f"/v1/threads/{thread}/messages").body["messages"]
        assert [message["body"] for message in listed] == list(range(5))

        refused = progressdb.ask("POST", "/admin/rotate_thread_dek", {**rotate, "destroy_old_after": "1s"}, key=ADMIN)
        assert (refused.status, "no gateway" in refused.body["error"]) == (409, True), refused

        metrics = progressdb.ask("GET", "/metrics", key=ADMIN).body.decode()
        assert re.findall(r"^progressdb_kms_(?:exclusive|gateway|up) .*$", metrics, re.MULTILINE) == [
            "progressdb_kms_up 1.0", "progressdb_kms_exclusive 0.0", "progressdb_kms_gateway 1.0",
        ]  # fmt: skip
        status = json.loads(
            run(progressdb, base, "status", "--json", "--url", f"http://127.0.0.1:{progressdb.port}").stdout
        )
        assert status["key_service"].items() >= {
            "status": "ok", "exclusive": False, "url": progressdb.environ["PROGRESSDB_KMS_URL"],
        }.items()  # fmt: skip
        checked = run(progressdb, base, "check", "--json")
        assert (checked.returncode, json.loads(checked.stdout)["records_opened"]) == (0, True), checked
        actors = {event["actor"] for event in pair.audited() if event["type"] == "reencrypt_batch"}
        assert actors == {NAME}
        assert not (base / "db" / "kms").exists(), "nothing was spawned"

        pair.gateway.kill()
        message = {"thread": thread, "author": "ada", "body": "later"}
        assert progressdb.ask("POST", "/v1/messages", message).status == 503
        pair.gateway.start()
        wait_until(lambda: progressdb.ask("POST", "/v1/messages", message).status == 200)


def test_a_server_that_the_gateway_refuses_does_not_start() -> None:
    with Pair() as pair, tempfile.TemporaryDirectory() as name:
        Authority("others").issue(uris=[NAME]).write(Path(name))
        environ = {
            "PROGRESSDB_KMS_URL": f"https://localhost:{pair.gateway.port}",
            "PROGRESSDB_KMS_CA": str(pair.gateway.ca_file),
            "PROGRESSDB_KMS_CERT": f"{name}/client.pem",
            "PROGRESSDB_KMS_KEY": f"{name}/client.key",
        }
        command = [sys.executable, "-m", "progressdb_server", "--addr", "127.0.0.1:0", "--db", f"{name}/db"]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1
        assert "refuses this client" in done.stderr
        assert f"{name}/client.pem" in done.stderr
