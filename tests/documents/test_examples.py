"""The tours of `examples`, as a newcomer runs them: real processes, and an exit status that can be trusted."""

import base64
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests import needs
from tests.harness.waiting import wait_until

OTHER_UID = 45_678
TOUR_S_MAX = 120.0
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COMMAND = [sys.executable, str(EXAMPLES / "tour.py")]


def tour(place: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags],
        cwd=place,
        env=os.environ
        | {"PROGRESSDB_KMS_SOCKET": "/nonexistent/theirs.sock", "PROGRESSDB_DB_PATH": "/nonexistent/theirs"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TOUR_S_MAX,
        check=False,
    )


def test_a_second_tour_finds_the_first_ones_data_and_a_leak_fails_it(tmp_path: Path) -> None:
    """Also in a directory that is too deep for the path of a socket."""
    deep = Path(*["a-directory-with-a-long-name"] * 4)
    (tmp_path / deep).mkdir(parents=True)
    flags = ("--dir", str(deep / "data"))
    first = tour(tmp_path, *flags)
    assert (first.returncode, first.stderr) == (0, "")
    assert "Every check held" in first.stdout
    assert "FAILED" not in first.stdout
    assert "2 messages came back as they were written" in first.stdout
    assert "all 2 messages read as before" in first.stdout, "after both rotations"
    (started, offered) = re.findall(r"^   \$ (PROGRESSDB_API_BACKEND_KEYS=.*)$", first.stdout, flags=re.MULTILINE)
    assert offered == started, "the commands of the tour work against the server that the last line starts"

    (said,) = re.findall(r"^   ada: (.*)$", first.stdout, flags=re.MULTILINE)
    (tmp_path / deep / "data" / "left-behind").write_text(base64.b64encode(f"a note: {said}".encode()).decode())
    second = tour(tmp_path, *flags)
    assert (second.returncode, second.stdout.count("FAILED")) == (1, 1)
    assert "2 messages of earlier runs" in second.stdout
    assert "4 messages came back as they were written" in second.stdout
    assert f"found in {deep}/data/left-behind" in second.stdout
    assert "1 checks failed" in second.stderr


def test_a_server_that_cannot_start_ends_the_tour_with_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "store").write_text("in the way")
    done = tour(tmp_path, "--dir", "taken")
    assert done.returncode == 1
    assert "the server did not come up" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_of_another_user_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """Refused before anything in it is changed."""
    needs.root()
    place = tmp_path / "demo-data"
    place.mkdir()
    os.chown(place, OTHER_UID, OTHER_UID)
    done = tour(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"demo-data belongs to uid {OTHER_UID}" in done.stderr
    assert "--dir DIRECTORY" in done.stderr
    assert list(place.iterdir()) == []


def test_a_file_of_another_user_in_the_directory_is_named(tmp_path: Path) -> None:
    """What a tour as root used to leave in the directory of an ordinary user."""
    needs.root()
    left = tmp_path / "demo-data" / "store"
    left.mkdir(parents=True)
    os.chown(left, OTHER_UID, OTHER_UID)
    done = tour(tmp_path)
    assert done.returncode == 1
    assert f"demo-data/store belongs to uid {OTHER_UID}" in done.stderr


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo-data").touch()
    done = tour(tmp_path)
    assert done.returncode == 1
    assert "cannot use demo-data" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_tour_leaves_no_process_behind(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--dir", str(tmp_path / "data")], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    lock = tmp_path / "data" / "kms" / "lock"
    wait_until(lock.exists, seconds=TOUR_S_MAX)
    process.terminate()
    assert process.wait(TOUR_S_MAX) == 128 + signal.SIGINT
    wait_until(lambda: processes_naming(str(tmp_path)) == [], seconds=TOUR_S_MAX)


def processes_naming(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if text.encode() in command:
                found.append(entry.name)
    return found


def test_the_commands_of_the_key_service_do_what_the_example_shows() -> None:
    """With its own `minikms` before another one of the PATH, and whatever is set for another daemon."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    theirs = {"PROGRESSDB_KMS_SOCKET": "/nonexistent/theirs.sock", "PROGRESSDB_KMS_URL": "https://theirs"}
    done = subprocess.run(
        ["sh", str(EXAMPLES / "keys.sh")],
        env=os.environ | theirs | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TOUR_S_MAX,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "All went as it should" in done.stdout
    assert done.stdout.count("\nthe door code is 4711\n") == 2, "before and after the rotation"
