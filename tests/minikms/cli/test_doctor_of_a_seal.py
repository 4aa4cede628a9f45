"""`minikms doctor` names the seal, and keeps its other findings beside a sealed daemon."""

import json
from pathlib import Path

from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon


def findings(*places: str) -> list[str]:
    """The areas of what it finds."""
    done = forked.run("minikms", "doctor", "--json", *places)
    assert done.returncode in (0, 1), done.stderr
    return [finding["area"] for finding in json.loads(done.stdout)["findings"]]


def test_doctor_names_the_seal_and_keeps_its_other_findings(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        directory, socket = ("--data-dir", str(daemon.data_dir)), ("--socket", str(daemon.socket))
        before = findings(*directory)
        assert "seal" not in [*before, *findings(*socket)]
        with daemon.client() as client:
            client.seal()
        assert findings(*directory).count("seal") == findings(*socket).count("sealed") == 1
        both = findings(*directory, *socket)
        assert both.count("seal") == both.count("sealed") == 1
        assert set(before) <= set(both)
        assert "audit log" not in both
        (daemon.data_dir / "sealed.json").write_bytes(b"damaged")
        assert findings(*directory).count("seal") == 1
