"""The commands of docs/other-hosts.md, in their order, on a directory in the place of the machine's own."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from tests import needs
from tests.harness.callers import PolicyDaemon
from tests.harness.certificates import replace
from tests.harness.gateways import GATEWAY
from tests.harness.ports import free_ports
from tests.harness.waiting import wait_until

PAGE = Path(__file__).parents[2] / "docs" / "other-hosts.md"
*BEFORE, USE, REVOKE = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
[WITHOUT_UNITS] = re.findall(r"^```text\nminikms policy reload\n(.*?)\n```$", PAGE.read_text(), re.MULTILINE)
BLOCK_S_MAX = 120.0
CHANGES_THE_MACHINE = re.compile(r"^(?:systemctl|install) .*\n", re.MULTILINE)
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
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
        listen, metrics = free_ports(2)
        self._instead = {
            "runuser -u minikms-gateway --": f"setpriv --reuid={GATEWAY} --clear-groups",
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

    def _command(self, block: str) -> list[str]:
        text = CHANGES_THE_MACHINE.sub("", block)
        for there, here in self._instead.items():
            text = text.replace(there, here)
        return ["bash", "-euo", "pipefail", "-c", text]

    def run(self, block: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self._command(block),
            cwd="/",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=BLOCK_S_MAX,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    @contextlib.contextmanager
    def gateway(self) -> Iterator[Path]:
        """Runs it, and gives its log."""
        command = self._command(f"exec {WITHOUT_UNITS}")
        log = self.directory.parent / "log"
        with (
            log.open("wb") as file,
            subprocess.Popen(command, cwd="/", env=ENVIRONMENT, stdout=file, stderr=file) as process,
        ):
            try:
                wait_until(lambda: process.poll() is not None or "event=serving" in log.read_text())
                yield log
            finally:
                process.terminate()

    def expire(self, name: str) -> None:
        """The certificate of that name as it is when it has expired."""
        path = self.directory / f"{name}.pem"
        old = x509.load_pem_x509_certificate(path.read_bytes())
        key = load_pem_private_key((self.directory / "ca.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        made = x509.CertificateBuilder(
            old.issuer, old.subject, old.public_key(), old.serial_number, extensions=list(old.extensions)
        )
        ended = datetime.now(UTC) - timedelta(seconds=1)
        expired = made.not_valid_before(ended - timedelta(days=1)).not_valid_after(ended).sign(key, SHA256())
        replace(path, expired.public_bytes(Encoding.PEM))


@pytest.fixture
def host() -> Iterator[Host]:
    """One on which the commands up to those of a client have been run."""
    needs.interpreter_for(GATEWAY)
    for name in ("curl", "openssl", "setpriv"):
        needs.program(name)
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name, PolicyDaemon(Path(name), POLICY) as daemon:
        host = Host(Path(name), daemon)
        for block in BEFORE:
            done = host.run(block)
            assert done.returncode == 0, (block, done.stdout, done.stderr)
        daemon.use_policy(daemon.policy.read_text().removeprefix("version = 1\n"))
        yield host


def test_the_commands_serve_a_client_until_it_is_revoked(host: Host) -> None:
    with host.gateway() as log:
        done = host.run(USE)
        assert json.loads(done.stdout)["key_id"].startswith("k_"), done.stderr
        assert "403" in host.run(USE.replace("chat-1", "other-1")).stderr
        done = host.run(REVOKE)
        assert done.returncode == 0, done.stderr
        wait_until(lambda: "401" in host.run(USE).stderr)
        assert "reason=revoked" in log.read_text()


def test_expired_certificates_are_renewed_as_the_runbook_says(host: Host) -> None:
    section = (PAGE.parent / "runbook.md").read_text().split("\n## A certificate has expired\n")[1]
    [renew] = re.findall(r"```sh\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    host.expire("server")
    with host.gateway() as log:
        assert "server.pem has expired" in log.read_text()
    assert host.run(renew).returncode == 0
    with host.gateway() as log:
        host.expire("client")
        assert "expired" in host.run(USE).stderr
        wait_until(lambda: "reason=expired" in log.read_text())
        assert host.run(renew.replace("server", "client")).returncode == 0
        assert host.run(USE).returncode == 0
