"""The commands of docs/other-hosts.md, in their order, on a directory in the place of the machine's own."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import needs
from tests.harness.callers import PolicyDaemon
from tests.harness.gateways import GATEWAY
from tests.harness.ports import free_ports
from tests.harness.waiting import wait_until

PAGE = Path(__file__).parents[2] / "docs" / "other-hosts.md"
BLOCK_S_MAX = 120.0
CHANGES_THE_MACHINE = re.compile(r"^(?:systemctl|install|/opt/progressdb/bin/pip) .*\n", re.MULTILINE)
POLICY = """
[[grant]]
name = "operator"
principals = ["uid:0"]
roles = ["monitor"]
threads = []
"""


class Host:
    """Where the commands run: the files, users and ports that stand for those of the page."""

    def __init__(self, base: Path, daemon: PolicyDaemon) -> None:
        self.directory = base / "gateway"
        self.directory.mkdir(mode=0o755)
        python = f"{sys.executable} -P -m"
        listen, metrics = free_ports(2)
        self._instead = {
            "/opt/progressdb/bin/minikms-gateway": f"{python} minikms_gateway",
            "/opt/progressdb/bin/minikms": f"{python} minikms",
            "/etc/progressdb/policy/policy.toml": str(daemon.policy),
            "/etc/progressdb/gateway": str(self.directory),
            "/run/minikms/minikms.sock": str(daemon.socket),
            "$(id -u minikms-gateway)": str(GATEWAY),
            "$(id -u minikms)": "0",
            "--reuid=minikms-gateway --regid=minikms-gateway --init-groups": f"--reuid={GATEWAY} --clear-groups",
            "chgrp minikms-gateway": f"chown {GATEWAY}",
            "8443": str(listen),
            "9103": str(metrics),
        }

    def run(self, block: str) -> subprocess.CompletedProcess[str]:
        text = CHANGES_THE_MACHINE.sub("", block)
        for there, here in self._instead.items():
            text = text.replace(there, here)
        command = ["bash", "-euo", "pipefail", "-c", text]
        return subprocess.run(
            command, cwd="/", capture_output=True, text=True, timeout=BLOCK_S_MAX, check=False, stdin=subprocess.DEVNULL
        )

    @contextlib.contextmanager
    def gateway(self) -> Iterator[Path]:
        """Runs it, and gives its log."""
        command = [needs.program("setpriv"), f"--reuid={GATEWAY}", "--clear-groups", sys.executable, "-P", "-m"]
        command += ["minikms_gateway", "--config", str(self.directory / "gateway.toml")]
        log = self.directory.parent / "log"
        with log.open("wb") as file, subprocess.Popen(command, cwd="/", stdout=file, stderr=file) as process:
            try:
                wait_until(lambda: process.poll() is not None or "event=serving" in log.read_text())
                assert process.poll() is None, log.read_text()
                yield log
            finally:
                process.terminate()


def test_the_commands_serve_a_client_until_it_is_revoked() -> None:
    needs.interpreter_for(GATEWAY)
    for name in ("curl", "openssl"):
        needs.program(name)
    *before, use, revoke = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, PolicyDaemon(Path(name), POLICY) as daemon:
        host = Host(Path(name), daemon)
        for block in before:
            done = host.run(block)
            assert done.returncode == 0, (block, done.stdout, done.stderr)
        daemon.use_policy(daemon.policy.read_text().removeprefix("version = 1\n"))
        with host.gateway() as log:
            done = host.run(use)
            assert json.loads(done.stdout)["key_id"].startswith("k_"), done.stderr
            assert "403" in host.run(use.replace("chat-1", "other-1")).stderr
            done = host.run(revoke)
            assert done.returncode == 0, done.stderr
            wait_until(lambda: "401" in host.run(use).stderr)
            assert "reason=revoked" in log.read_text()
