"""Programs of providers: their pipes, environment, bounds, and their end."""

import os
import signal
from pathlib import Path

import pytest

from minikms_tokens import AwayError, TokenError, programs
from tests.harness.waiting import wait_until

RUN_S_MAX = 60.0
KEY = bytes(range(32))


def sh(script: str, *arguments: str) -> list[str]:
    return ["/bin/sh", "-c", script, "sh", *arguments]


def test_a_secret_goes_through_pipes_into_memory_of_the_caller() -> None:
    """It is erased if the program fails afterwards."""
    memory = bytearray(32)
    for status, expected in ((0, KEY), (3, bytes(32))):
        ended = programs.run(
            sh('cat; echo no >&2; exit "$1"', str(status)),
            seconds=RUN_S_MAX,
            stdin=memoryview(KEY),
            into=memoryview(memory),
        )
        assert ended == (status, b"", 32, b"no\n") and memory == expected


def test_a_large_input_and_output_and_errors_do_not_block_each_other() -> None:
    script = f"head -c 200000 /dev/zero >&2; head -c {programs.OUTPUT_BYTES_MAX} /dev/zero; cat >/dev/null"
    ended = programs.run(sh(script), seconds=RUN_S_MAX, stdin=bytes(1_000_000))
    assert (ended.status, ended.output_bytes, len(ended.error)) == (
        0,
        programs.OUTPUT_BYTES_MAX,
        programs.ERROR_BYTES_MAX,
    )


def test_a_program_that_reads_no_input_ends_all_the_same() -> None:
    assert programs.run(sh("exit 0"), seconds=RUN_S_MAX, stdin=bytes(1_000_000)).status == 0


def test_a_program_has_an_environment_and_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nowhere")
    ended = programs.run([programs.find("env", "coreutils")], seconds=RUN_S_MAX, environ={"ONE": "1"})
    assert sorted(ended.output.decode().splitlines()) == ["LC_ALL=C", "ONE=1", f"PATH={programs.PATH}"]
    assert programs.run(sh("pwd -P"), seconds=RUN_S_MAX).output == b"/\n"


def test_an_output_longer_than_its_memory_is_refused_and_erased() -> None:
    memory = bytearray(32)
    with pytest.raises(AwayError, match="gave more than 32 bytes"):
        programs.run(sh("head -c 33 /dev/urandom; sleep 600"), seconds=RUN_S_MAX, into=memoryview(memory))
    assert memory == bytes(32)
    with pytest.raises(AwayError, match="gave more than"):
        programs.run(sh("cat /dev/zero"), seconds=RUN_S_MAX)


def test_at_its_time_limit_a_program_is_killed_with_its_children(tmp_path: Path) -> None:
    """A stopped child and a program that ignores SIGTERM too. What it had given is erased."""
    memory = bytearray(32)
    script = 'trap "" TERM; (sleep 600 & echo $! >"$1"; kill -STOP $!); printf secret; while printf . >&2; do :; done'
    with pytest.raises(AwayError, match="sh did not end in time"):
        programs.run(sh(script, str(tmp_path / "pid")), seconds=1.0, into=memoryview(memory))
    assert memory == bytes(32)
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_what_a_program_leaves_behind_is_killed_at_its_end(tmp_path: Path) -> None:
    ended = programs.run(sh('sleep 600 & echo $! >"$1"; echo good', str(tmp_path / "pid")), seconds=RUN_S_MAX)
    assert ended.output == b"good\n"
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def test_the_end_of_a_program_by_a_signal_is_its_status() -> None:
    assert programs.run(sh("kill -SEGV $$"), seconds=RUN_S_MAX).status == -signal.SIGSEGV


def test_a_program_inherits_only_the_named_files() -> None:
    named, other = os.memfd_create("named"), os.memfd_create("other")
    try:
        os.set_inheritable(other, True)
        ended = programs.run(
            sh('echo good >/proc/self/fd/"$1"; test ! -e /proc/self/fd/"$2"', str(named), str(other)),
            seconds=RUN_S_MAX,
            files=(named,),
        )
        assert ended.status == 0 and os.pread(named, 10, 0) == b"good\n"
    finally:
        os.close(named)
        os.close(other)


def test_a_program_that_is_not_installed_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "clevis-of-another").touch(0o755)
    with pytest.raises(TokenError, match="install the package clevis"):
        programs.find("clevis-of-another", "clevis")
    with pytest.raises(AwayError, match="can't be run: No such file"):
        programs.run(["/nowhere/clevis"], seconds=RUN_S_MAX)
