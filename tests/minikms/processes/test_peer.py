"""The credentials of the peer of a Unix socket."""

import ctypes
import errno
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from minikms.memory import libc
from minikms.processes import peer as peer_module
from minikms.processes.peer import Peer, is_overflow_uid, read_peer
from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.server import foreign


@pytest.fixture
def listener(public: Path) -> Any:
    """A listening socket that any user can reach."""
    path = public / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0o666)
        sock.listen()
        sock.settimeout(60)
        yield sock


def connect(path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    return client


def test_the_peer_is_the_process_that_connected(listener: socket.socket) -> None:
    with connect(listener.getsockname()), listener.accept()[0] as accepted:
        peer = read_peer(accepted)
    assert (peer.uid, peer.gid, peer.pid) == (os.geteuid(), os.getegid(), os.getpid())


def test_another_uid_is_reported_unchanged(listener: socket.socket) -> None:
    path = listener.getsockname()
    foreign.run_as(foreign.UID, lambda: connect(path).close())
    with listener.accept()[0] as accepted:
        peer = read_peer(accepted)
    assert (peer.uid, peer.gid) == (foreign.UID, foreign.UID)


def test_a_passed_descriptor_keeps_the_authority_of_who_connected(
    listener: socket.socket,
) -> None:
    """By design: the credentials are those of connect(2), not of whoever holds the socket later."""
    needs.root()
    with connect(listener.getsockname()) as client, listener.accept()[0] as accepted:
        foreign.run_as(foreign.UID, lambda: client.send(b"from another user"))
        assert accepted.recv(100) == b"from another user"
        assert read_peer(accepted).uid == os.geteuid()


def test_the_pid_is_certain_only_while_the_connector_has_not_been_reaped(listener: socket.socket) -> None:
    with connect(listener.getsockname()), listener.accept()[0] as accepted:
        needs.linux("6.5", read_peer(accepted).pid_certain)  # SO_PEERPIDFD
    path = listener.getsockname()
    child = os.fork()
    if child == 0:
        connect(path)
        os._exit(0)
    os.waitpid(child, 0)
    with listener.accept()[0] as accepted:
        peer = read_peer(accepted)
    assert peer.pid == child
    assert not peer.pid_certain


def test_a_kernel_without_peer_pidfd_leaves_the_pid_uncertain(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "SO_PEERPIDFD", 9999)
    with connect(listener.getsockname()), listener.accept()[0] as accepted:
        assert not read_peer(accepted).pid_certain


def test_no_descriptor_is_left_open_for_a_peer(listener: socket.socket) -> None:
    with connect(listener.getsockname()), listener.accept()[0] as accepted:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            read_peer(accepted)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_socket_without_a_peer_raises() -> None:
    for family in (socket.AF_UNIX, socket.AF_INET):
        with socket.socket(family) as sock, pytest.raises(OSError, match="not connected"):
            read_peer(sock)


def test_a_uid_without_a_number_here_is_the_overflow_uid() -> None:
    """A reader in a user namespace that maps only its own user sees all others as one uid, and must allow none."""
    needs.root()
    unshare = needs.namespaces("user")
    code = textwrap.dedent("""
        import os, socket, sys
        from minikms.processes.peer import is_overflow_uid, read_peer
        listener = socket.socket(fileno=int(sys.argv[1]))
        accepted, _ = listener.accept()
        peer = read_peer(accepted)
        print(peer.uid, is_overflow_uid(peer.uid), is_overflow_uid(os.getuid()))
    """)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0minikms-test-{os.getpid()}")
        listener.listen()
        name = listener.getsockname()
        foreign.run_as(foreign.UID, lambda: socket.socket(socket.AF_UNIX).connect(name))
        done = subprocess.run(
            [unshare, "--user", "--map-root-user", sys.executable, "-c", code, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stdout.split() == ["65534", "True", "False"], done.stderr


def test_a_peer_of_another_pid_namespace_has_no_pid(listener: socket.socket) -> None:
    """As between two containers. The kernel gives pid 0, and a pidfd that takes no signal, not even 0."""
    unshare = needs.namespaces("pid", "mount")
    code = textwrap.dedent("""
        import socket, sys
        from minikms.processes.peer import read_peer
        accepted, _ = socket.socket(fileno=int(sys.argv[1])).accept()
        print(tuple(read_peer(accepted)))
    """)
    with connect(listener.getsockname()):
        done = subprocess.run(
            [unshare, "--pid", "--fork", "--mount-proc", sys.executable, "-c", code, str(listener.fileno())],
            pass_fds=[listener.fileno()],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stdout.strip() == str((os.geteuid(), os.getegid(), 0, False)), done.stderr


def test_a_peer_of_another_pid_namespace_gets_no_peer_line(public: Path) -> None:
    """Each connection wrote a line `peer` once, which said that the process had ended."""
    unshare = needs.namespaces("pid", "mount")
    program = (unshare, "--pid", "--fork", "--kill-child", "--mount-proc")
    with LiveDaemon(public, program=program) as daemon:
        with daemon.client() as client:
            client.create_dek_for_thread("thread")
        [made] = daemon.events("create_dek", "peer")
    assert "pid" not in made


def test_the_overflow_uid_has_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "OVERFLOW_UID_FILE", "/nonexistent")
    assert peer_module.overflow_uid.__wrapped__() == 65534
    assert is_overflow_uid(65534)
    assert not is_overflow_uid(0)


class FakeBsdLibrary:
    """getpeereid(3) of BSD and macOS: fills two numbers and answers 0, or sets errno and answers -1."""

    def __init__(self, number: int = 0) -> None:
        self._number = number

    def getpeereid(self, descriptor: int, uid: Any, gid: Any) -> int:
        if self._number:
            ctypes.set_errno(self._number)
            return -1
        uid._obj.value, gid._obj.value = 501, 20
        return 0


def test_other_systems_use_getpeereid(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libc, "LINUX", False)
    monkeypatch.setattr(libc, "library", FakeBsdLibrary)
    with connect(listener.getsockname()), listener.accept()[0] as accepted:
        assert read_peer(accepted) == Peer(uid=501, gid=20, pid=0, pid_certain=False)
    monkeypatch.setattr(libc, "library", lambda: FakeBsdLibrary(errno.ENOTCONN))
    with connect(listener.getsockname()), listener.accept()[0] as accepted, pytest.raises(OSError, match="getpeereid"):
        read_peer(accepted)
