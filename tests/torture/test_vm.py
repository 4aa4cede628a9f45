"""The package on a machine of its own: Debian's kernel, systemd, and a power cut (`make vm`).

The tests share the machine, in their order. They need root, and the network for Debian's and Python's packages.
`MINIKMS_VM` names a directory that keeps the image of the bare system for the next run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.deploy.test_units import EXPOSURE_MAX
from tests.documents.machine import UNITS as UNIT_FILES
from tests.documents.machine import blocks
from tests.documents.test_runbook import RUNBOOK, SECTIONS
from tests.harness.waiting import wait_until
from tests.torture.virtual_machine import PROJECT, VirtualMachine, made_image

pytestmark = [pytest.mark.torture, pytest.mark.timeout(7200)]
OPERATOR = blocks(RUNBOOK)[0]
UNITS = ("minikms", "progressdb", "minikms-gateway", "minikms-auditor")
HARDENED = ("minikms", "minikms-gateway", "minikms-auditor")
"""They have a watchdog, too."""
FOLLOWED = (
    "It does not answer",
    "The key file is lost, shares are left",
    "Change the root key",
    "Restore",
    "The auditor is away",
    "A measure is not in force",
)
"""The sections whose commands ask most of systemd. `tests/documents` follows all, without one."""
LIBRARIES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "py.py", "pygments")
"""What the tests import in the guest besides the package's own libraries."""
IN_GUEST = "cd tree; PYTHONPATH=.:../libraries /opt/progressdb/bin/python -m tests.torture.in_guest"
KEY = ". /etc/progressdb/progressdb.env; export PROGRESSDB_API_BACKEND_KEYS; "
STATUS = "curl -sSf --unix-socket /run/minikms/minikms.sock http://kms/status"
ACKNOWLEDGED_MIN = 60
"""Messages before a power cut."""
CUTS = 2
RESTART_S_MAX = 1200.0
"""Until systemd has found that a service hangs, and has restarted it."""
CALLS = """
import http.client, json, os, sys, threading
def call(method, thread, body=None):
    headers = {"X-API-Key": os.environ["PROGRESSDB_API_BACKEND_KEYS"], "X-User-ID": "ada"}
    server = http.client.HTTPConnection("127.0.0.1", 8080)
    server.request(method, f"/v1/threads/{thread}/messages", body, headers)
    answer = server.getresponse()
    return answer.status, answer.read()
"""
WRITE = f"""{CALLS}
def write(writer):
    for number in range(10**9):
        thread = f"{{writer}}-{{number // 10}}"  # each has a key of its own
        status, said = call("POST", thread, json.dumps({{"body": number}}))
        sys.stdout.write(f"{{thread}} {{number}}\\n" if status == 200 else "")
        sys.stdout.flush()
for writer in sys.argv[1:]:
    threading.Thread(target=write, args=[writer]).start()
"""
READ = f"""{CALLS}
for thread in sys.stdin.read().split():
    for message in json.loads(call("GET", thread)[1])["messages"]:
        print(thread, message["body"])
"""
Row = Callable[[str, str], None]


@pytest.fixture(scope="module")
def row() -> Iterator[Row]:
    """Adds a row to the table that is printed at the end."""
    rows: list[str] = []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=PROJECT, capture_output=True, check=True)
    yield lambda check, result: rows.append(f"| {check} | {result} |")
    print("", f"Commit {commit.stdout.decode().strip()}:", "", "| check | result |", "|---|---|", *rows, sep="\n")


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualMachine]:
    """It has the package and the tests in root's home."""
    needs.root()
    work = tmp_path_factory.mktemp("vm")
    image = made_image(Path(os.environ.get("MINIKMS_VM") or work))
    subprocess.run([sys.executable, "tools/release/dist.py", work / "dist"], cwd=PROJECT, check=True)
    with tarfile.open(work / "files.tar", "w") as tar:
        for package in (work / "dist").glob("*.deb"):
            tar.add(package, package.name)
        for directory in ("tests", "docs", "deploy"):
            tar.add(PROJECT / directory, f"tree/{directory}")
        for name in LIBRARIES:
            tar.add(Path(pytest.__file__).parents[1] / name, f"libraries/{name}")
    machine = VirtualMachine(image, work, work / "files.tar")
    try:
        machine.boot()
        machine.sh("tar xf /dev/vdb")
        yield machine
    finally:
        machine.cut_power()


