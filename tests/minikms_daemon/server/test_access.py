"""Access to the daemon, with real users and real descriptors."""

import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms.api.errors import KmsUntrustedServerError, StartError, UnauthorizedError
from minikms.policy.policy import Policy
from minikms_daemon.server.admission import UNAUTHORISED_CONNECTIONS_MAX
from tests import needs
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.minikms_daemon.server import foreign

pytestmark = pytest.mark.usefixtures("as_root")

OPEN_TO_ALL = ("--socket-mode", "0666")
REQUEST = b"%b HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n%b\r\n"


def ask(path: Path, line: bytes, header: bytes = b"") -> list[Any]:
    """Status of one request, and whether the connection is closed after it."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(REQUEST % (line, header))
        answer = client.recv(65536)
        if b"connection: close" not in answer.lower():  # else the end comes, however slow the machine is
            client.settimeout(0.2)
        try:
            closed = client.recv(65536) == b""
        except TimeoutError:
            closed = False
        return [int(answer.split()[1]), closed]


@pytest.fixture(scope="module")
def open_to_all() -> Iterator[LiveDaemon]:
    """Every user reaches its socket."""
    needs.root()
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        Path(name).chmod(0o755)
        with LiveDaemon(Path(name), "file", *OPEN_TO_ALL) as daemon:
            yield daemon


def test_other_uids_get_401_on_every_path_but_health_and_are_disconnected(open_to_all: LiveDaemon) -> None:
    lines = [
        b"GET /status", b"POST /encrypt", b"POST /decrypt", b"POST /create_dek_for_thread", b"POST /rotate_kek",
        b"GET /keys", b"GET /nowhere", b"DELETE /health", b"POST /encrypt_batch",
    ]  # fmt: skip
    answers = foreign.run_as(foreign.UID, lambda: [ask(open_to_all.socket, line) for line in (*lines, b"GET /health")])
    assert answers[:-1] == [[401, True]] * len(lines)
    assert answers[-1] == [200, False]


def test_a_bearer_token_never_authenticates(open_to_all: LiveDaemon) -> None:
    header = b"Authorization: Bearer anything\r\n"
    assert foreign.run_as(foreign.UID, lambda: ask(open_to_all.socket, b"GET /status", header)) == [401, True]
    assert ask(open_to_all.socket, b"GET /status", header) == [200, False]


def test_only_the_named_uids_are_allowed_not_the_daemons_own(public: Path) -> None:
    with LiveDaemon(public, "file", *OPEN_TO_ALL, "--allowed-uids", str(foreign.UID)) as daemon:
        assert foreign.run_as(foreign.UID, lambda: ask(daemon.socket, b"GET /status"))[0] == 200
        assert foreign.run_as(foreign.UID + 1, lambda: ask(daemon.socket, b"GET /status"))[0] == 401
        assert ask(daemon.socket, b"GET /status")[0] == 401
        with daemon.client() as kms, pytest.raises(UnauthorizedError, match=f"uid {os.geteuid()} .*--allowed-uids"):
            kms.status()


def test_the_overflow_uid_is_never_allowed_even_if_it_is_named(public: Path) -> None:
    """In a user namespace that has only the daemon's user, all others have one uid, and none is admitted."""
    needs.root()
    unshare = needs.namespaces("user")
    with LiveDaemon(
        public, "file", *OPEN_TO_ALL, "--allowed-uids", "0,65534", program=(unshare, "--user", "--map-root-user")
    ) as daemon:
        assert ask(daemon.socket, b"GET /status")[0] == 200
        assert foreign.run_as(foreign.UID, lambda: ask(daemon.socket, b"GET /status")) == [401, True]


def test_a_policy_that_names_the_overflow_uid_is_refused() -> None:
    with pytest.raises(StartError, match="overflow uid"):
        Policy([0, 65534], overflow_uid=65534)


def test_a_flood_of_refusals_is_a_few_lines_with_their_count(public: Path) -> None:
    with LiveDaemon(public, "file", *OPEN_TO_ALL) as daemon:
        count = 500
        begun = time.monotonic()
        foreign.run_as(foreign.UID, lambda: [ask(daemon.socket, b"GET /status")[0] for _ in range(count)])
        wait_until(lambda: sum(event["count"] for event in daemon.events("refused")) >= count)
        refused, took_s = daemon.events("refused"), time.monotonic() - begun
    assert sum(event["count"] for event in refused) == count
    assert len(refused) <= 2 + took_s, "one at once and one a second"
    assert {event["actor"] for event in refused} == {f"peer_uid:{foreign.UID}"}


