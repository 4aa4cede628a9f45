"""What the documents say, done on the machine that this runs on: `python -m tests.torture.in_guest [TITLE …]`.

It runs as root in a virtual machine (`test_vm.py`), whose systemd and whose package take the places of what
`tests.documents.machine` imitates. It removes all data, keys and settings of the package. Then it sets up all four
services, or follows sections of the runbook, each on a new installation.
"""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from tests.documents import test_runbook
from tests.documents.machine import PROJECT, UNITS, USERS, Machine, blocks

RUN_S_MAX = 600.0
PORT = 8080
SERVICES = ("progressdb", "minikms-auditor", "minikms-gateway", "minikms", "minikms.socket")
DATA = "/etc/progressdb /var/lib/progressdb /backup /root/from /root/evidence /root/*.key /root/*.json"
OF_THE_PACKAGE = re.compile(r"^(?:install -m|/opt/progressdb/bin/pip) .*\n", re.MULTILINE)
NEW = f"""
systemctl disable --quiet --now {" ".join(SERVICES)}
systemctl reset-failed
rm -rf {DATA}
DEBIAN_FRONTEND=noninteractive dpkg-reconfigure progressdb
"""


class ThisMachine(Machine):
    """Its paths, users and services are those of the documents."""

    def __init__(self) -> None:
        self.base, self.port, self.beside = Path("/"), PORT, []
        self.environ = {**os.environ, "NO_COLOR": "1"}
        self._uids = {name: pwd.getpwnam(name).pw_uid for name in USERS}
        self._directory = Path(tempfile.mkdtemp())
        self._directory.chmod(0o755)

    def here(self, text: str) -> str:
        return text

    def run(self, script: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self._directory,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=RUN_S_MAX,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def install(self) -> None:
        self.do(NEW)
        self.do("".join(blocks(UNITS / "README.md")[0].splitlines(keepends=True)[1:3]))

    def ended(self) -> list[str]:
        return [unit for unit in self._units() if self.run(f"systemctl is-active {unit}")[0]]

    def boot(self) -> None:
        self.do(f"systemctl start {' '.join(reversed(self._units()))}")

    def close(self) -> None:
        while self.beside:
            with self.beside.pop() as process:
                process.kill()
        self.do(f"systemctl stop {' '.join(SERVICES)}")

    def _units(self) -> list[str]:
        return [unit for unit in SERVICES if not self.run(f"systemctl is-enabled {unit}")[0]]


def set_up_all(made: ThisMachine) -> None:
    """An auditor, and a gateway whose client has just made a key."""
    test_runbook.prepare(made)
    test_runbook.an_auditor_is_attached(made)
    *setup, use, _ = blocks(PROJECT / "docs/other-hosts.md")
    for block in (*setup, use):
        print(made.do("set -eo pipefail\n" + OF_THE_PACKAGE.sub("", block)))


def main() -> None:
    """Writes `TITLE<tab>done`, or `TITLE<tab>FAILED` and why."""
    if not sys.argv[1:]:
        set_up_all(ThisMachine())
    for title in sys.argv[1:]:
        made = ThisMachine()
        try:
            test_runbook.prepare(made, recommended=title != "Give the audit log a directory of its own")
            test_runbook.follow(made, title)
            test_runbook.check_left_in_order(made)
        except Exception:  # noqa: BLE001 - the next section begins on a new machine
            print(f"{title}\tFAILED\n{traceback.format_exc()}", flush=True)
        else:
            print(f"{title}\tdone", flush=True)
        finally:
            made.close()


if __name__ == "__main__":
    main()