def drop_in(vm: VirtualMachine, unit: str, edit: str, *more: str) -> None:
    """Until it is removed the unit has further lines, and the command that `sed` makes of its own by `edit`."""
    directory = f"/run/systemd/system/{unit}.service.d"
    command = f"sed -n {shlex.quote('/^ExecStart=/{' + edit + ';p}')} /usr/lib/systemd/system/{unit}.service"
    lines = shlex.join(("[Service]", *more, "ExecStart="))
    vm.sh(f"mkdir -p {directory}; (printf '%s\\n' {lines}; {command}) > {directory}/x.conf; systemctl daemon-reload")


def drop_in_removed(vm: VirtualMachine, unit: str) -> None:
    vm.sh(f"rm -r /run/systemd/system/{unit}.service.d; systemctl daemon-reload")


def shown(vm: VirtualMachine, unit: str, name: str) -> str:
    return vm.sh(f"systemctl show --property={name} --value {unit}")


def test_the_page_of_the_package_stores_a_message(vm: VirtualMachine, row: Row) -> None:
    assert vm.sh(blocks(UNIT_FILES / "README.md")[0]).count('"body":{"text":"hello"}') == 2
    assert vm.sh("systemctl is-system-running") == "running"
    row("package, by its page", f"Linux {vm.sh('uname -r')}, systemd {vm.sh('systemctl --version').split()[1]}")


def test_the_socket_starts_the_service_and_its_clients_wait(vm: VirtualMachine, row: Row) -> None:
    vm.sh("systemctl stop progressdb minikms")
    assert vm.ask("systemctl is-active minikms").stdout == "inactive\n"
    vm.sh(STATUS)
    vm.sh(f"systemctl kill -s KILL minikms\n{STATUS}\nsystemctl start progressdb")
    row("socket activation", "a client starts the service, and waits while it restarts")


def test_a_start_that_ends_with_status_2_is_not_repeated(vm: VirtualMachine, row: Row) -> None:
    """Its socket fails after three clients' starts. The block of the runbook starts both again."""
    vm.sh("systemctl stop progressdb minikms.socket minikms")
    drop_in(vm, "minikms", "s|=.*|=/bin/sh -c 'exit 2'|")
    vm.ask("systemctl start minikms")
    assert [shown(vm, "minikms", name) for name in ("ExecMainStatus", "NRestarts")] == ["2", "0"]
    vm.sh("systemctl start minikms.socket; curl -s -m 9 --unix-socket /run/minikms/minikms.sock http://kms || true")
    wait_until(lambda: shown(vm, "minikms.socket", "Result") == "trigger-limit-hit", seconds=RESTART_S_MAX)
    drop_in_removed(vm, "minikms")
    vm.sh(OPERATOR + SECTIONS["It does not answer"][0])
    row("start limits", "status 2 is not repeated; the socket fails after 3 starts; the runbook starts both")


def test_a_credential_of_systemd_holds_the_root_key(vm: VirtualMachine, row: Row) -> None:
    vm.sh("systemd-creds encrypt --name=minikms.key /etc/progressdb/minikms.key /etc/progressdb/minikms.cred")
    vm.sh("mv /etc/progressdb/minikms.key root.key")
    load = "LoadCredentialEncrypted=minikms.key:/etc/progressdb/minikms.cred"
    drop_in(vm, "minikms", "", load, "Environment=PROGRESSDB_MINIKMS_ROOT=systemd-credential:minikms.key")
    vm.sh(f"systemctl restart minikms\n{STATUS}")
    drop_in_removed(vm, "minikms")
    vm.sh(f"mv root.key /etc/progressdb/minikms.key\nsystemctl restart minikms\n{STATUS}")
    row("`systemd-creds`", "`LoadCredentialEncrypted=` with `PROGRESSDB_MINIKMS_ROOT=systemd-credential:minikms.key`")


def test_gateway_and_auditor_run_beside_them(vm: VirtualMachine, row: Row) -> None:
    assert '"key_id"' in vm.sh(IN_GUEST)
    assert vm.sh("systemctl is-system-running") == "running"
    row("gateway, auditor, by their pages", "a client over TLS makes a key; the log has a checkpoint")


def test_each_process_has_a_user_and_locks_its_memory(vm: VirtualMachine, row: Row) -> None:
    processes = {unit: shown(vm, unit, "MainPID") for unit in UNITS}
    assert {unit: vm.sh(f"stat -c %U /proc/{process}") for unit, process in processes.items()} == {u: u for u in UNITS}
    assert vm.ask("runuser -u progressdb -- cat /etc/progressdb/minikms.key").returncode == 1
    for unit in HARDENED:
        assert "unlimited" in vm.sh(f"grep 'Max locked memory' /proc/{processes[unit]}/limits")
        assert int(vm.sh(f"grep VmLck /proc/{processes[unit]}/status").split()[1]) > 0
    row("a uid for each process, `LimitMEMLOCK=`", "four users; memory is locked")