def test_other_uids_cannot_use_up_the_connections_of_the_allowed(public: Path) -> None:
    with LiveDaemon(public, "file", *OPEN_TO_ALL) as daemon:

        def occupy() -> list[int]:
            held = []
            for _ in range(UNAUTHORISED_CONNECTIONS_MAX + 50):
                client = socket.socket(socket.AF_UNIX)
                client.settimeout(60)
                client.connect(str(daemon.socket))
                held.append(client)
            closed = foreign.closed_count(held, 50)
            return [closed, ask(daemon.socket, b"GET /health")[0] if closed < 50 else 0]

        closed, _ = foreign.run_as(foreign.UID, occupy)
        assert closed == 50
        assert ask(daemon.socket, b"GET /status")[0] == 200


@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_the_body_of_another_uid_is_not_kept_not_even_for_health(open_to_all: LiveDaemon, method: bytes) -> None:
    def announce() -> int:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(open_to_all.socket))
            client.sendall(b"%b /health HTTP/1.1\r\nHost: x\r\nContent-Length: 16000000\r\n\r\nbegun" % method)
            return int(client.recv(65536).split()[1])

    assert foreign.run_as(foreign.UID, announce) == 401


def test_a_client_sends_nothing_to_a_squatted_socket(public: Path) -> None:
    """Another user listens on the path of the daemon: the client checks the listener's uid before it sends anything."""
    path = public / "s"
    public.chmod(0o777)  # as a careless operator would leave it: the daemon itself would refuse the directory
    ready, heard = os.pipe(), os.pipe()

    def squat() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            path.chmod(0o777)
            listener.listen()
            os.write(ready[1], b"r")
            accepted, _ = listener.accept()
            accepted.settimeout(60)
            os.write(heard[1], b"[" + accepted.recv(1000) + b"]")

    child = os.fork()
    if child == 0:
        foreign.run_as(foreign.UID, squat)
        os._exit(0)
    os.read(ready[0], 1)
    with minikms.Client(path, wait_s=0.1) as client, pytest.raises(KmsUntrustedServerError, match=str(foreign.UID)):
        client.encrypt("k_" + "0" * 26, b"the secret text")
    assert os.read(heard[0], 1000) == b"[]"
    os.waitpid(child, 0)
    for descriptor in (*ready, *heard):
        os.close(descriptor)


def test_a_socket_and_a_watchdog_of_the_service_manager_are_served(public: Path) -> None:
    """As a .socket unit and a .service unit of Type=notify with WatchdogSec= start it, without a service manager."""
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        listener.bind(str(public / "managed"))
        listener.listen()
        manager.bind(str(public / "notify"))
        manager.settimeout(60)
        launcher = public / "launcher.py"
        launcher.write_text(
            "import os, sys\n"
            f"os.dup2({listener.fileno()}, 3)\n"
            "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'WATCHDOG_USEC': '1000000', "
            f"'NOTIFY_SOCKET': {str(public / 'notify')!r}}}\n"
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
        )
        with LiveDaemon(
            public, "file", launcher=(str(launcher),), pass_fds=(listener.fileno(),), socket=public / "managed"
        ) as daemon:
            assert manager.recv(1000).startswith(b"READY=1\n")
            assert [manager.recv(1000) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            assert ask(public / "managed", b"GET /status")[0] == 200
            (public / "managed").rename(public / "away")
            wait_until(lambda: "socket removed" in daemon.log.read_text())
            manager.settimeout(2)
            with pytest.raises(TimeoutError):
                while True:  # those that were on their way
                    manager.recv(1000)
            (public / "away").rename(public / "managed")
            manager.settimeout(60)
            assert manager.recv(1000) == b"WATCHDOG=1"
            daemon.process.terminate()
            last = b""
            while not last.startswith(b"STOPPING=1"):  # read at once: a full queue takes no further message
                last = manager.recv(1000)
            daemon.process.wait(60)
        assert (public / "managed").exists(), "the manager's socket is the manager's"


def test_the_audit_log_names_uid_and_pid_of_the_caller(public: Path) -> None:
    with LiveDaemon(public, "file") as daemon, daemon.client() as client:
        client.create_dek_for_thread("thread")
        (event,) = daemon.events("create_dek")
    assert event["actor"] == f"peer_uid:{os.geteuid()}"
    assert event["pid"] == os.getpid()


def test_an_uncertain_pid_leaves_an_audit_line(public: Path) -> None:
    """The connector's child goes on with its descriptor, as after a descriptor was passed on."""
    with LiveDaemon(public) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)  # so that it accepts the connection after the connector has ended
        with socket.socket(socket.AF_UNIX) as client:
            child = os.fork()
            if child == 0:
                client.connect(str(daemon.socket))
                os._exit(0)
            os.waitpid(child, 0)
            daemon.process.send_signal(signal.SIGCONT)
            client.settimeout(60)
            client.sendall(REQUEST % (b"GET /status", b""))
            assert client.recv(65536).split()[1] == b"200"
        assert [event["pid"] for event in daemon.events("peer")] == [child]
        with daemon.client() as certain:
            certain.status()
        assert len(daemon.events("peer")) == 1
