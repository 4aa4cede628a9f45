"""No key is lost when the daemon is killed, or the disk fails, at any system call of a key change.

`make test` tests a sample of the system calls. `make torture` kills the daemon at each one and prints their number.
"""

import itertools
from pathlib import Path

import pytest

from tests import needs
from tests.minikms.custody.rotation.crash_points import STATE_CALLS, THREADS, Point, Prepared
from tests.minikms.custody.rotation.interrupted_changes import CHANGES, Change, InterruptedChange

KEYS = 50
RENAME = "rename,renameat,renameat2"
KILL_SAMPLE = (
    Point("disk", "fsync", 1, "/.tmp-"),  # the keyring's temporary file
    Point("disk", RENAME, 1, '"keyring.json"'),
    Point("main", "write", 1, "rotate_kek"),  # the line about its start
    Point("disk", RENAME, 2, '"kms-journal"'),
    Point("disk", "pwrite64", 25, "/kms-deks/k_"),  # after half of the key files
    Point("disk", "syncfs", 1, "/kms-deks"),
    Point("disk", RENAME, 3, '.journal"'),  # the journal becomes the backup
    Point("audit", "fdatasync", 2, "/minikms-audit.log"),  # the line about its end
)
ADD_SAMPLE = (Point("disk", RENAME, 1, '"keyring.json"'), Point("main", "write", 2, "add_root"))
REMOVAL_SAMPLE = (
    Point("audit", "fdatasync", 2, "/minikms-audit.log"),  # the signed line, after which the audit log is held
    Point("disk", RENAME, 1, '"keyring.json"'),
    Point("main", "write", 4, "checkpoint"),  # and the line that announces the new audit key
    Point("disk", "pwrite64", 20, "/kms-deks/k_"),  # of the KEK rotation
)
REMOVAL_FAULTS = (
    (Point("disk", "fsync", 2, "/data>"), "error=EIO"),  # the new keyring may be on disk
    (Point("main", "write", 4, "checkpoint"), "error=ENOSPC"),
    (Point("audit", "fdatasync", 3, "/minikms-audit.log"), "error=EIO"),
)
DISK_FAULTS = (
    (Point("disk", "write", 4, "/.tmp-"), "error=ENOSPC"),  # the journal's temporary file
    (Point("disk", RENAME, 3, '.journal"'), "error=EIO"),  # the journal becomes the backup
    (Point("disk", "pwrite64", 20, "/kms-deks/k_"), "error=EIO"),
    (Point("disk", "syncfs", 1, "/kms-deks"), "error=EIO"),
    (Point("audit", "fdatasync", 1, "/minikms-audit.log"), "error=EIO"),
)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    needs.program("strace")
    needs.root()
    base = tmp_path / "prepared"
    base.mkdir()
    return Prepared(base, KEYS)


@pytest.mark.parametrize(
    ("change", "points"), [("rotate the KEK", KILL_SAMPLE[::2]), ("rotate to a new root key", KILL_SAMPLE[1::2])]
)
def test_a_rotation_killed_at_a_system_call_completes_after_a_restart(
    prepared: Prepared, tmp_path: Path, change: Change, points: tuple[Point, ...]
) -> None:
    """Each DEK still decrypts its ciphertext, and the operator's root key still opens the keyring."""
    interrupted = InterruptedChange(prepared, tmp_path, change)
    for point in points:
        assert interrupted.interrupt(point, "signal=KILL"), f"{point} was not reached"


def test_a_rotation_on_a_failing_disk_loses_no_key_and_completes(prepared: Prepared, tmp_path: Path) -> None:
    """The daemon continues from the last durable state. Its own next attempt, or a repeated request, completes."""
    interrupted = InterruptedChange(prepared, tmp_path, "rotate to a new root key")
    for point, action in DISK_FAULTS:
        assert interrupted.interrupt(point, action), f"{point} was not reached"


@pytest.mark.parametrize(("change", "points"), [("add a root key", ADD_SAMPLE), ("remove a root key", REMOVAL_SAMPLE)])
def test_a_change_of_roots_killed_at_a_system_call_is_whole_at_last(
    prepared: Prepared, tmp_path: Path, change: Change, points: tuple[Point, ...]
) -> None:
    """The keyring opens under every root key whose adding was answered, and under none whose removal was."""
    interrupted = InterruptedChange(prepared, tmp_path, change)
    for point in points:
        assert interrupted.interrupt(point, "signal=KILL"), f"{point} was not reached"


def test_the_removal_of_a_root_on_a_failing_disk_is_whole_in_the_end(prepared: Prepared, tmp_path: Path) -> None:
    """Also if only the last sync of the keyring fails: the log takes no line until the former one is written again."""
    interrupted = InterruptedChange(prepared, tmp_path, "remove a root key")
    for point, action in REMOVAL_FAULTS:
        assert interrupted.interrupt(point, action), f"{point} was not reached"


@pytest.mark.torture
@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_system_call_of_any_change_loses_no_key(
    prepared: Prepared, tmp_path: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted = InterruptedChange(prepared, tmp_path, change)
    for thread, calls in itertools.product(THREADS, STATE_CALLS):
        interrupted.points_of(thread, calls, numbers=itertools.count(1), action="signal=KILL")
    with capsys.disabled():
        print(f"\n{change}: killed at {interrupted.points} system calls, nothing lost")
    assert interrupted.points > 10


@pytest.mark.torture
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_disk_error_at_a_system_call_of_any_change_loses_no_key(
    prepared: Prepared, tmp_path: Path, change: Change, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests the first ten calls of each kind, then each fifth: most of the later ones are equal calls on key files."""
    interrupted = InterruptedChange(prepared, tmp_path, change)
    numbers = (*range(1, 11), *range(15, 300, 5))
    for thread, calls in itertools.product(("main", "disk", "audit"), STATE_CALLS):
        interrupted.points_of(thread, calls, numbers=iter(numbers), action=f"error={error}")
    with capsys.disabled():
        print(f"\n{change}: {error} at {interrupted.points} system calls, nothing lost")
    assert interrupted.points > 10
