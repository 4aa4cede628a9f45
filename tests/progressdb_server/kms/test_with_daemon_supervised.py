"""The supervisor and the provider with the real miniKMS: its root keys, its end, its audit log."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.client import EncryptItem
from progressdb_server.kms import provider as provider_module
from progressdb_server.kms import supervisor as supervisor_module
from progressdb_server.kms.provider import RemoteProvider
from progressdb_server.kms.supervisor import ChildOptions, Supervisor, SupervisorError
from tests.harness.logged import capture_logs
from tests.harness.scripts import verify_audit
from tests.harness.waiting import wait_until

KEY = "ab" * 32
WAIT_S = 60.0


def options(directory: Path, **more: object) -> ChildOptions:
    given: dict[str, object] = {"socket_path": str(directory / "run" / "s"), "data_dir": str(directory / "kms")}
    return ChildOptions(**{**given, **more})  # type: ignore[arg-type]  # keyword arguments of several types


def key_file(directory: Path) -> str:
    path = directory / "root-key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return str(path)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real miniKMS is started in several tests at once."""
    monkeypatch.setattr(provider_module, "WAIT_S", WAIT_S)


def one_round(directory: Path, **more: object) -> None:
    """Start, write, read, be killed, read again, stop."""

    async def main() -> None:
        supervisor = Supervisor(options(directory, **more))
        await supervisor.start()
        provider = RemoteProvider(directory / "run" / "s")
        try:
            key = await provider.create_dek_for_thread("thread-1", request_id="req-1")
            [sealed] = await provider.encrypt_batch(
                [
                    EncryptItem(
                        key_id=key.key_id, plaintext=b"text", aad=b"place", thread_id="thread-1", request_id="req-2"
                    )
                ]
            )
            assert isinstance(sealed, bytes)
            pid = supervisor.child_pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            opened = await provider.decrypt(key.key_id, sealed, aad=b"place", thread_id="thread-1")
            assert opened == b"text"
        finally:
            await provider.close()
            await supervisor.stop()

    asyncio.run(main())


def test_with_a_key_file_the_keys_survive_and_the_audit_log_is_intact(directory: Path) -> None:
    path = key_file(directory)
    one_round(directory, master_key_file=path)
    verify_audit(directory / "kms", path)
    log = (directory / "kms" / "minikms-audit.log").read_text()
    assert f"peer_uid:{os.geteuid()}" in log
    assert "req-2" in log


def test_its_log_goes_to_the_servers_and_its_end_is_its_own_doing(directory: Path) -> None:
    async def main() -> None:
        supervisor = Supervisor(options(directory, dev=True))
        await supervisor.start()
        await supervisor.stop()

    with capture_logs() as logs:
        asyncio.run(main())
    events = [entry for entry in logs if entry.get("program") == "minikms"]
    assert [entry["event"] for entry in events] == ["serving", "stopped"]
    assert events[-1]["minikms_why"] == "SIGTERM"


async def test_three_servers_that_start_at_once_use_one_daemon(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FOUND_S_MAX", WAIT_S)

    supervisors = [Supervisor(options(directory, dev=True)) for _ in range(3)]
    await asyncio.gather(*(supervisor.start() for supervisor in supervisors))
    async with asyncio.timeout(WAIT_S):
        while sum(supervisor.child_pid is not None for supervisor in supervisors) != 1:
            await asyncio.sleep(0.05)
    provider = RemoteProvider(directory / "run" / "s")
    assert (await provider.create_dek_for_thread("t")).key_id
    await provider.close()
    await asyncio.gather(*(supervisor.stop() for supervisor in supervisors))


async def test_each_daemon_gets_the_line_that_is_remembered_at_its_start(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FOUND_S_MAX", 0.1)
    told = [""]

    async def last_told() -> str:
        return told[-1]

    supervisor = Supervisor(options(directory, dev=True), audit_head=last_told)
    await supervisor.start()
    provider = RemoteProvider(directory / "run" / "s")
    try:
        head = (await provider.status()).audit.head
        told.append(f"{head.seq}:{head.sig}")
        pid = supervisor.child_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(WAIT_S):
            while supervisor.child_pid in (None, pid):
                await asyncio.sleep(0.05)
        assert (await provider.status()).pid == supervisor.child_pid
        await supervisor.stop()
        told.append(f"{head.seq}:{'A' * 43}=")
        with pytest.raises(SupervisorError, match=f"line {head.seq} of the audit log is not the one"):
            await Supervisor(options(directory, dev=True), audit_head=last_told).start()
    finally:
        await provider.close()
        await supervisor.stop()


SERVER = """
import asyncio, sys
from progressdb_server.kms.supervisor import ChildOptions
from progressdb_server.kms.supervisor import Supervisor

async def main():
    supervisor = Supervisor(ChildOptions(socket_path=sys.argv[1], data_dir=sys.argv[2], dev=True))
    await supervisor.start()
    print(supervisor.child_pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_killed_servers_daemon_ends_gracefully_by_itself(directory: Path, alive: Callable[[int], bool]) -> None:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(directory / "run" / "s"), str(directory / "kms")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert server.stdout is not None
    try:
        pid = next(int(line) for line in server.stdout if line.strip().isdigit())
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    wait_until(lambda: not alive(pid))
    last = (directory / "kms" / "minikms-audit.log").read_text().splitlines()
    assert any("the parent has ended" in line for line in last[-2:])
    assert not (directory / "run" / "s").exists()
