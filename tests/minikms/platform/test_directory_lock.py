"""One process owns a data directory."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minikms.api.errors import StartError, StartLaterError
from minikms.platform.directory_lock import LOCK_NAME, DataDirLock, is_owned, make_private_directory
from tests import needs
from tests.minikms_daemon.server import foreign
from tests.minikms_daemon.server.races import check_races


def test_a_missing_directory_is_made_private_with_its_parents(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        with DataDirLock(str(tmp_path / "a" / "b")):
            for made in (tmp_path / "a", tmp_path / "a" / "b"):
                assert stat.S_IMODE(made.stat().st_mode) == 0o700
            assert stat.S_IMODE((tmp_path / "a" / "b" / "lock").stat().st_mode) == 0o600
    finally:
        os.umask(previous)


def test_a_made_directory_is_durable_in_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    make_private_directory(str(tmp_path / "a" / "b"))
    assert synced == [str(tmp_path), str(tmp_path / "a")]


def test_a_second_owner_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    second_is_refused = pytest.raises(StartError, match=rf"\(pid {os.getpid()}\) owns {tmp_path}/d")
    with DataDirLock(str(tmp_path / "d")), second_is_refused:
        DataDirLock(str(tmp_path / "d"))
    with DataDirLock(str(tmp_path / "d")):
        pass  # free again


def test_whether_a_process_owns_a_directory_can_be_asked(tmp_path: Path) -> None:
    """As often as one likes: the question leaves no lock, and makes no file."""
    directory = str(tmp_path / "d")
    assert not is_owned(directory)
    with DataDirLock(directory):
        assert is_owned(directory) and is_owned(directory)
    assert not is_owned(directory)
    with DataDirLock(directory):
        pass


def test_a_copy_of_the_descriptor_does_not_keep_a_closed_lock(tmp_path: Path) -> None:
    """A child that another thread forked has one until it calls exec. A duplicate shares the lock like that copy."""
    lock = DataDirLock(str(tmp_path / "d"))
    [descriptor] = [
        int(link.name) for link in Path("/proc/self/fd").iterdir() if _target(link) == f"{tmp_path}/d/{LOCK_NAME}"
    ]
    copy = os.dup(descriptor)
    lock.close()
    with DataDirLock(str(tmp_path / "d")):
        pass
    os.close(copy)


def _target(link: Path) -> str:
    """Where a descriptor of this process leads; empty when another thread has closed it."""
    try:
        return os.readlink(link)
    except FileNotFoundError:
        return ""


def test_a_lock_without_a_pid_is_still_a_lock(tmp_path: Path) -> None:
    with DataDirLock(str(tmp_path / "d")):
        (tmp_path / "d" / "lock").write_text("")
        with pytest.raises(StartError, match="another process owns"):
            DataDirLock(str(tmp_path / "d"))


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o701, 0o770, 0o1777])
def test_a_directory_that_others_have_access_to_is_refused(tmp_path: Path, mode: int) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(StartError, match="chmod 0700"):
        DataDirLock(str(directory))
    assert os.listdir(directory) == []


def test_a_directory_of_another_user_is_refused_even_to_root(tmp_path: Path) -> None:
    needs.root()
    directory = tmp_path / "d"
    directory.mkdir(0o700)
    os.chown(directory, foreign.UID, foreign.UID)
    with pytest.raises(StartError, match=f"belongs to uid {foreign.UID}"):
        DataDirLock(str(directory))


def test_a_symbolic_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir(0o700)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (directory / "lock").symlink_to(victim)
    with pytest.raises(StartError, match="symbolic link"):
        DataDirLock(str(directory))
    assert victim.read_text() == "precious"


def test_on_a_full_disk_a_later_start_may_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StartLaterError, match="No space left"):
        DataDirLock(str(tmp_path / "d"))


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("")
    with pytest.raises(StartError, match="Not a directory"):
        DataDirLock(str(tmp_path / "d"))


def test_no_descriptor_is_left_by_a_refused_start_and_none_is_inherited(tmp_path: Path) -> None:
    with DataDirLock(str(tmp_path / "d")) as lock:
        assert not os.get_inheritable(lock.directory_fd)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(StartError):
            DataDirLock(str(tmp_path / "d"))
        assert len(os.listdir("/proc/self/fd")) == before
    lock.close()


OWNER = """
import sys, time
from minikms.platform.directory_lock import DataDirLock
from minikms.api.errors import StartError, StartLaterError
sys.stdin.readline()
try:
    lock = DataDirLock(sys.argv[1])
except StartError:
    print("refused", flush=True)
else:
    print("owner", flush=True)
    time.sleep(60)
"""


def test_the_death_of_the_owner_by_sigkill_frees_the_directory(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "d")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    assert process.stdout.readline() == "owner\n"
    with pytest.raises(StartError):
        DataDirLock(str(tmp_path / "d"))
    process.kill()
    process.communicate()
    with DataDirLock(str(tmp_path / "d")):
        pass


def test_of_two_starts_exactly_one_owns_the_directory(tmp_path: Path) -> None:
    """The directory does not exist before."""
    check_races(lambda number: DataDirLock(str(tmp_path / str(number) / "d")), rounds=60)
