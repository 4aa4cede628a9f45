"""A root key in the server's environment: no descriptor of it is left, and without the key service the server ends."""

import contextlib
import os
import signal
from pathlib import Path

from tests import needs
from tests.harness import forked
from tests.harness.descriptors import open_files
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.real_server import RealServer, real_server

KEY = "0123456789abcdef" * 4
WAIT_S = 60.0


def descriptors_of_the_key(pid: int) -> list[str]:
    """The descriptors of the process through which the key can be read, or that are named like the one of the key."""
    found = []
    for path, target in open_files(pid).items():
        readable = target.startswith("/memfd:") or Path(target).is_file()
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if "master-key" in target or (readable and KEY.encode() in path.read_bytes()):
                found.append(target)
    return found


def kms_pid(server: RealServer) -> int:
    (pid,) = [event["pid"] for event in server.log if event["event"] == "miniKMS spawned"]
    return int(pid)


def test_the_search_finds_a_descriptor_of_the_key() -> None:
    descriptor = os.memfd_create("any name")
    try:
        os.pwrite(descriptor, KEY.encode(), 0)
        assert descriptors_of_the_key(os.getpid()) == ["/memfd:any name (deleted)"]
    finally:
        os.close(descriptor)


def test_neither_server_nor_key_service_keeps_a_descriptor_of_the_key(tmp_path: Path) -> None:
    needs.root()  # only root may list the descriptors of a process that is not dumpable
    with real_server(tmp_path, environment={"PROGRESSDB_MINIKMS_MASTER_KEY": KEY}) as server:
        assert server("POST", "/v1/messages", {"author": "ann", "body": 1}).status == 200
        assert descriptors_of_the_key(server.pid) == []
        needs.root()  # only root may list the descriptors of a process that is not dumpable
        assert descriptors_of_the_key(kms_pid(server)) == []


def test_without_its_key_service_the_server_ends_and_can_start_again(tmp_path: Path) -> None:
    with real_server(tmp_path, environment={"PROGRESSDB_MINIKMS_MASTER_KEY": KEY}) as server:
        message = server("POST", "/v1/messages", {"author": "ann", "body": "kept"}).json["id"]
        os.kill(kms_pid(server), signal.SIGKILL)
        wait_until(lambda: not server.running)
        assert server.stop() == 1
    log = server.log_path.read_text()
    assert "the server stops: its key service is lost" in log
    assert "start the server again with the variable" in log.splitlines()[-1]
    assert KEY not in log
    with real_server(tmp_path, environment={"PROGRESSDB_MINIKMS_MASTER_KEY": KEY}) as again:
        assert again("GET", f"/v1/messages/{message}").json["body"] == "kept"


def test_a_backup_command_passes_the_key_to_the_key_service_s_command(tmp_path: Path) -> None:
    with real_server(tmp_path, environment={"PROGRESSDB_MINIKMS_MASTER_KEY": KEY}) as server:
        server("POST", "/v1/messages", {"author": "ann", "body": 1})
    environment = {**os.environ, "PROGRESSDB_MINIKMS_MASTER_KEY": KEY}
    for words in (
        ["create", "one", "--db", str(server.db)],
        ["verify", "--backup", "one", "--db", str(server.db)],
    ):
        ended = forked.run("progressdb_server", "backup", *words, env=environment)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert KEY not in ended.stdout + ended.stderr
