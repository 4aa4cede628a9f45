"""The commands of the runbook's section about a SIEM that is away, beside an auditor whose sink waits."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from minikms_auditor.config import HttpSink
from minikms_auditor.sinks import BatchRefusedError, SinkMessage, Transport
from tests.minikms_auditor.receivers import ShippingRig

RUNBOOK = Path(__file__).resolve().parents[2] / "docs" / "runbook.md"
RUN_S_MAX = 60


class _Refusing(Transport):
    def deliver(self, messages: object) -> None:
        assert isinstance(messages, list)
        if any(isinstance(each, SinkMessage) and each.event.seq == 7 for each in messages):
            raise BatchRefusedError("it answers 400")


def run(rig: ShippingRig, block: str) -> str:
    command = f"{shlex.quote(sys.executable)} -P -m minikms_auditor"
    block = block.replace("runuser -u minikms-auditor -- minikms-auditor", command).replace("skip 1234", "skip 7")
    block = block.replace("/etc/progressdb/auditor", str(rig.base)).replace(
        "/var/lib/progressdb/auditor", f"{rig.state_dir}"
    )
    done = subprocess.run(["bash", "-c", block], capture_output=True, text=True, timeout=RUN_S_MAX, check=True)
    return done.stdout


def test_a_line_that_a_siem_refuses_is_skipped_as_the_runbook_says(tmp_path: Path) -> None:
    text = re.search(r"(?ms)^## The SIEM is away$(.*?)^## ", RUNBOOK.read_text("utf-8"))
    assert text is not None
    shows, skips, looks = re.findall(r"```sh\n(.*?)```", text[1], re.DOTALL)
    sink = HttpSink(name="siem", url="http://127.0.0.1:1", required=True)
    with ShippingRig(tmp_path, sink, lambda _: _Refusing()) as rig:
        (tmp_path / "auditor.toml").write_bytes(rig.config())
        rig.write(20)
        rig.ship()
        rig.steps()
        assert "waits for `minikms-auditor skip 7`" in run(rig, shows)
        assert "Line 7 is skipped by siem" in run(rig, skips)
        assert rig.ship().error == ""
        assert '"seq":7' in run(rig, looks)
