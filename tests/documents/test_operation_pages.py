"""What the pages about production, upgrades and security teams tell people to run, works in its order."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.documents.machine import PROJECT, Machine, blocks, machine
from tests.documents.test_readme import end_session
from tests.documents.test_runbook import prepare
from tests.harness.ports import free_port

DOCS = PROJECT / "docs"
DEV_SERVER = blocks(PROJECT / "README.md")[0]
"""Starts a server with --dev, and stores a message."""
START, READ = [next(line for line in DEV_SERVER.splitlines() if part in line) for part in ("--dev", "?thread=")]
SHELL_S_MAX = 240.0


def test_a_dev_server_gets_a_root_key_of_its_own_and_keeps_its_data() -> None:
    """A backup is made as the page says, a half-made one is completed, and a store that is away is noticed."""
    needs.program("curl")
    needs.program("openssl")
    first, second, backup = blocks(DOCS / "production.md")
    create, port = backup.splitlines()[0], free_port()
    server = "progressdb --addr 127.0.0.1:8080 --db ./data"
    script = "\n".join((
        "set -eu", DEV_SERVER, "kill $(jobs -p); wait",
        "(umask 077; openssl rand -hex 32 > other.key)",
        f"{server} --master-key-file other.key 2>&1 | grep 'wrong root key'",
        START, "until curl -sf http://127.0.0.1:8080/readyz; do sleep 0.1; done",
        first, second, "! minikms root list | grep dev", READ,
        f"if {create.replace('server.key', 'other.key')}; then exit 9; fi", "[ ! -e data/backups ]",
        backup, "rm data/backups/monday/minikms.backup", backup, f"if {create}; then exit 9; fi",
        "kill $(jobs -p); wait", "mv data/store not-mounted",
        f"{server} --master-key-file server.key 2> empty.log &",
        "until curl -sf $READYZ | grep empty; do sleep 0.1; done",
        "progressdb status --db data | grep ': store_notice: .*no thread at the start.*1 active'",
        "grep -q event=store_is_empty empty.log", "kill $(jobs -p); wait",
        "rm -r data/store", "mv not-mounted data/store",
        f"! {server} --dev", "echo end",
    ))  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dev-") as made:
        (Path(made) / ".venv").symlink_to(sys.prefix)
        shell = subprocess.Popen(
            ["bash", "-c", script.replace(":8080", f":{port}")],
            cwd=made,
            env={"PATH": f"{made}/.venv/bin:{os.environ['PATH']}", "no_proxy": "127.0.0.1",
                 "PROGRESSDB_ADDR": f"127.0.0.1:{port}", "READYZ": f"http://127.0.0.1:{port}/readyz"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = shell.communicate(timeout=SHELL_S_MAX)
        finally:
            end_session(shell.pid)
    assert output.endswith("end\n"), output
    assert output.count('"text":"hello"') == 3
    assert "wrong root key" in output and "the development key file" in output


@pytest.fixture(scope="module")
def installed() -> Iterator[Machine]:
    with machine() as made:
        prepare(made)
        yield made


def test_the_schedule_rotates_the_kek(installed: Machine) -> None:
    [schedule, *_] = blocks(DOCS / "security-teams.md")
    cron = installed.base / "cron"
    installed.do(schedule.replace("/etc/cron.d/minikms-rotate-kek", str(cron)))
    fields = re.fullmatch(r"0 3 1 1,7 \* root (.+)\n", cron.read_text())
    assert fields
    installed.do(fields[1])
    assert re.search(r"(?m)^ *2 +active", installed.do("minikms kek list"))


def test_a_destroyed_key_leaves_a_receipt_and_a_signed_line(installed: Machine) -> None:
    [_, proof, check] = blocks(DOCS / "security-teams.md")
    key = installed.do("minikms keys list --thread thread-1").split()
    key_id = next(word for word in key if word.startswith("k_"))
    said = installed.do(proof.replace("KEY-ID", key_id))
    receipt = (installed.base / "tmp" / "receipt.json").read_text()
    assert key_id in receipt and "monday" in receipt
    [public_key] = re.findall(r"public key +(\S{43}=)", said)
    checked = installed.do(check.replace("KEY-ID", key_id).replace("PUBLIC-KEY", public_key))
    assert "intact" in said and "The receipt is valid" in checked
    assert "monday" in installed.do(f"minikms keys destroy {key_id} --yes")


def test_an_upgrade_ends_with_both_services_examined(installed: Machine) -> None:
    """The version stays the same: pip and apt-get are not called, only what they are called with is seen."""
    block, from_source = blocks(DOCS / "upgrade.md")
    units = installed.base / "etc/systemd/system"
    units.mkdir(parents=True)
    for program, given in {
        "opt/progressdb/bin/pip": "install -c tools/bootstrap/constraints.txt"
        " .[server,gateway,replicator,pkcs11,aws-kms]",
        "usr/bin/apt-get": "install --yes ./progressdb_0.2.0-1_amd64.deb",
    }.items():
        (installed.base / program).write_text(f'#!/bin/sh\n[ "$*" = "{given}" ] && [ -e "$3" ]')
        (installed.base / program).chmod(0o755)
    for name in ("deploy", "tools"):
        (installed.base / "tmp" / name).symlink_to(PROJECT / name)
    (installed.base / "tmp/progressdb_0.2.0-1_amd64.deb").touch()
    said = installed.do(block)
    assert said.count("0 problem(s)") == 1, said
    installed.do(
        f"set -e\n{from_source}runuser -u minikms -- minikms doctor".replace("/etc/systemd/system", str(units))
    )
    assert {unit.name for unit in units.iterdir()} >= {"minikms.socket", "minikms-auditor.service"}
    assert (units / "minikms@.service.d/tenant.conf").exists()
