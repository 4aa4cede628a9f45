"""A first start that is killed at any system call is completed by the next start."""

import itertools
import os
import shutil
from pathlib import Path

import pytest

from tests import needs
from tests.harness.scripts import verify_audit
from tests.minikms.custody.rotation.crash_points import DEADLINE_SECONDS, Daemon

CALLS = (
    "rename,renameat,renameat2",
    "mkdir,mkdirat",
    "fsync",
    "fdatasync",
    "link,linkat",
    "unlink,unlinkat",
    "ftruncate",
    "pwrite64",
)


def first_start(base: Path) -> Daemon:
    """An empty place and a root key, before the first start."""
    base.mkdir()
    (base / "key").touch(0o600)
    (base / "key").write_text(os.urandom(32).hex() + "\n")
    return Daemon(base)


def killed_at(daemon: Daemon, calls: str, number: int) -> bool:
    """Starts the daemon and kills it at that call; False if it came up first."""
    strace = ["strace", "-f", "-o", str(daemon.base / "strace"), "-e", f"trace={calls}"]
    strace += ["-e", f"inject={calls}:signal=KILL:when={number}"]
    plain = daemon.command
    daemon.command = [*strace, *plain]
    try:
        up = daemon.start()
    finally:
        daemon.command = plain
    if up:
        assert daemon.process is not None
        strace_pid = daemon.process.pid
        child = int(Path(f"/proc/{strace_pid}/task/{strace_pid}/children").read_text())
        os.kill(child, 9)
        daemon.process.wait(DEADLINE_SECONDS)
    return not up


def judge(daemon: Daemon) -> None:
    assert daemon.start(), daemon.log()
    with daemon.client() as client:
        key_id = client.create_dek_for_thread("t").key_id
        assert client.decrypt(key_id, client.encrypt(key_id, b"text")) == b"text"
        assert client.status().status == "ok"
    daemon.stop()
    verify_audit(daemon.base / "data", daemon.key_file)


def strike(base: Path, calls: str, number: int) -> bool:
    daemon = first_start(base)
    try:
        killed = killed_at(daemon, calls, number)
        judge(daemon)
    except AssertionError as error:
        raise AssertionError(f"{calls.split(',', maxsplit=1)[0]} no. {number}: {error}") from error
    finally:
        daemon.kill()
    shutil.rmtree(base)
    return killed


@pytest.mark.parametrize("number", [1, 2])
def test_a_first_start_killed_while_it_places_a_file_is_completed(tmp_path: Path, number: int) -> None:
    needs.program("strace")
    assert strike(tmp_path / "d", CALLS[0], number), "it was not killed"


@pytest.mark.torture
def test_a_first_start_killed_at_any_call_is_completed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs.program("strace")
    points = 0
    for calls in CALLS:
        for number in itertools.count(1):
            if not strike(tmp_path / f"{points}-{number}-{calls[:6]}", calls, number):
                break
            points += 1
    with capsys.disabled():
        print(f"\na first start: killed at {points} system calls, each made good")
    assert points > 10
