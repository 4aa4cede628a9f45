"""What a server says of itself when its disk or its key service does not work, and what it does about it."""

import contextlib
import os
import re
import resource
import signal
from pathlib import Path

import pytest

from minikms import Client
from minikms.audit.reader import LOG_NAME
from progressdb_server.kms.supervisor import HANGS, REFUSES
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.small_disks import filled, small_disk
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.asgi_client import ADMIN
from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.api.viewer_client import ViewerClient

HANG_S_MAX = 100.0


def ready(server: RealServer) -> tuple[int, bytes]:
    reply = server("GET", "/readyz", key=None)
    return reply.status, reply.body


READY, NOT_READY = (200, b'{"status":"ok"}'), (503, b'{"error":"not ready"}')


def status(server: RealServer, **more: str) -> tuple[int, str]:
    environment = {"PROGRESSDB_API_ADMIN_KEYS": ADMIN, "PROGRESSDB_DB_PATH": str(server.db), **more}
    done = forked.run("progressdb_server", "status", "--url", f"http://127.0.0.1:{server.port}", env=environment)
    return done.returncode, done.stdout


def test_a_spawned_key_service_that_hangs_is_killed_and_another_serves(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        assert server("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": 1}).status == 200
        wait_until(lambda: ready(server) == READY)
        with Client(server.db / "run" / "minikms.sock") as kms:
            pid = kms.status().pid
        assert isinstance(pid, int)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: ready(server) == NOT_READY, seconds=HANG_S_MAX)
        assert server("GET", "/healthz", key=None).status == 200
        wait_until(
            lambda: "miniKMS hangs and is killed" in {event["event"] for event in server.log}, seconds=HANG_S_MAX
        )
        wait_until(lambda: ready(server) == READY, seconds=HANG_S_MAX)
        with Client(server.db / "run" / "minikms.sock") as kms:
            assert kms.status().pid != pid
        assert server("POST", "/v1/messages", {"thread": "t", "author": "ada", "body": 2}).status == 200
        wait_until(lambda: status(server)[0] == 0)
        assert not Path(f"/proc/{pid}").exists()


