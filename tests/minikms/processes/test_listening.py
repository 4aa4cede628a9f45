"""Where the listening socket may be, who may reach it, and when it may be replaced."""

import functools
import os
import socket
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from minikms.api.errors import StartError
from minikms.processes import sockets
from tests import needs
from tests.minikms_daemon.server import foreign
from tests.minikms_daemon.server.races import check_races


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Private, and short enough for a socket."""
    path = tmp_path / "run"
    path.mkdir(0o755)
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def reach(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True


def stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


# --- rules 5 and 6 ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_a_socket_is_made_0600_whatever_the_umask_is(directory: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        with sockets.listen(str(directory / "s"), {}) as listener:
            assert mode_of(directory / "s") == 0o600
            assert reach(directory / "s")
            assert not listener.activated
            assert os.umask(umask) == umask
    finally:
        os.umask(previous)


def test_the_socket_is_gone_after_the_end_and_can_be_made_again(directory: Path) -> None:
    for _ in range(2):
        listener = sockets.listen(str(directory / "s"), {})
        listener.close()
        listener.close()
        assert not (directory / "s").exists()


def test_mode_and_group_are_widened_as_asked(directory: Path) -> None:
    needs.root()
    with sockets.listen(str(directory / "s"), {}, mode=0o660, group=str(foreign.UID)):
        assert mode_of(directory / "s") == 0o660
        assert (directory / "s").stat().st_gid == foreign.UID


def test_only_its_owner_reaches_a_socket_before_its_group_is_set(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.root()
    modes = []
    real = os.chown

    def recording(*args: object, **options: object) -> None:
        modes.append(mode_of(directory / "s"))
        real(*args, **options)  # type: ignore[arg-type]  # passed through as they came

    monkeypatch.setattr(os, "chown", recording)
    with sockets.listen(str(directory / "s"), {}, mode=0o666, group="root"):
        assert modes == [0o600]


def test_an_unknown_group_is_refused_before_anything_is_made(directory: Path) -> None:
    with pytest.raises(StartError, match="no group nobodysgroup"):
        sockets.listen(str(directory / "s"), {}, group="nobodysgroup")
    assert os.listdir(directory) == []


def test_a_mode_with_more_than_permission_bits_is_refused(directory: Path) -> None:
    with pytest.raises(StartError, match="permission bits"):
        sockets.listen(str(directory / "s"), {}, mode=0o4600)


def test_only_a_wider_mode_admits_another_user(public: Path) -> None:
    with sockets.listen(str(public / "s"), {}):
        assert not foreign.run_as(foreign.UID, lambda: reach(public / "s"))
    with sockets.listen(str(public / "s"), {}, mode=0o660, group=str(foreign.UID)):
        assert foreign.run_as(foreign.UID, lambda: reach(public / "s"))


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_missing_directory_is_made_for_the_group_of_the_socket(public: Path, umask: int) -> None:
    """In a directory that everybody writes, as a volume that containers share."""
    needs.root()
    public.chmod(0o2777)
    previous = os.umask(umask)
    try:
        for _ in range(2):
            path = public / "run" / "s"
            with sockets.listen(str(path), {}, mode=0o660, group=str(foreign.UID), make_directory=True):
                status = path.parent.stat()
                assert (stat.S_IMODE(status.st_mode) & 0o777, status.st_gid) == (0o750, foreign.UID)
                assert foreign.run_as(foreign.UID, functools.partial(reach, path))
                assert not foreign.run_as(foreign.UID + 1, functools.partial(reach, path))
    finally:
        os.umask(previous)


def test_a_directory_that_a_kill_left_half_made_is_made_again(public: Path) -> None:
    (public / "run.new").mkdir(mode=0o700)
    with sockets.listen(str(public / "run" / "s"), {}, make_directory=True):
        assert stat.S_IMODE((public / "run").stat().st_mode) == 0o750
    assert os.listdir(public) == ["run"]


def test_a_directory_that_another_user_made_is_not_taken(public: Path) -> None:
    public.chmod(0o777)
    foreign.run_as(foreign.UID, lambda: os.mkdir(public / "run", 0o750))
    with pytest.raises(StartError, match=f"belongs to uid {foreign.UID}"):
        sockets.listen(str(public / "run" / "s"), {}, make_directory=True)


def test_a_missing_directory_is_made_only_where_that_is_asked_for(directory: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        sockets.listen(str(directory / "run" / "s"), {})
    with pytest.raises(StartError, match="No such file"):
        sockets.listen(str(directory / "missing" / "run" / "s"), {}, make_directory=True)


def test_a_file_that_replaced_the_socket_is_not_removed(directory: Path) -> None:
    listener = sockets.listen(str(directory / "s"), {})
    (directory / "s").unlink()
    stale_socket(directory / "s")
    listener.close()
    assert (directory / "s").exists()


def test_closing_works_after_the_directory_is_removed(directory: Path) -> None:
    listener = sockets.listen(str(directory / "s"), {})
    for name in os.listdir(directory):
        (directory / name).unlink()
    directory.rmdir()
    listener.close()


# --- rule 2 -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o757, 0o720])
def test_a_directory_that_others_can_write_in_is_refused(directory: Path, mode: int) -> None:
    directory.chmod(mode)
    with pytest.raises(StartError, match="others can write in it: choose a private directory"):
        sockets.listen(str(directory / "s"), {})
    assert os.listdir(directory) == []


def test_a_directory_of_another_user_is_refused(directory: Path) -> None:
    needs.root()
    os.chown(directory, foreign.UID, -1)
    with pytest.raises(StartError, match=f"belongs to uid {foreign.UID}"):
        sockets.listen(str(directory / "s"), {})


def test_a_directory_of_root_is_trusted_by_every_user(public: Path) -> None:
    """The rule prevents that another user replaces the socket. Whether this user can make one, the kernel decides."""
    needs.root()

    def attempt() -> str:
        try:
            sockets.listen(str(public / "s"), {})
        except StartError as error:
            return str(error)
        return ""

    assert "Permission denied" in foreign.run_as(foreign.UID, attempt)  # trusted, but not writable


def test_a_parent_may_be_a_symbolic_link_of_root(directory: Path) -> None:
    link = directory.parent / "link"
    link.symlink_to(directory)
    with sockets.listen(str(link / "s"), {}):
        assert reach(directory / "s")


def test_a_parent_that_is_a_symbolic_link_of_another_user_is_refused(directory: Path) -> None:
    needs.root()
    link = directory.parent / "link"
    link.symlink_to(directory)
    os.chown(link, foreign.UID, -1, follow_symlinks=False)
    with pytest.raises(StartError, match=f"symbolic link that belongs to uid {foreign.UID}"):
        sockets.listen(str(link / "s"), {})


@pytest.mark.parametrize("target", ["nothing", "file", "socket"])
def test_a_symbolic_link_as_the_last_component_is_refused(directory: Path, target: str) -> None:
    if target == "file":
        (directory / target).write_text("")
    elif target == "socket":
        stale_socket(directory / target)
    (directory / "s").symlink_to(directory / target)
    with pytest.raises(StartError, match="symbolic link"):
        sockets.listen(str(directory / "s"), {})
    assert (directory / "s").is_symlink()
    assert (directory / target).exists() == (target != "nothing")


def test_a_missing_directory_is_refused_with_its_name(directory: Path) -> None:
    with pytest.raises(StartError, match=r"missing/s: No such file"):
        sockets.listen(str(directory / "missing" / "s"), {})


def test_a_path_that_the_kernel_would_truncate_is_refused(directory: Path) -> None:
    room = sockets.PATH_BYTES_MAX - len(str(directory)) - 1
    with sockets.listen(str(directory / ("x" * room)), {}):
        assert reach(directory / ("x" * room))
    with pytest.raises(StartError, match=f"{sockets.PATH_BYTES_MAX} bytes"):
        sockets.listen(str(directory / ("x" * (room + 1))), {})


# --- rules 3 and 4 ------------------------------------------------------------------------------------------------
def test_a_stale_socket_is_replaced(directory: Path) -> None:
    stale_socket(directory / "s")
    with sockets.listen(str(directory / "s"), {}):
        assert reach(directory / "s")


def test_a_live_socket_of_another_process_is_never_replaced(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as squatter:
        squatter.bind(str(directory / "s"))
        squatter.listen()
        with pytest.raises(StartError, match="another process serves"):
            sockets.listen(str(directory / "s"), {})
        assert reach(directory / "s")


def test_a_live_socket_whose_queue_is_full_is_not_taken_for_stale(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "PROBE_TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX) as squatter, socket.socket(socket.AF_UNIX) as waiting:
        squatter.bind(str(directory / "s"))
        squatter.listen(0)
        waiting.connect(str(directory / "s"))
        with pytest.raises(StartError, match="another process serves"):
            sockets.listen(str(directory / "s"), {})


def test_a_socket_that_is_bound_and_not_yet_listening_is_not_stale(directory: Path) -> None:
    """Its lock says so; the socket alone would look stale."""
    with sockets.listen(str(directory / "s"), {}):
        (directory / "s").unlink()
        stale_socket(directory / "s")
        with pytest.raises(StartError, match=rf"\(pid {os.getpid()}\) owns the socket"):
            sockets.listen(str(directory / "s"), {})


def test_a_file_in_the_sockets_place_is_left_alone(directory: Path) -> None:
    (directory / "s").write_text("precious")
    with pytest.raises(StartError, match="not a socket"):
        sockets.listen(str(directory / "s"), {})
    assert (directory / "s").read_text() == "precious"


def test_no_descriptor_is_left_by_a_refused_start(directory: Path) -> None:
    (directory / "s").write_text("")
    before = len(os.listdir("/proc/self/fd"))
    for path in (directory / "s", directory / "missing" / "s"):
        with pytest.raises(StartError):
            sockets.listen(str(path), {})
    assert len(os.listdir("/proc/self/fd")) == before


def test_of_two_starts_on_one_path_exactly_one_serves(directory: Path) -> None:
    """From a free path and from a stale socket in turn; the one that serves can be reached."""

    rounds = 30
    for number in range(1, rounds, 2):
        stale_socket(directory / f"s{number}")

    def start(number: int) -> sockets.UnixListener:
        path = directory / f"s{number}"
        listener = sockets.listen(str(path), {})
        assert reach(path)
        return listener

    check_races(start, rounds)


# --- rule 1 -------------------------------------------------------------------------------------------------------
ACTIVATED = textwrap.dedent("""
    import os, sys
    from minikms.processes import sockets
    from minikms.api.errors import StartError
    os.dup2(int(sys.argv[3]), 3)
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": sys.argv[2], "LISTEN_FDNAMES": "minikms"}
    try:
        with sockets.listen(sys.argv[1], environ) as listener:
            print(listener.activated, listener.path, listener.socket.fileno(), environ, os.get_inheritable(3))
    except StartError as error:
        print(error)
