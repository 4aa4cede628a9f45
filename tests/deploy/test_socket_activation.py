"""Three users, as `deploy/systemd` sets them up: root, the user of the key service, and a client in its group.

With `minikms.socket` root listens and passes the socket; without it the key service listens itself. A client compares
the uid that called listen(2) with the uids that it accepts, so the daemon must not call listen on a passed socket.
"""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms.api.errors import KmsUntrustedServerError
from minikms.client.connecting import server_uid
from tests import needs
from tests.deploy import service_manager
from tests.harness.live_daemon import LiveDaemon
from tests.harness.ports import free_port
from tests.minikms_daemon.server import foreign

SERVICE_UID = foreign.UID
CLIENT_UID = foreign.UID + 1
SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
FLAGS = ("--socket-mode", "0660", "--allowed-uids", str(CLIENT_UID))
AS_SERVICE = """\
import os, sys
os.setgroups([])
os.setresgid({uid}, {uid}, {uid})
os.setresuid({uid}, {uid}, {uid})
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can enter, with the data directory and the key file of the service's user."""
    needs.interpreter_for(SERVICE_UID)
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        base = Path(name)
        base.chmod(0o755)
        for directory, mode in (("run", 0o750), ("data", 0o700)):
            (base / directory).mkdir()
            (base / directory).chmod(mode)
            os.chown(base / directory, SERVICE_UID, SERVICE_UID)
        (base / "data.master-key").touch(0o600)
        os.chown(base / "data.master-key", SERVICE_UID, SERVICE_UID)
        yield base


def passed_by_root(place: Path) -> LiveDaemon:
    path = place / "run" / "s"
    program = (sys.executable, service_manager.__file__, str(path), str(SERVICE_UID))
    return LiveDaemon(place, "file", *FLAGS, program=program, socket=path)


def made_by_the_service(place: Path) -> LiveDaemon:
    launcher = place / "launcher.py"
    launcher.write_text(AS_SERVICE.format(uid=SERVICE_UID))
    path = place / "run" / "s"
    return LiveDaemon(place, "file", *FLAGS, launcher=(str(launcher),), socket=path, server_uids={SERVICE_UID})


def process_uid(pid: int) -> int:
    found = re.search(r"^Uid:\t(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_a_passed_socket_keeps_the_uid_of_the_user_who_listened(place: Path) -> None:
    """SO_PEERCRED is taken at listen(2): a second call would replace root by the service. A client trusts root."""
    with passed_by_root(place) as daemon:
        path = str(daemon.socket)

        def use() -> list[Any]:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                seen = server_uid(sock)
            with minikms.Client(path) as client:
                key = client.create_dek_for_thread("thread")
                return [seen, client.decrypt(key.key_id, client.encrypt(key.key_id, b"text")).decode()]

        assert process_uid(daemon.pid) == SERVICE_UID
        assert foreign.run_as(CLIENT_UID, use, groups=(SERVICE_UID,)) == [0, "text"]


def documented_environment() -> dict[str, str]:
    """The variables that the README writes to progressdb.env, with the uids of this test."""
    command = re.search(
        r"^\(.*\n?.*> /etc/progressdb/progressdb\.env\)$", (SYSTEMD / "README.md").read_text(), re.MULTILINE
    )
    assert command is not None
    text = command[0].replace("$(id -u minikms)", str(SERVICE_UID))
    for role in ("key", "admin_key"):
        text = text.replace("$(openssl rand -hex 24)", role, 1)
    return dict(re.findall(r"(PROGRESSDB_\w+)=([\w,]+)", text))


def post_thread(port: int) -> int | None:
    """The status of a request that needs the key service; None when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = json.dumps({"title": "t", "author": "a"})
        connection.request("POST", "/v1/threads", body, {"X-API-Key": "key", "X-User-ID": "a"})
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("listener", ["root", "the service"])
def test_the_documented_server_accepts_whoever_listens(place: Path, listener: str) -> None:
    """The message server as the client's user, with the environment of its unit and of the README."""
    with passed_by_root(place) if listener == "root" else made_by_the_service(place) as daemon:
        database = place / "db"
        database.mkdir(0o700)
        os.chown(database, CLIENT_UID, CLIENT_UID)
        port = free_port()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PROGRESSDB_")}
        settings = {"PROGRESSDB_KMS_SOCKET": str(daemon.socket), "PROGRESSDB_KMS_SPAWN": "0"}
        with (place / "server-log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "progressdb_server", "--addr", f"127.0.0.1:{port}", "--db", str(database)],
                env=inherited | settings | documented_environment(),
                stdout=log,
                stderr=log,
                user=CLIENT_UID,
                group=CLIENT_UID,
                extra_groups=[SERVICE_UID],
                cwd=database,
            )
        try:
            deadline = time.monotonic() + 60
            while (status := post_thread(port)) is None:
                assert process.poll() is None and time.monotonic() < deadline, (place / "server-log").read_text()
                time.sleep(0.05)
        finally:
            process.terminate()
            process.wait(60)
    assert status is not None and status < 300, (place / "server-log").read_text()


def test_a_client_with_its_defaults_refuses_a_service_that_listens_itself(place: Path) -> None:
    """So the documented environment names the service's user."""
    with made_by_the_service(place) as daemon:
        path = daemon.socket

        def use() -> list[str]:
            answers = []
            for uids in (None, {0, SERVICE_UID}):
                try:
                    with minikms.Client(path, server_uids=uids, wait_s=0) as client:
                        client.create_dek_for_thread("thread")
                    answers.append("served")
                except KmsUntrustedServerError:
                    answers.append("refused")
            return answers

        assert foreign.run_as(CLIENT_UID, use, groups=(SERVICE_UID,)) == ["refused", "served"]
