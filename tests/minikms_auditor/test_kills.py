"""The auditor is killed before each call that changes the disk: no tree checkpoint is lost, or ahead of its state."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest

from minikms.custody import files
from tests.minikms_auditor.rig import Rig, root_of

CALLS = ("open", "write", "pwrite", "rename", "unlink", "rmdir", "mkdir", "ftruncate", "fsync", "fdatasync")
W1 = "witness.example/w1"


def killed_before_call(rig: Rig, number: int) -> bool:
    """Run a step in a child that is killed before its `number`-th call that changes the disk. False: it made fewer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child uses its own only
        pid = os.fork()
    if pid == 0:
        left = number
        for name in CALLS:
            real = getattr(os, name)

            def call(*arguments: Any, real: Any = real, name: str = name, **options: Any) -> Any:
                nonlocal left
                if name != "open" or arguments[1] & os.O_CREAT:
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            setattr(os, name, call)
        files._PROCESS_TEMP_PREFIX = f"{files.TEMP_PREFIX}{os.getpid():016x}-"  # type: ignore[misc]  # of a new process
        try:
            rig.begin_in_child()
            rig.steps()
        except BaseException:  # noqa: BLE001  the child must not run the parent's tests
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    killed = os.WIFSIGNALED(status)
    assert (os.WTERMSIG(status) == signal.SIGKILL) if killed else os.WEXITSTATUS(status) == 0
    return killed


@pytest.mark.parametrize("lines", [3, 150])
def test_a_kill_at_any_call_leaves_one_tree(tmp_path: Path, lines: int) -> None:
    """With 150 lines most steps fill a tile of the lowest level."""
    with Rig(tmp_path, witnesses=1) as rig:
        rig.write(40)
        rig.steps()
        rig.stop()
        number = 1
        while True:
            rig.write(lines)
            killed = killed_before_call(rig, number)
            state = json.loads((rig.state_dir / "state.json").read_text())
            assert rig.known_size(W1) <= state["size"], "a signature left before the state was durable"
            written = rig.lines()
            status = rig.steps()
            rig.stop()
            assert (status.alarm, status.errors) == ("", ())
            assert rig.published() == (len(written), root_of(written))
            if not killed:
                break
            number += 1
        assert number > 15