""")


def activate(passed: socket.socket | IO[str], path: str, count: str = "1") -> str:
    """What a program started with `passed` as descriptor 3, as by a .socket unit, says about its listening socket."""
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATED, path, count, str(passed.fileno())],
        pass_fds=[passed.fileno()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def managers_socket(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(directory / "managed"))
        sock.listen()
        yield sock


def test_a_socket_from_the_service_manager_is_used_and_stays_the_managers(
    directory: Path, managers_socket: socket.socket
) -> None:
    answer = activate(managers_socket, str(directory / "other"))
    assert answer == f"True {directory}/managed 3 {{}} False\n"
    assert os.listdir(directory) == ["managed"]


def test_several_passed_sockets_are_refused(directory: Path, managers_socket: socket.socket) -> None:
    assert "passed 2 sockets" in activate(managers_socket, str(directory / "s"), "2")


def test_a_passed_descriptor_must_be_a_listening_unix_socket(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_INET) as internet:
        internet.bind(("127.0.0.1", 0))
        internet.listen()
        for passed in (idle, internet):
            assert "something other than a listening" in activate(passed, str(directory / "s"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram:
        assert "something other than a listening" in activate(datagram, str(directory / "s"))
    with open(os.devnull) as file:
        assert "service manager" in activate(file, str(directory / "s"))


def test_a_socket_passed_to_another_process_is_not_used(directory: Path) -> None:
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "PATH": "kept"}
    with sockets.listen(str(directory / "s"), environ) as listener:
        assert not listener.activated
    assert environ == {"PATH": "kept"}
