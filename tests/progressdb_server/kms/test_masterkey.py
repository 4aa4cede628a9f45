"""A master key in the server's environment leaves it before anything else happens: shown with real processes."""

import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

KEY = "0123456789abcdef" * 4
PROGRAM = """
import sys
from progressdb_server.kms import root_key as masterkey
loaded = set(sys.modules)
try:
    descriptor = masterkey.take()
except masterkey.MasterKeyError as error:
    sys.exit(f"refused: {error}")

import os
print("descriptor", descriptor)
print("arguments", sys.argv[1:])
print("environment", sorted(name for name in os.environ if "MASTER" in name))
heavy = {"asyncio", "msgspec", "minikms"} & loaded
print("loaded", sorted(heavy))
if descriptor is not None:
    print("inheritable", os.get_inheritable(descriptor))
    try:
        os.pwrite(descriptor, b"x", 0)
    except PermissionError:
        print("sealed")
print("ready", flush=True)
sys.stdin.read()
"""


def run(program: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if "MASTER_KEY" not in name}
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        env={**clean, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(PROGRAM)
    return path


def told(process: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert process.returncode == 0, process.stderr
    return dict(line.split(" ", 1) for line in process.stdout.splitlines() if " " in line)


def copies_in_memory(pid: int, needle: bytes) -> int:
    """How often the process holds the bytes in any memory that it can read."""
    count = 0
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            bounds, mode = line.split(" ")[:2]
            start, end = (int(bound, 16) for bound in bounds.split("-"))
            if mode[0] != "r" or line.endswith(("[vvar]", "[vvar_vclock]", "[vsyscall]")):
                continue
            memory.seek(start)
            count += memory.read(end - start).count(needle)
    return count


def test_the_restarted_process_has_the_key_in_no_memory_or_environment(program: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(program), "--flag", "two words"],
        env={**os.environ, "PROGRESSDB_MINIKMS_MASTER_KEY": KEY, "PLANTED": "planted" * 5},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        lines = list(takewhile(lambda line: line != "ready\n", process.stdout))
        assert copies_in_memory(process.pid, KEY[:32].encode()) == 0
        assert copies_in_memory(process.pid, b"planted" * 5) > 0  # the scan finds what is there
        assert KEY.encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()
    finally:
        process.communicate()
    said = dict(line.strip().split(" ", 1) for line in lines if " " in line)
    assert int(said["descriptor"]) > 2
    assert said["arguments"] == "['--flag', 'two words']"
    assert said["environment"] == "[]"
    assert said["inheritable"] == "False"
    assert "sealed\n" in lines


def test_it_loads_nothing_that_could_have_seen_the_key(program: Path) -> None:
    """Nor is there a descriptor without a key."""
    said = told(run(program))
    assert (said["loaded"], said["descriptor"]) == ("[]", "None")


def test_an_empty_variable_counts_as_unset(program: Path) -> None:
    said = told(run(program, PROGRESSDB_MINIKMS_MASTER_KEY="", PROGRESSDB_MINIKMS_MASTER_KEY_FILE="/a/file"))
    assert said["descriptor"] == "None"
    said = told(run(program, PROGRESSDB_MINIKMS_MASTER_KEY=KEY, PROGRESSDB_MINIKMS_MASTER_KEY_FILE=""))
    assert said["descriptor"] != "None"


def test_a_key_and_a_key_file_are_refused_without_showing_the_key(program: Path) -> None:
    process = run(program, PROGRESSDB_MINIKMS_MASTER_KEY=KEY, PROGRESSDB_MINIKMS_MASTER_KEY_FILE="/a/file")
    assert process.returncode == 1
    assert "both given" in process.stderr
    assert KEY[:16] not in process.stderr + process.stdout


@pytest.mark.parametrize("forged", ["0", "99", "x", "-1"])
def test_a_descriptor_that_this_program_did_not_make_is_refused(program: Path, forged: str) -> None:
    process = run(program, PROGRESSDB_MINIKMS_MASTER_KEY_FD=forged)
    assert process.returncode == 1
    assert "not by this program" in process.stderr


def test_a_program_started_as_a_module_starts_over_as_that_module(tmp_path: Path) -> None:
    (tmp_path / "some_server.py").write_text(PROGRAM)
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "some_server", "argument"],
        env={**os.environ, "PROGRESSDB_MINIKMS_MASTER_KEY": KEY},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = told(process)
    assert said["arguments"] == "['argument']"
    assert said["descriptor"] != "None"
