"""The auditor is killed before each call that changes the disk: no sink misses a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest

from minikms_auditor.config import FileSink
from minikms_auditor.sinks import BatchRefusedError, FileTransport, SinkMessage
from tests.minikms_auditor.killing import killed_before_call
from tests.minikms_auditor.receivers import ShippingRig


class _Choosy(FileTransport):
    """A file that refuses each seventh line for good."""

    def deliver(self, messages: Sequence[SinkMessage]) -> None:
        if any(each.event.seq % 7 == 0 for each in messages):
            raise BatchRefusedError("it answers 400")
        super().deliver(messages)


def attempt_each(rig: ShippingRig) -> None:
    """In a child: attempts of the sink alone, until nothing is left to do."""
    rig.begin_in_child()
    while rig.attempt()[1]:
        pass


def check_sink_kills(base: Path, text: Literal["line", "ocsf"], first: int, step: int) -> None:
    """Kill the sink before its call `first` and each `step`-th after it, until it makes fewer. No line is in the file
    twice.
    """
    sink = FileSink(name="copy", path=str(base / "copy"), format=text)
    with ShippingRig(base, sink, lambda _: _Choosy(sink)) as rig:
        number, killed = first, True
        while killed:
            rig.write(7)
            rig.steps()
            rig.stop()
            killed = killed_before_call(number, lambda: attempt_each(rig))
            number += step
        assert number > first + step
        assert rig.ship().error == ""
        lines = rig.lines()
        stored = (base / "copy").read_bytes().split(b"\n")[:-1]
        if text == "ocsf":
            stored = [json.loads(event)["raw_data"].encode() for event in stored]
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
