"""The supervisor keeps one miniKMS at the socket. Every test starts and ends real processes."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import uvloop

from minikms.client import AsyncClient
from progressdb_server.kms import supervisor as supervisor_module
from progressdb_server.kms.supervisor import Supervisor, SupervisorError
from tests.harness.logged import capture_logs
from tests.harness.unix_http import UnixConnection
from tests.harness.waiting import until, wait_until
from tests.progressdb_server.kms.conftest import Place

WAIT_S = 60.0
Alive = Callable[[int], bool]
Run = Callable[[Coroutine[Any, Any, int]], int]


def another_child(supervisor: Supervisor, pid: int) -> bool:
    return supervisor.child_pid not in (None, pid)


def start_alone(place: Place, **environment: str) -> subprocess.Popen[bytes]:
    """A daemon that the supervisor finds."""
    process = subprocess.Popen(
        [place.binary, "--socket", place.socket, "--data-dir", str(place.data)],
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    return process


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_it_spawns_a_daemon_where_none_answers_and_ends_it_with_itself(place: Place, alive: Alive, run: Run) -> None:
    async def main() -> int:
        supervisor = Supervisor(place.options())
        await supervisor.start()
        pid = supervisor.child_pid
        assert pid is not None
        async with AsyncClient(place.socket) as kms:
            assert (await kms.status()).pid == pid
        await supervisor.stop()
        await supervisor.stop()
        return pid

    with capture_logs() as logs:
        pid = run(main())
    assert not alive(pid)
    lines = [entry["line"] for entry in logs if entry["event"] == "miniKMS"]
    assert lines == ["fake daemon: serving", "fake daemon: stopped"]


def test_the_child_has_a_clean_environment_and_its_own_session(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It allows the server's uid."""

    def answered() -> dict[str, object]:
        """As the stand-in for miniKMS sends it."""
        with contextlib.closing(UnixConnection(Path(place.socket))) as connection:
            connection.request("GET", "/status")
            return dict(json.loads(connection.getresponse().read()))

    async def main() -> tuple[dict[str, object], int, int]:
        supervisor = Supervisor(place.options(dev=True, master_key_file="key-file"))
        await supervisor.start()
        try:
            pid = supervisor.child_pid
            assert pid is not None
            session = os.getsid(pid)
            return await asyncio.to_thread(answered), pid, session
        finally:
            await supervisor.stop()

    monkeypatch.setenv("PROGRESSDB_API_BACKEND_KEYS", "secret")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    status, pid, session = asyncio.run(main())
    environment = status["environment"]
    assert isinstance(environment, dict)
    assert environment["PROGRESSDB_MINIKMS_ALLOWED_UIDS"] == str(os.geteuid())
    assert set(environment) <= {"PROGRESSDB_MINIKMS_ALLOWED_UIDS", "LANG", "LC_ALL", "LC_CTYPE", "PATH", "TZ"}
    assert session == pid
    arguments = status["arguments"]
    assert isinstance(arguments, list)
    assert arguments[arguments.index("--master-key-file") + 1] == str(Path.cwd() / "key-file")
    assert "--dev" in arguments


def test_it_uses_a_daemon_that_answers_and_leaves_it_alone_at_the_end(place: Place) -> None:
    found = start_alone(place)
    try:

        async def main() -> None:
            supervisor = Supervisor(place.options())
            await supervisor.start()
            assert supervisor.child_pid is None
            await supervisor.stop()

        asyncio.run(main())
        assert found.poll() is None
    finally:
        found.terminate()
        found.wait()


def test_it_spawns_one_when_the_daemon_that_it_used_dies(place: Place) -> None:
    found = start_alone(place)
    try:

        async def main() -> None:
            supervisor = Supervisor(place.options())
            await supervisor.start()
            found.kill()
            found.wait()
            await until(lambda: supervisor.child_pid is not None)
            async with AsyncClient(place.socket, wait_s=WAIT_S) as kms:
                assert (await kms.status()).pid == supervisor.child_pid
            await supervisor.stop()

        asyncio.run(main())
    finally:
        found.kill()
        found.wait()


def test_a_daemon_that_is_killed_is_started_again_and_calls_go_on(place: Place) -> None:
    async def main() -> None:
        supervisor = Supervisor(place.options())
        await supervisor.start()
        async with AsyncClient(place.socket, wait_s=WAIT_S) as kms:
            key = await kms.create_dek_for_thread("thread-1")
            sealed = await kms.encrypt(key.key_id, b"before")
            for _ in range(2):
                pid = supervisor.child_pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                assert await kms.decrypt(key.key_id, sealed) == b"before"
                assert (await kms.status()).pid != pid
                await until(partial(another_child, supervisor, pid))
        await supervisor.stop()

    with capture_logs() as logs:
        asyncio.run(main())
    assert {entry["status"] for entry in logs if entry["event"] == "miniKMS died"} == {-9}


def passed_key() -> int:
    descriptor = os.memfd_create("root key")
    os.pwrite(descriptor, b"ab" * 32, 0)
    return descriptor


