"""`minikms-auditor status` and status.json: what is wrong is shown, also what the auditor can't write."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms_auditor import command, sinks
from minikms_auditor.config import HttpSink
from minikms_auditor.signers import Signers
from minikms_auditor.sinks import Transport
from minikms_tokens import TokenError
from tests.harness.waiting import wait_until
from tests.minikms_auditor.receivers import ShippingRig
from tests.minikms_auditor.rig import Rig


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as rig:
        (tmp_path / "auditor.toml").write_bytes(rig.config())
        rig.write(5)
        rig.steps()
        yield rig


def shown(rig: Rig, capsys: pytest.CaptureFixture[str], *, as_json: bool = False) -> tuple[int, str]:
    status = command.status(config=rig.base / "auditor.toml", json=as_json)
    return status, capsys.readouterr().out


def test_a_status_without_a_process_is_a_failure(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """At once, not when it has become old: a killed process leaves one that says that all is well."""
    assert shown(rig, capsys)[0] == 0
    rig.stop()
    status, text = shown(rig, capsys)
    assert status == 1 and text.startswith("FAILS: process: the auditor does not run\n  as of ")
    status, text = shown(rig, capsys, as_json=True)
    assert status == 1 and json.loads(text)["errors"] == ["process: the auditor does not run"]


def test_an_old_status_of_a_process_that_runs_is_a_failure(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Its disk may be full."""
    path = rig.state_dir / "status.json"
    found = json.loads(path.read_bytes())
    path.write_text(json.dumps(found | {"updated_at": found["updated_at"] - 100}))
    status, text = shown(rig, capsys)
    assert status == 1 and text.startswith("FAILS: process: the auditor has written no status for 10")


def test_a_full_disk_is_a_failure(
    rig: Rig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "FREE_BYTES_MIN", 1 << 70)
    status, text = shown(rig, capsys)
    assert status == 1 and text.startswith("FAILS: disk: ") and f"free in {rig.state_dir}" in text


def test_no_text_of_a_peer_commands_the_terminal(
    rig: Rig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sign(*_: object) -> None:
        raise TokenError("\x1b[2J\x9b31m\r\nall is well")

    monkeypatch.setattr(Signers, "sign", sign)
    rig.write(5)
    rig.steps()
    status, text = shown(rig, capsys)
    assert status == 1 and "FAILS: signer: ?[2J?31m??all is well\n" in text
    for each in (shown(rig, capsys, as_json=True)[1], (rig.state_dir / "status.json").read_text()):
        assert each.isascii() and each.replace("\n", "").isprintable()


def test_a_required_sink_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds the position back, and so may stop the daemon, long before its exchange has timed out."""
    monkeypatch.setattr(sinks, "HANGS_SECONDS", 0.0)
    answers = threading.Event()

    class Hanging(Transport):
        def deliver(self, messages: object) -> None:
            answers.wait()

    for required in (False, True):
        base = tmp_path / str(required)
        base.mkdir()
        answers.clear()
        sink = HttpSink(name="siem", url="http://127.0.0.1:1", required=required)
        with ShippingRig(base, sink, lambda _: Hanging()) as rig:
            rig.write(5)
            rig.steps()
            sending = threading.Thread(target=rig.ship)
            sending.start()
            if required:
                wait_until(lambda: "has not answered" in rig.sinks[0].status().error)
            answers.set()
            sending.join()
            assert rig.sinks[0].status().error == ""
