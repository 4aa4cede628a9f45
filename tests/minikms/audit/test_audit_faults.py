"""Faults from the kernel: full disks, failing disks, file-size limits, SIGKILL. Real processes, real errors."""

import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minikms.audit.verdict import VerificationReport
from tests import needs
from tests.harness.scripts import interpreter_words
from tests.minikms.audit.logmaker import LOG, make_log, types_of, verify

WRITER = interpreter_words("tests.minikms.audit.auditwriter")


def run_writer(directory: Path, commits: int, *more: object, under: list[str] | None = None) -> list[str]:
    """What the writer printed."""
    directory.mkdir(exist_ok=True)
    command = [*(under or []), sys.executable, *WRITER, str(directory), str(commits), *map(str, more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def under_strace(directory: Path, *injections: str) -> list[str]:
    """strace that makes calls on the log's file fail."""
    command = [needs.program("strace"), "-f", "-qq", "-o", "/dev/null", "-P", str(directory / LOG)]
    for injection in injections:
        command += ["-e", f"inject={injection}"]
    return command


def check_answered(directory: Path, printed: list[str]) -> VerificationReport:
    """Every line that the writer confirmed is in the log, which is intact."""
    report = verify(directory)
    assert report.intact, report.findings
    answered = [int(text) for text in printed if text.isdigit()]
    assert answered and report.head is not None
    assert max(answered) <= report.head.seq
    return report


@pytest.mark.parametrize("error", ["EIO", "EINTR"])
def test_a_failed_write_drops_only_its_own_turn(tmp_path: Path, error: str) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    printed = run_writer(directory, 30, under=under_strace(directory, f"write:error={error}:when=5+4"))
    check_answered(directory, printed)
    if error == "EIO":
        assert printed.count("unavailable") == 7
        assert types_of(directory).count("resumed") == 7
    if error == "EINTR":
        assert "unavailable" not in printed, "the interpreter repeats an interrupted call"


def test_a_short_write_at_a_file_size_limit_leaves_whole_lines(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the first write over it is short, the next ones fail with EFBIG. Lifted halfway."""
    directory = tmp_path / "log"
    printed = run_writer(directory, 40, 3, 5000)
    assert printed.count("unavailable") >= 10
    assert printed[-1].isdigit()
    check_answered(directory, printed)


def test_a_full_disk_is_recorded_in_the_reserve_and_then_answers_stop(tmp_path: Path) -> None:
    """A file system of 1 MiB in a mount namespace of its own, which ends with the process."""
    needs.root()
    unshare = needs.namespaces("mount")
    needs.program("mount")
    directory = tmp_path / "log"
    directory.mkdir()
    copy = tmp_path / "copy"
    script = (
        f"mount -t tmpfs -o size=1m none {directory}"
        f" && {shlex.join([sys.executable, *WRITER])} {directory} 400 20; cp -r {directory} {copy}"
    )
    command = [unshare, "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.split()
    assert printed.count("unavailable") > 10
    first = printed.index("unavailable")
    assert first > 100, "there was room for that many"
    lines = types_of(copy)
    assert lines.count("disk_full") == 1
    full = lines.index("disk_full")
    assert lines[full + 1 :].count("encrypt") * 200 > 128 * 1024, "the reserve was used to its end"
    report = verify(copy)
    assert report.intact or [finding.kind for finding in report.findings] == ["incomplete"]
    assert int(printed[first - 1]) <= len(lines)


def kill_at_random(directory: Path, moment: float) -> int:
    """Kill a writer. Returns the last seq that it confirmed."""
    command = [sys.executable, *WRITER, str(directory), "1000000", "10"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(moment)
        writer.send_signal(signal.SIGKILL)
        lines = writer.stdout.read().split("\n")
    return int((lines[-2] if len(lines) > 1 else first) or first)


def kill_rounds(directory: Path, rounds: int) -> None:
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    directory.mkdir(exist_ok=True)
    for _ in range(rounds):
        answered = kill_at_random(directory, moments.random() * 0.2)
        make_log(directory, 1)
        report = verify(directory)
        assert report.intact, f"seed {seed}: {report.findings}"
        assert report.head is not None and report.head.seq > answered, f"seed {seed}"


def test_a_log_continues_after_its_writer_was_killed_at_any_moment(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 4)


@pytest.mark.torture
@pytest.mark.parametrize("log", range(20))
def test_a_log_continues_after_a_hundred_kills(tmp_path: Path, log: int) -> None:
    """Five times each of twenty logs."""
    kill_rounds(tmp_path / str(log), 5)