def descriptors_of_the_key() -> list[str]:
    links = [Path(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    return [str(link) for link in links if os.path.lexists(link) and "memfd:root key" in os.readlink(link)]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("lost_by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_child_with_a_passed_key_is_lost_when_it_dies_or_hangs(
    place: Place, alive: Alive, monkeypatch: pytest.MonkeyPatch, run: Run, lost_by: signal.Signals
) -> None:
    monkeypatch.setattr(supervisor_module, "HEALTH_TIMEOUT_S", 1.0)
    monkeypatch.setattr(supervisor_module, "CHILD_POLL_S", 0.05)
    monkeypatch.setattr(supervisor_module, "STOP_S_MAX", 0.3)
    descriptor = passed_key()

    async def main() -> int:
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        supervisor = Supervisor(place.options(master_key_fd=descriptor), on_lost=lost.set_result)
        await supervisor.start()
        assert descriptors_of_the_key() == []
        await asyncio.sleep(0.3)  # a child that is well is not lost
        assert not lost.done()
        pid = supervisor.child_pid
        assert pid is not None
        os.kill(pid, lost_by)
        async with asyncio.timeout(WAIT_S):
            assert "start the server again with the variable" in await lost
        await supervisor.stop()
        return pid

    with capture_logs() as logs:
        pid = run(main())
    assert not alive(pid)
    events = [entry["event"] for entry in logs]
    assert "the server stops: its key service is lost" in events
    assert events.count("miniKMS spawned") == 1


def test_the_key_is_closed_when_a_daemon_is_found_or_none_can_start(place: Place) -> None:
    async def main(options: supervisor_module.ChildOptions) -> None:
        supervisor = Supervisor(options)
        try:
            await supervisor.start()
        finally:
            await supervisor.stop()

    key = passed_key()
    assert len(descriptors_of_the_key()) == 1
    with pytest.raises(SupervisorError):
        asyncio.run(main(place.options(binary=str(place.directory / "missing"), master_key_fd=key)))
    assert descriptors_of_the_key() == []
    found = start_alone(place)
    try:
        asyncio.run(main(place.options(master_key_fd=passed_key())))
    finally:
        found.terminate()
        found.wait()
    assert descriptors_of_the_key() == []


async def test_a_daemon_that_refuses_to_start_is_an_error_with_its_last_words(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FOUND_S_MAX", 0.2)
    (place.data / "refuse-start").touch()

    with pytest.raises(SupervisorError, match=r"fake daemon: refused to start / because of its file"):
        await Supervisor(place.options()).start()


async def test_a_program_that_is_not_there_is_an_error_that_says_so(place: Place) -> None:
    with pytest.raises(SupervisorError, match="No such file"):
        await Supervisor(place.options(binary=str(place.directory / "missing"))).start()


def test_a_daemon_that_never_answers_is_ended_and_reported(
    place: Place, monkeypatch: pytest.MonkeyPatch, alive: Alive
) -> None:
    monkeypatch.setattr(supervisor_module, "READY_S_MAX", 0.5)
    monkeypatch.setattr(supervisor_module, "FOUND_S_MAX", 0.1)
    (place.data / "slow-start").write_text("60")

    async def main() -> None:
        with pytest.raises(SupervisorError, match="did not come up"):
            await Supervisor(place.options()).start()

    with capture_logs() as logs:
        asyncio.run(main())
    [pid] = [entry["pid"] for entry in logs if entry["event"] == "miniKMS spawned"]
    assert not alive(pid)


def test_without_spawn_nothing_is_started_and_the_error_says_what_to_do(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "ABSENT_S_MAX", 0.1)

    async def main() -> None:
        with pytest.raises(SupervisorError, match="start it, or let this server spawn one"):
            await Supervisor(place.options(), spawn=False).start()

    with capture_logs() as logs:
        asyncio.run(main())
    assert not [entry for entry in logs if entry["event"] == "miniKMS spawned"]


def test_a_socket_of_another_uid_is_refused_and_nothing_is_spawned(place: Place) -> None:
    found = start_alone(place)
    try:

        async def main() -> None:
            with pytest.raises(SupervisorError, match=f"served by uid {os.geteuid()}, expected was uid 54321"):
                await Supervisor(place.options(), server_uids={54321}).start()

        with capture_logs() as logs:
            asyncio.run(main())
        assert logs == []  # neither spawned nor waited for: it is refused at once
    finally:
        found.terminate()
        found.wait()


SERVER = """
import asyncio, sys
from progressdb_server.kms.supervisor import ChildOptions
from progressdb_server.kms.supervisor import Supervisor

async def main():
    supervisor = Supervisor(ChildOptions(socket_path=sys.argv[1], data_dir=sys.argv[2], binary=sys.argv[3]))
    await supervisor.start()
    print(supervisor.child_pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_ctrl_c_in_the_servers_terminal_does_not_reach_the_daemon(place: Place, alive: Alive) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, place.socket, str(place.data), place.binary],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert server.stdout is not None
    try:
        pid = next(int(line) for line in server.stdout if line.strip().isdigit())
        assert os.getpgid(pid) != os.getpgid(server.pid)
        os.killpg(server.pid, signal.SIGINT)
        server.wait(WAIT_S)
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    wait_until(lambda: not alive(pid))
