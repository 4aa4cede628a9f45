"""No key is lost when the daemon is killed, or the disk fails, at any system call of a key change.

`make test` tests a sample of the system calls. `make torture` kills the daemon at each one and prints their number.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests import needs
from tests.minikms.custody.rotation.attacks import CHANGES, Attack, Change
from tests.minikms.custody.rotation.crash_points import STATE_CALLS, THREADS, Point, Prepared

KEYS = 50
KILL_SAMPLE = (
    Point("disk", "fsync", 1),  # the keyring's temporary file
    Point("disk", "rename,renameat,renameat2", 1),  # renaming it to the keyring
    Point("main", "write", 1),  # the line about the start of the rotation
    Point("disk", "link,linkat", 30),  # backups of key files
    Point("disk", "syncfs", 1),
    Point("disk", "rename,renameat,renameat2", 25),  # after half of the key files
    Point("disk", "syncfs", 2),
    Point("audit", "fdatasync", 2),  # the line about the end of the rotation
)
DISK_FAULTS = (
    (Point("disk", "write", 20), "error=ENOSPC"),
    (Point("disk", "syncfs", 1), "error=EIO"),
    (Point("audit", "fdatasync", 1), "error=EIO"),
)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    needs.program("strace")
    needs.root()
    base = tmp_path / "prepared"
    base.mkdir()
    return Prepared(base, KEYS)


@pytest.mark.parametrize("change", ["rotate the KEK", "rotate to a new root key"])
def test_a_rotation_killed_at_a_system_call_completes_after_a_restart(
    prepared: Prepared, tmp_path: Path, change: Change
) -> None:
    """Each DEK still decrypts its ciphertext, and the operator's root key still opens the keyring."""
    attack = Attack(prepared, tmp_path, change)
    for point in KILL_SAMPLE[:: 1 if change == "rotate to a new root key" else 2]:
        assert attack.strike(point, "signal=KILL"), f"{point} was not reached"


def test_a_rotation_on_a_failing_disk_loses_no_key_and_completes(prepared: Prepared, tmp_path: Path) -> None:
    """The daemon continues from the last durable state. Its own next attempt, or a repeated request, completes."""
    attack = Attack(prepared, tmp_path, "rotate to a new root key")
    for point, action in DISK_FAULTS:
        assert attack.strike(point, action), f"{point} was not reached"


@pytest.mark.torture
@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_system_call_of_any_change_loses_no_key(
    prepared: Prepared, tmp_path: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = Attack(prepared, tmp_path, change)
    for thread, calls in itertools.product(THREADS, STATE_CALLS):
        attack.points_of(thread, calls, numbers=itertools.count(1), action="signal=KILL")
    with capsys.disabled():
        print(f"\n{change}: killed at {attack.points} system calls, nothing lost")
    assert attack.points > 20


@pytest.mark.torture
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_disk_error_at_a_system_call_of_any_change_loses_no_key(
    prepared: Prepared, tmp_path: Path, change: Change, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tests the first ten calls of each kind, then each fifth: most of the later ones are equal calls on key files."""
    attack = Attack(prepared, tmp_path, change)
    numbers = (*range(1, 11), *range(15, 300, 5))
    for thread, calls in itertools.product(("main", "disk", "audit"), STATE_CALLS):
        attack.points_of(thread, calls, numbers=iter(numbers), action=f"error={error}")
    with capsys.disabled():
        print(f"\n{change}: {error} at {attack.points} system calls, nothing lost")
    assert attack.points > 10