def test_all_hardening_can_be_required(vm: VirtualMachine, row: Row) -> None:
    for unit in HARDENED:
        drop_in(vm, unit, "s|$| --require-hardening|")
    vm.sh(f"systemctl restart {' '.join(HARDENED)}; systemctl is-active {' '.join(UNITS)}")
    row("`--require-hardening`", "succeeds, without parameters of the kernel")


def test_the_watchdog_restarts_a_service_that_hangs(vm: VirtualMachine, row: Row) -> None:
    for unit in HARDENED:
        vm.sh(f"systemctl kill -s STOP {unit}")
    again = ["NRestarts=1", "ActiveState=active", ""] * len(HARDENED)
    asked = f"systemctl show --property=NRestarts,ActiveState {' '.join(HARDENED)}"
    wait_until(lambda: sorted(vm.sh(asked).splitlines()) == sorted(again[:-1]), seconds=RESTART_S_MAX)
    vm.sh(OPERATOR + "minikms status\nprogressdb status")
    row("watchdog", "SIGSTOP: key service, gateway and auditor are restarted")


def test_the_units_are_as_little_exposed_as_their_page_says(vm: VirtualMachine, row: Row) -> None:
    exposed = {}
    for unit in UNITS:
        [exposed[unit]] = re.findall(r"level for \S+ ([0-9.]+)", vm.sh(f"systemd-analyze security {unit} | cat"))
    assert all(float(exposed[unit]) <= EXPOSURE_MAX[f"{unit}.service"] for unit in UNITS)
    row("`systemd-analyze security`", ", ".join(f"{unit} {exposed[unit]}" for unit in UNITS))


def test_the_journal_has_json_lines_and_no_key(vm: VirtualMachine, row: Row) -> None:
    """Why a start failed is a sentence."""
    for unit in HARDENED:
        lines = vm.sh(f"journalctl -o cat _SYSTEMD_UNIT={unit}.service | grep ^{{").splitlines()
        assert all(json.loads(line)["event"] for line in lines)
    vm.sh("! journalctl -o cat | grep -q -F -f /etc/progressdb/minikms.key")
    row("journal", "JSON lines; no root key in them")


def acknowledged_before_a_cut(vm: VirtualMachine, writers: str, *, rotate: bool) -> set[str]:
    """The messages that the server had acknowledged when the power was cut."""
    write = vm.command(f"{KEY}exec python3 -c {shlex.quote(WRITE)} {writers}")
    with subprocess.Popen(write, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdout is not None
        lines = [load.stdout.readline() for _ in range(ACKNOWLEDGED_MIN)]
        if rotate:
            vm.sh(f"{OPERATOR}minikms rotate-kek --yes --priority low >/dev/null 2>&1 & sleep 1")
        vm.sh("echo text > unsynced")
        vm.cut_power()
        return {line.strip() for line in (*lines, *load.stdout) if line.endswith("\n")}


def test_no_acknowledged_message_is_lost_by_reboot_or_power_cut(vm: VirtualMachine, row: Row) -> None:
    """What was not synced is: else the cut would not be one. The second cut is in a KEK rotation."""
    acknowledged: set[str] = set()
    vm.reboot()
    for cut in range(CUTS):
        acknowledged |= acknowledged_before_a_cut(vm, f"a{cut} b{cut} c{cut} d{cut}", rotate=cut > 0)
        vm.boot()
        assert vm.sh("cat unsynced || true") == ""
        assert vm.sh(f"systemctl is-active {' '.join(UNITS)}").split() == ["active"] * len(UNITS)
        vm.sh(f"{OPERATOR}progressdb status\nrunuser -u minikms -- minikms doctor")
        threads = " ".join({line.split()[0] for line in acknowledged})
        stored = set(vm.sh(f"{KEY}python3 -c {shlex.quote(READ)}", threads).splitlines())
        assert acknowledged <= stored, sorted(acknowledged - stored)
    as_server = "runuser -u progressdb -g progressdb -G minikms"
    vm.sh(f"{OPERATOR}runuser -u minikms -- minikms audit verify\n{as_server} -- progressdb check")
    row("reboot, 2 power cuts under load", f"{len(acknowledged)} acknowledged messages, all there")


def test_sections_of_the_runbook_mend_what_was_broken(vm: VirtualMachine, row: Row) -> None:
    said = vm.sh(f"{IN_GUEST} {shlex.join(FOLLOWED)}")
    assert said.splitlines() == [f"{title}\tdone" for title in FOLLOWED], said
    row("runbook, after each incident", "; ".join(FOLLOWED))
