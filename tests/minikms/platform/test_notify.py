"""The notifications to the service manager."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.platform.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A listening manager, and the NOTIFY_SOCKET that it hands out."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@minikms-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.settimeout(60)
        yield sock, address


def test_each_change_of_state_is_one_datagram(manager: tuple[socket.socket, str]) -> None:
    sock, address = manager
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.ready("serving 3 keys")
    notifier.watchdog()
    notifier.stopping()
    assert [sock.recv(1000) for _ in range(3)] == [b"READY=1\nSTATUS=serving 3 keys", b"WATCHDOG=1", b"STOPPING=1"]


def test_the_variables_are_removed_from_the_environment() -> None:
    environ = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "PATH": "kept"}
    Notifier(environ)
    assert environ == {"PATH": "kept"}


@pytest.mark.parametrize("address", ["", "relative", "/nowhere/at/all", "@nobody-listens-here"])
def test_a_missing_manager_is_no_error(address: str) -> None:
    Notifier({"NOTIFY_SOCKET": address}).ready("fine")


def test_a_manager_whose_queue_is_full_does_not_block(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        notifier = Notifier({"NOTIFY_SOCKET": address})
        for _ in range(2000):
            notifier.watchdog()


@pytest.mark.parametrize(
    ("environ", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_interval_is_half_its_time_out_for_this_pid_only(
    environ: dict[str, str], interval_s: float | None
) -> None:
    assert Notifier(dict(environ)).watchdog_interval_s == interval_s
