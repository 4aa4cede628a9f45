"""The daemon is killed at every system call of a seal and of an unseal that changes what is on disk."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import minikms
from minikms.api.errors import KmsError
from tests import needs
from tests.harness.scripts import verify_audit
from tests.minikms.custody.rotation.crash_points import (
    DEADLINE_SECONDS,
    STATE_CALLS,
    Daemon,
    Injection,
    Point,
    Prepared,
)

THREADS = ("seal", "main", "audit", "disk", "journal", "upkeep")
KEYS = 3
WRONG_ROOT = "0" * 64


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    needs.program("strace")
    return Prepared(tmp_path_factory.mktemp("prepared"), KEYS)


def seal(client: minikms.Client) -> None:
    client.seal()


def unseal(client: minikms.Client) -> None:
    client.unseal()


def sealed_with_a_wrong_attempt(client: minikms.Client) -> None:
    client.seal()
    with pytest.raises(KmsError):
        client.unseal(root_hex=WRONG_ROOT)


CHANGES: dict[str, tuple[Callable[[minikms.Client], None], Callable[[minikms.Client], None]]] = {
    "seal": (lambda client: None, seal),
    "unseal": (sealed_with_a_wrong_attempt, unseal),
}
"""What comes before, and the change during which the daemon is killed."""


def points() -> Iterator[tuple[str, str]]:
    for thread in THREADS:
        for calls in STATE_CALLS:
            yield thread, calls


def killed_at(prepared: Prepared, place: Path, change: str, point: Point) -> bool:
    """One run. False if the change has no such call."""
    before, act = CHANGES[change]
    daemon = prepared.copy_to(place)
    assert daemon.start(), daemon.log()
    try:
        with daemon.client() as client:
            before(client)
            injection = Injection(daemon, point, "signal=KILL")
            acknowledged = True
            try:
                act(client)
            except KmsError:
                acknowledged = False
            injection.end()
        if not injection.happened():
            return False
        assert daemon.has_died(within_s=DEADLINE_SECONDS)
        check(prepared, daemon, change, acknowledged=acknowledged)
        return True
    finally:
        daemon.kill()


def check(prepared: Prepared, daemon: Daemon, change: str, *, acknowledged: bool) -> None:
    assert daemon.start(), daemon.log()
    with daemon.client(wait_s=5.0) as client:
        sealed = client.unseal_status().sealed
        lines = (daemon.base / "data" / "minikms-audit.log").read_text().splitlines()
        log = [json.loads(line)["event"] for line in lines]
        unseals = [event for event in log if event["type"] == "unseal" and event["outcome"] == "ok"]
        if change == "seal" and acknowledged:
            assert sealed
        if change == "unseal":
            assert sealed or unseals, "it serves, and the log has no line about that"
            assert not (acknowledged and sealed)
        if sealed:
            client.unseal()
        prepared.check_records(client)
        assert client.status().status == "ok"
    daemon.stop()
    verify_audit(daemon.base / "data", daemon.key_file)
    if change == "unseal":
        written = (daemon.base / "data" / "minikms-audit.log").read_text()
        assert '"outcome":"wrong_root"' in written, "no attempt is hidden"


@pytest.mark.torture
@pytest.mark.parametrize("change", CHANGES)
def test_no_system_call_of_the_change_loses_anything(prepared: Prepared, tmp_path: Path, change: str) -> None:
    kills = 0
    for thread, calls in points():
        number = 1
        while killed_at(prepared, tmp_path / f"{thread}-{calls[:5]}-{number}", change, Point(thread, calls, number)):
            kills += 1
            number += 1
    assert kills >= 5


@pytest.mark.parametrize(
    ("change", "point"),
    [
        ("seal", Point("seal", "rename,renameat,renameat2", 1, '"sealed.json"')),
        ("unseal", Point("seal", "unlink,unlinkat", 1, "unseal-attempts.json")),
        ("unseal", Point("main", "rename,renameat,renameat2", 1, '"keyring.json"')),
        ("unseal", Point("audit", "fdatasync", 1, "/minikms-audit.log")),
    ],
    ids=str,
)
def test_a_daemon_that_is_killed_during_the_change_loses_nothing(
    prepared: Prepared, tmp_path: Path, change: str, point: Point
) -> None:
    assert killed_at(prepared, tmp_path / "run", change, point)