def test_a_found_key_service_that_hangs_makes_the_server_not_ready(tmp_path: Path) -> None:
    """It is not this server's to kill. Status says why, and the server is ready again when it goes on. One that can't
    write its audit log refuses, and does not hang."""
    (tmp_path / "kms").mkdir()
    (tmp_path / "server").mkdir()
    with LiveDaemon(tmp_path / "kms") as kms:
        variables = {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        with real_server(tmp_path / "server", environment=variables) as server:
            wait_until(lambda: status(server, **variables)[0] == 0)
            os.kill(kms.pid, signal.SIGSTOP)
            try:
                wait_until(lambda: ready(server) == NOT_READY, seconds=HANG_S_MAX)
                exit_status, said = status(server, **variables)
                assert (exit_status, "its key service does not work" in said) == (1, True), said
                wait_until(lambda: any(e["event"].startswith("miniKMS hangs") for e in server.log), seconds=HANG_S_MAX)
                probes = [event for event in server.log if event.get("route") == "/readyz" and event["status"] == 503]
                assert {event["level"] for event in probes} == {"debug"}
                assert [event["event"] for event in server.log].count("not_ready") == 1
            finally:
                os.kill(kms.pid, signal.SIGCONT)
            wait_until(lambda: ready(server) == READY, seconds=HANG_S_MAX)
            hung = [event["event"] for event in server.log]
            # Each write that extends the audit log fails: it answers, and refuses.
            unlimited = resource.prlimit(kms.pid, resource.RLIMIT_FSIZE)
            size = (kms.data_dir / LOG_NAME).stat().st_size
            resource.prlimit(kms.pid, resource.RLIMIT_FSIZE, (size, unlimited[1]))
            wait_until(lambda: ready(server) == NOT_READY, seconds=HANG_S_MAX)
            wait_until(lambda: any(event["event"] == REFUSES for event in server.log), seconds=HANG_S_MAX)
            resource.prlimit(kms.pid, resource.RLIMIT_FSIZE, unlimited)
            wait_until(lambda: ready(server) == READY, seconds=HANG_S_MAX)
            assert HANGS not in [event["event"] for event in server.log][len(hung) :]
            wait_until(lambda: "audit log written again" in kms.log.read_text())
    assert kms.log.read_text().count("audit log refused") == 1


def test_a_store_on_a_full_disk_is_not_ready_and_status_says_why(tmp_path: Path) -> None:
    """The key service is on another disk. No write was refused before."""
    (tmp_path / "kms").mkdir()
    with small_disk(tmp_path / "small") as disk, LiveDaemon(tmp_path / "kms") as kms:
        variables = {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        place = tmp_path / "server"  # its log is not on the small disk
        place.mkdir()
        (place / "db").symlink_to(disk)
        with real_server(place, environment=variables) as server:
            wait_until(lambda: ready(server) == READY)
            with filled(disk):
                wait_until(lambda: ready(server) == NOT_READY, seconds=HANG_S_MAX)
                exit_status, said = status(server, **variables)
                assert exit_status == 1
                assert "it takes no writes: the store's disk does not take writes: No space left on device" in said
                reason = server("GET", "/admin/readiness", key=ADMIN).json
                assert (reason["ready"], reason["key_service"]) == (False, "")
            wait_until(lambda: ready(server) == READY, seconds=HANG_S_MAX)
            wait_until(lambda: status(server, **variables)[0] == 0)
            assert server("POST", "/v1/messages", {"author": "ada", "body": 1}).status == 200


def test_a_key_service_that_can_make_no_key_is_named_by_every_program(tmp_path: Path) -> None:
    """Its data directory is on a full disk before the first key; its audit log and the store are elsewhere."""
    base = tmp_path / "kms"
    log_dir = base / "audit"
    log_dir.mkdir(0o700, parents=True)
    (tmp_path / "server").mkdir()
    with contextlib.ExitStack() as stack:
        disk = stack.enter_context(small_disk(base / "data"))
        disk.chmod(0o700)
        kms = stack.enter_context(LiveDaemon(base, "file", "--audit-dir", str(log_dir)))
        variables = {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        with real_server(tmp_path / "server", environment=variables) as server:
            wait_until(lambda: ready(server) == READY)
            with filled(disk):
                wait_until(lambda: ready(server) == NOT_READY, seconds=HANG_S_MAX)
                # The journal may have had room for one key.
                refused = [server("POST", "/v1/messages", {"author": "ada", "body": 1}) for _ in range(2)][1]
                assert (refused.status, refused.json) == (503, {"error": "the key service is not available now"})
                why = server("GET", "/admin/readiness", key=ADMIN).json["key_service"]
                full = "cannot be written: No space left on device"
                assert re.fullmatch(f"it can make no keys, so no thread: .* {full}", why)
                exit_status, said = status(server, **variables)
                assert (exit_status, said.count("failing: ")) == (1, 1), said
                assert re.search(f"failing: storage_unavailable: no key can be made or changed: .* {full};", said), said
                [logged] = [event["reason"] for event in server.log if event["event"] == "not_ready"]
                assert logged.startswith("it can make no keys, so no thread: ")
                refusals = [event for event in server.log if event.get("route") == "/v1/messages"]
                assert re.match("the key service is not available now: .* cannot be written", refusals[-1]["reason"])
            wait_until(lambda: ready(server) == READY, seconds=HANG_S_MAX)
            assert server("POST", "/v1/messages", {"author": "ada", "body": 1}).status == 200
    log = kms.log.read_text()
    assert (log.count("key files refused"), log.count("key files written again")) == (1, 1), log


@pytest.mark.parametrize("lost_by", [signal.SIGSTOP, signal.SIGKILL])
def test_the_viewer_shows_what_is_known_while_the_key_service_is_away(tmp_path: Path, lost_by: signal.Signals) -> None:
    (tmp_path / "kms").mkdir()
    (tmp_path / "server").mkdir()
    with LiveDaemon(tmp_path / "kms") as kms:
        variables = {"PROGRESSDB_KMS_SOCKET": str(kms.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        with real_server(tmp_path / "server", environment=variables) as server:
            thread = server("POST", "/v1/threads", {"title": "private title", "author": "ada"}).json["id"]
            message = server("POST", "/v1/messages", {"thread": thread, "author": "bob", "body": "private"}).json["id"]
            viewer = ViewerClient(server.port)
            viewer.login(ADMIN)
            assert "private title" in viewer("/viewer/threads").text
            epoch = re.search(r"<dt>Epoch</dt><dd>\d+</dd>", viewer("/viewer/status").text)
            assert epoch is not None
            os.kill(kms.pid, lost_by)
            try:
                shown = {
                    "/viewer/threads": (thread, "ada"),
                    f"/viewer/threads/{thread}": (thread, "ada", "bob", message),
                    f"/viewer/messages/{message}": (message, "bob"),
                }
                for path, words in shown.items():
                    reply = viewer(path)
                    assert reply.status == 200
                    assert "private" not in reply.text
                    for word in (*words, "What to do", 'role="alert"'):
                        assert word in reply.text, (path, word)
                assert viewer("/viewer/threads/nothing").status == 404
                # A good answer of the probe counts for PROBE_AGE_S.
                wait_until(lambda: "does not work" in viewer("/viewer/status").text)
                page = viewer("/viewer/status").text
                assert epoch[0] in page and "minikms doctor" in page
            finally:
                if lost_by == signal.SIGSTOP:
                    os.kill(kms.pid, signal.SIGCONT)
                else:
                    kms.process.wait()
                    kms.start()
            wait_until(lambda: "private title" in viewer("/viewer/threads").text, seconds=HANG_S_MAX)
            assert 'role="alert"' not in viewer(f"/viewer/threads/{thread}").text
