"""The auditor is killed before each call that changes the disk: no tree checkpoint is lost, or ahead of its state, and
no sink misses a line.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from minikms.custody import files
from minikms_auditor.config import FileSink
from minikms_auditor.sinks import FileTransport, Message, RefusedError
from tests.minikms_auditor.receivers import ShippingRig
from tests.minikms_auditor.rig import Rig, root_of

CALLS = ("open", "write", "pwrite", "rename", "unlink", "rmdir", "mkdir", "ftruncate", "fsync", "fdatasync")
W1 = "witness.example/w1"


def killed_before_call(rig: Rig, number: int, act: Callable[[], object]) -> bool:
    """Run `act` in a child that is killed before its `number`-th call that changes the disk. False: it made fewer."""
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
            act()
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
            killed = killed_before_call(rig, number, rig.steps)
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


class _Choosy(FileTransport):
    """A file that refuses each seventh line for good."""

    def deliver(self, messages: Sequence[Message]) -> None:
        if any(each.event.seq % 7 == 0 for each in messages):
            raise RefusedError("it answers 400")
        super().deliver(messages)


def attempt_each(rig: ShippingRig) -> None:
    """Attempts of the sink alone, until nothing is left to do."""
    while rig.attempt()[1]:
        pass


def check_sink_kills(base: Path, text: Literal["line", "ocsf"], first: int, step: int) -> None:
    """Kill the sink before its call `first` and each `step`-th after it, until it makes fewer. Events may be repeated,
    because their file does not say how far it is; a file of lines has none twice.
    """
    sink = FileSink(name="copy", path=str(base / "copy"), format=text)
    with ShippingRig(base, sink, lambda _: _Choosy(sink)) as rig:
        number, killed = first, True
        while killed:
            rig.write(7)
            rig.steps()
            rig.stop()
            killed = killed_before_call(rig, number, lambda: attempt_each(rig))
            number += step
        assert number > first + step
        assert rig.ship().error == ""
        lines = rig.lines()
        stored = (base / "copy").read_bytes().split(b"\n")[:-1]
        if text == "ocsf":
            stored = list(dict.fromkeys(json.loads(event)["raw_data"].encode() for event in stored))
        assert stored == [line for number, line in enumerate(lines) if (number + 1) % 7]
        kept = dict.fromkeys(entry["seq"] for entry in rig.rejected())
        assert list(kept) == [number for number in range(1, len(lines) + 1) if number % 7 == 0]


def test_a_kill_at_some_calls_loses_no_line_of_a_sink(tmp_path: Path) -> None:
    """`make torture` kills it at each call."""
    check_sink_kills(tmp_path, "line", 4, 17)


@pytest.mark.torture
@pytest.mark.parametrize("text", ["line", "ocsf"])
def test_a_kill_at_any_call_loses_no_line_of_a_sink(tmp_path: Path, text: Literal["line", "ocsf"]) -> None:
    check_sink_kills(tmp_path, text, 1, 1)
