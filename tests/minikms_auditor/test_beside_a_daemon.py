"""The tree of a real daemon's log over what operators do with the key service, and over older copies of everything."""

import contextlib
import os
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.client import Client
from minikms_auditor.auditor import Status
from tests.harness import forked
from tests.harness.audited_daemon import POLICY, AuditedDaemon
from tests.harness.waiting import wait_until
from tests.minikms.audit.logmaker import Key
from tests.minikms_auditor.rig import ORIGIN, Rig, root_of

pytestmark = pytest.mark.torture
W1 = "witness.example/w1"
AUDITOR_GRANT = """
[[grant]]
principals = ["uid:0"]
roles = ["ship"]
"""


class Machine:
    """A daemon, its auditor in this process, and a witness."""

    def __init__(self, base: Path, stack: contextlib.ExitStack, *flags: str) -> None:
        self.base = base
        self.daemon = stack.enter_context(AuditedDaemon(base, *flags, policy=POLICY + AUDITOR_GRANT))
        own = base / "auditor"
        own.mkdir()
        self.rig = stack.enter_context(Rig(own, witnesses=1))
        self.rig.log_dir = self.daemon.log_dir
        self.client = stack.enter_context(Client(self.daemon.socket, server_uids=[0]))
        self.rig.kms = self.client
        first = Key(1)
        first.public_key = b64decode(self.daemon.lines()[0]["event"]["facts"]["public_key"])
        self.rig.public_keys = [first]

    def steps_until(self, count: int) -> Status:
        """Until that many lines of the log are under the published tree checkpoint."""
        status = self.rig.steps()

        def are_taken() -> bool:
            nonlocal status
            status = self.rig.steps()
            assert not status.alarm, status
            return status.position_seq >= count

        wait_until(are_taken)
        return status

    def take_all(self) -> Status:
        return self.steps_until(len(self.daemon.lines()))

    def verify(self) -> subprocess.CompletedProcess[str]:
        """What somebody finds who has the published tree checkpoint."""
        keys = ("--log-key", self.rig.vkey(), "--witness", self.rig.witness(W1)[1], "--quorum", "1", "--max-age", "1h")
        tree = self.rig.state_dir / "tree"
        return self.minikms("audit", "verify", "--checkpoint", tree / "checkpoint", "--tiles", tree, *keys)

    def minikms(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A command without the daemon, on its data directory."""
        own = ("--data-dir", str(self.daemon.data_dir), "--master-key-file", str(self.daemon.root_file))
        return forked.run("minikms", *words, *own)

    def do(self, *words: object) -> None:
        done = self.minikms(*words)
        assert done.returncode == 0, done


@pytest.fixture
def machine(public: Path) -> Iterator[Machine]:
    with contextlib.ExitStack() as stack:
        yield Machine(public, stack)


def test_the_tree_goes_on_when_a_root_key_is_removed(machine: Machine) -> None:
    """The audit key changes while the daemon serves."""
    machine.take_all()
    daemon, spare = machine.daemon, os.urandom(32)
    operator = daemon.caller()
    slot = operator.post("/roots", {"provider": "file", "root_hex": spare.hex()}).body["slot_id"]
    assert operator.post(f"/roots/{slot}/remove", {}).status == 200
    assert daemon.audited("audit_key")
    machine.take_all()
    assert machine.rig.published()[1] == root_of(machine.rig.lines()[: machine.rig.published()[0]])
    assert machine.verify().returncode == 0, machine.verify()


def test_the_tree_goes_on_when_the_audit_key_is_rotated_offline(machine: Machine) -> None:
    machine.take_all()
    machine.daemon.stop()
    machine.do("audit", "rotate-key")
    machine.daemon.start()
    machine.daemon.new_key("t")
    machine.take_all()
    assert machine.verify().returncode == 0, machine.verify()


def test_lines_that_a_seal_left_unsigned_wait_for_the_unseal(machine: Machine) -> None:
    """They are shown as a lag, and are no alarm. A restart while it is sealed changes nothing."""
    machine.take_all()
    daemon = machine.daemon
    operator = daemon.caller()
    daemon.new_key("t")
    assert operator.post("/seal", {}).status == 200
    lines = len(daemon.lines())
    assert daemon.lines()[-1]["event"]["type"] != "checkpoint"
    for _ in range(2):
        wait_until(lambda: machine.rig.steps().durable_seq == lines)
        status = machine.rig.steps(4)
        assert (status.alarm, status.errors, status.lag_lines > 0) == ("", (), True), status
        assert status.published_size < lines
        daemon.kill()
        daemon.start()
    assert daemon.caller().post("/unseal", {"from_source": True}).status == 200
    machine.steps_until(lines + 1)
    assert machine.verify().returncode == 0, machine.verify()


def test_a_log_that_was_begun_anew_after_a_loss_continues_the_tree(machine: Machine) -> None:
    machine.take_all()
    size = machine.rig.published()[0]
    daemon = machine.daemon
    daemon.kill()
    log = daemon.log_dir / "minikms-audit.log"
    log.write_bytes(log.read_bytes().replace(b'"start"', b'"stqrt"', 1))
    assert machine.verify().returncode == 1
    log.unlink()
    daemon.command.append("--accept-audit-loss")
    daemon.start()
    first = daemon.lines()[0]["event"]["facts"]
    status = machine.take_all()
    assert "previous" in first and status.log_id == first["log_id"]
    assert machine.rig.published()[0] > size
    assert machine.verify().returncode == 0, machine.verify()


def test_a_restored_archive_continues_the_tree_and_its_older_log_does_not(machine: Machine) -> None:
    """The restored keyring has the audit key that the tree knows. A copy of the former log is no new log, although it
    begins with a known key.
    """
    machine.take_all()
    daemon, archive = machine.daemon, machine.base / "archive"
    machine.do("backup", "create", archive)
    older = shutil.copytree(daemon.log_dir, machine.base / "older")
    for number in range(20):
        daemon.new_key(f"t{number}")
    machine.take_all()
    size = machine.rig.published()[0]
    daemon.stop()
    for place in (daemon.data_dir, daemon.log_dir):
        place.rename(machine.base / f"lost-{place.name}")
    shutil.copytree(machine.base / "lost-audit", daemon.log_dir, ignore=lambda place, names: names)
    machine.do("backup", "restore", archive, "--yes", "--audit-dir", daemon.log_dir)
    daemon.start()
    machine.take_all()
    assert machine.rig.published()[0] > size
    daemon.stop()
    for file in daemon.log_dir.glob("minikms-audit*"):
        file.unlink()
    shutil.rmtree(daemon.data_dir)
    shutil.copytree(machine.base / "lost-data", daemon.data_dir)
    for file in older.glob("minikms-audit*"):
        shutil.copy2(file, daemon.log_dir)
    daemon.command.append("--accept-restore")
    daemon.start()
    before = machine.rig.published()
    status = machine.rig.steps(4)
    assert "is an earlier one of the tree" in status.alarm, status
    assert machine.rig.published() == before


def test_an_older_copy_of_the_whole_machine_stops_before_it_signs(machine: Machine) -> None:
    """Data directory, log and the auditor's state are put back; the daemon starts without a complaint."""
    machine.take_all()
    machine.rig.stop()
    places = (machine.daemon.data_dir, machine.daemon.log_dir, machine.rig.state_dir)
    machine.daemon.kill()
    for place in places:
        shutil.copytree(place, f"{place}.copy")
    machine.daemon.start()
    for number in range(20):
        machine.daemon.new_key(f"t{number}")
    machine.take_all()
    size = machine.rig.known_size(W1)
    machine.rig.stop()
    machine.daemon.kill()
    for place in places:
        shutil.rmtree(place)
        os.rename(f"{place}.copy", place)
    machine.daemon.start()
    before = machine.rig.published()
    status = machine.rig.steps(4)
    assert f"knows a tree of {size} leaves" in status.alarm, status
    assert machine.rig.published() == before
    assert machine.rig.known_size(W1) == size


def test_a_detached_auditor_is_followed_by_one_with_another_origin(machine: Machine) -> None:
    machine.take_all()
    machine.daemon.stop()
    machine.do("audit", "detach", "--yes")
    machine.daemon.start()
    answer = machine.client.report_audit_position(origin=f"{ORIGIN}-2", log_id="", seq=0, mac=b"")
    assert answer.durable.seq > 0
    status = machine.rig.steps(2)
    assert any(f"{ORIGIN}-2" in error for error in status.errors), status
