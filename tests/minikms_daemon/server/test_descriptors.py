"""Connections under a small limit of open files: the real daemon, with that limit."""

import contextlib
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.http.accepting import CONNECTIONS_COUNT_MIN, DESCRIPTORS_RESERVED_COUNT
from minikms_daemon.server.admission import UID_CONNECTIONS_SHARE
from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.minikms_daemon.server import foreign

BOUND = 40
OF_A_UID = BOUND // UID_CONNECTIONS_SHARE
FEW = DESCRIPTORS_RESERVED_COUNT + BOUND
CONNECTING = DESCRIPTORS_RESERVED_COUNT + 32  # more than a limit of the reserved descriptors admits
CPU_SHARE_MAX = 0.5  # of one processor; a loop that spins takes all of it
WAIT_S_MAX = 60.0
STATUS = b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(daemon: LiveDaemon, opened: contextlib.ExitStack) -> socket.socket:
    connection = opened.enter_context(socket.socket(socket.AF_UNIX))
    connection.settimeout(WAIT_S_MAX)
    connection.connect(str(daemon.socket))
    return connection


def answered(connection: socket.socket) -> int:
    """The status of the answer to a request, or of the refusal that came before the request was sent."""
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(STATUS)
    return int(connection.recv(65536).split()[1])


def http_status(client: Any) -> dict[str, int]:
    return dict(msgspec.structs.asdict(client.status().http))


def warnings_of(daemon: LiveDaemon) -> list[str]:
    with daemon.client() as client:
        found = client.status().warnings
    return [warning for warning in found if "open files" in warning]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process: fields 14 and 15 of proc_pid_stat(5)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def leave_few_descriptors(daemon: LiveDaemon) -> None:
    """Lower the soft limit of the running daemon to the descriptors that it reserves for other uses than connections.

    How many it has open is not known here: only root may read /proc/<pid>/fd of a process that is not dumpable.
    """
    hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS_RESERVED_COUNT, hard))


def test_the_soft_limit_is_raised_for_every_promised_connection(tmp_path: Path) -> None:
    with needs.descriptors(api.CONNECTIONS_MAX + DESCRIPTORS_RESERVED_COUNT):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with LiveDaemon(tmp_path, "file", limits={resource.RLIMIT_NOFILE: (256, hard)}) as daemon:
        soft, hard_after = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        with daemon.client() as client:
            assert http_status(client)["connections_max"] == api.CONNECTIONS_MAX
        assert warnings_of(daemon) == []
    assert (soft, hard_after) == (api.CONNECTIONS_MAX + DESCRIPTORS_RESERVED_COUNT, hard)


def test_a_small_hard_limit_lowers_the_bound_with_a_warning(tmp_path: Path) -> None:
    """Status and log say so; connections beyond the bound take the places of those that have waited longest."""
    with (
        LiveDaemon(tmp_path, "file", limits={resource.RLIMIT_NOFILE: (64, FEW)}) as daemon,
        contextlib.ExitStack() as opened,
    ):
        assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (FEW, FEW)
        assert len(warnings_of(daemon)) == 1
        assert f"admits {BOUND} connections instead of {api.CONNECTIONS_MAX}" in daemon.log.read_text()
        with daemon.client() as client:
            assert http_status(client)["connections_max"] == BOUND
        for _ in range(2 * OF_A_UID):  # a place is given up once it has waited for PLACE_SECONDS_MIN
            wait_until(lambda: answered(connect(daemon, opened)) == 200)
        with daemon.client() as client:
            assert http_status(client)["connections"] <= OF_A_UID


def test_too_few_descriptors_to_serve_refuse_the_start(tmp_path: Path) -> None:
    limit = DESCRIPTORS_RESERVED_COUNT + CONNECTIONS_COUNT_MIN - 1
    with pytest.raises(AssertionError, match=f"the limit of open files is {limit}, and at least"):
        LiveDaemon(tmp_path, "file", limits={resource.RLIMIT_NOFILE: (limit, limit)})


def test_without_descriptors_the_open_connections_are_served(tmp_path: Path) -> None:
    """The limit is lowered while the daemon runs: accept fails, is counted, and does not spin."""
    with LiveDaemon(tmp_path, "file") as daemon, contextlib.ExitStack() as opened, daemon.client() as client:
        key = client.create_dek_for_thread("thread").key_id
        sealed = client.encrypt(key, b"text")  # opens the files that the key needs
        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        leave_few_descriptors(daemon)
        waiting = [connect(daemon, opened) for _ in range(CONNECTING)]
        # The second failure comes when the first pause has ended.
        wait_until(lambda: http_status(client)["accept_failures"] > 1)
        admitted = http_status(client)["connections"]
        assert 1 < admitted < len(waiting)
        started, cpu_before = time.monotonic(), cpu_seconds(daemon.pid)
        time.sleep(1.5)
        assert cpu_seconds(daemon.pid) - cpu_before < CPU_SHARE_MAX * (time.monotonic() - started)
        assert client.decrypt(key, sealed) == b"text"
        assert client.decrypt(key, client.encrypt(key, b"more")) == b"more"
        served, late = waiting[: admitted - 1], waiting[admitted - 1 :]
        assert [answered(connection) for connection in served] == [200] * len(served)
        failures = http_status(client)["accept_failures"]
        assert failures > 1
        assert daemon.log.read_text().count("accept failed") == 1
        for connection in served:
            connection.close()
        assert answered(late[0]) == 200
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
        assert [answered(connection) for connection in late] == [200] * len(late)
        assert http_status(client)["accept_failures"] >= failures


def test_a_stop_while_connections_wait_for_descriptors_is_clean(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path, "file") as daemon, contextlib.ExitStack() as opened, daemon.client() as client:
        client.status()
        hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
        leave_few_descriptors(daemon)
        for _ in range(CONNECTING):
            connect(daemon, opened)
        wait_until(lambda: http_status(client)["accept_failures"] > 0)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
        daemon.process.terminate()
        assert daemon.process.wait(60) == 0
        assert "internal error" not in daemon.log.read_text()


def test_other_users_get_a_share_of_a_small_bound(public: Path) -> None:
    """They hold as many connections as they can; the allowed user still connects."""
    limits = {resource.RLIMIT_NOFILE: (FEW, FEW)}
    with LiveDaemon(public, "file", "--socket-mode", "0666", limits=limits) as daemon:

        def occupy() -> int:
            with contextlib.ExitStack() as opened:
                held = [connect(daemon, opened) for _ in range(BOUND)]
                return foreign.closed_count(held, BOUND - BOUND // 4)

        assert foreign.run_as(foreign.UID, occupy) == BOUND - BOUND // 4
        assert "internal error" not in daemon.log.read_text()
