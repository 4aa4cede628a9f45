"""The auditor is killed before each call that changes something: no tree checkpoint is lost, or ahead of its state."""

import json
from pathlib import Path

import pytest

from minikms_auditor import store
from tests.minikms.audit.logmaker import KEY1, KEY2
from tests.minikms_auditor.killing import InFile, a_step, killed_before_call
from tests.minikms_auditor.rig import Rig, root_of

W1 = "witness.example/w1"


@pytest.mark.parametrize(("lines", "every"), [(3, 1), (150, 4), pytest.param(150, 1, marks=pytest.mark.torture)])
def test_a_kill_at_any_call_leaves_one_tree(tmp_path: Path, lines: int, every: int) -> None:
    """With 150 lines most steps fill a tile of the lowest level. A reported position is published before. `every`: at
    how many calls there is one kill.
    """
    with Rig(tmp_path, witnesses=1) as rig:
        rig.daemon.reports = reported = InFile(tmp_path / "reports")
        rig.write(40)
        rig.steps()
        rig.stop()
        number = 1
        while True:
            rig.write(lines)
            killed = killed_before_call(number, a_step(rig), (rig.daemon, "report_audit_position"))
            state = json.loads((rig.state_dir / "state.json").read_text())
            assert rig.known_size(W1) <= state["size"], "a signature left before the state was durable"
            assert reported.newest() <= rig.published()[0], "a position was reported before its tree was published"
            written = rig.lines()
            status = rig.steps()
            rig.stop()
            assert (status.alarm, status.errors) == ("", ())
            assert rig.published() == (len(written), root_of(written))
            if not killed:
                break
            number += every
        assert number > 15


def test_a_kill_of_accept_log_keeps_what_was_accepted(tmp_path: Path) -> None:
    first, second = KEY1.public_key, KEY2.public_key
    number, killed = 1, True
    while killed:
        (tmp_path / store.ACCEPTED_NAME).unlink(missing_ok=True)
        store.accept_key(str(tmp_path), first)
        killed = killed_before_call(number, lambda: store.accept_key(str(tmp_path), second))
        assert store.accepted_keys(str(tmp_path)) in ([first], [first, second])
        store.accept_key(str(tmp_path), second)
        assert store.accepted_keys(str(tmp_path)) == [first, second]
        number += 1
    assert number > 3
