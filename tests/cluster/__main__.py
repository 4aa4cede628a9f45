"""`python -m tests.cluster`: start the cluster, and run what is asked for, as root.

Without arguments it says how to talk to the cluster, and ends it at Ctrl-C. `--faults NAME,…` uses the service, breaks
it in these ways, and checks the history. Owns: the namespaces, in which this module starts itself again.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Final

from tests import needs
from tests.cluster import faults, kms_faults, kms_history, kms_load, mutants
from tests.cluster.history import recoveries, too_slow, violations
from tests.cluster.kms_hosts import KEYS, KeyCluster
from tests.cluster.load import Load
from tests.cluster.machines import (
    ADMIN,
    APPLICATIONS,
    BACKEND,
    BASE,
    DATABASES,
    KMS_UID,
    PORT,
    Cluster,
    Variant,
    run,
    start,
)

INSIDE = "TESTS_CLUSTER_INSIDE"
CLOCKS_S = {"app2": 3600, "app3": -3600, "key2": 3600, "key3": -3600}
"""How far the clocks of the hosts are ahead."""
SEEN_TOO_EARLY: Final = (" was seen at ", " before what a reader saw ", " have different orders")
"""Parts of violations that follow if a reader has seen a write that a failover loses. Its client, which has no answer,
makes it again, behind what others have written meanwhile."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--faults",
        default="",
        help=f"a comma-separated list of {', '.join(faults.FAULTS)}; quiet; "
        f"with --key-hosts of {', '.join(kms_faults.FAULTS)}",
    )
    parser.add_argument("--key-hosts", action="store_true", help="with a key service on three hosts")
    parser.add_argument("--upgrade", action="store_true", help="also change the number of the tables for a moment")
    parser.add_argument("--mutant", choices=sorted(mutants.MUTANTS), help="of a version that breaks a rule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="copy the logs of all programs into this directory at the end")
    given = parser.parse_args()
    if INSIDE not in os.environ:
        _enter()
    os.environ.pop(INSIDE)
    run("mount", "-t", "tmpfs", "tmpfs", "/run")
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    BASE.mkdir(mode=0o755)
    variant = mutants.variant(given.mutant, BASE / "source") if given.mutant else Variant()
    made = (KeyCluster if given.key_hosts else Cluster)(variant._replace(ahead_s=CLOCKS_S))
    start(made)
    if given.faults or given.upgrade:
        names = [one for one in given.faults.split(",") if one]
        try:
            if isinstance(made, KeyCluster):
                return _break_keys(made, names, given.seed)
            return _break(made, names, given.seed, upgrade=given.upgrade)
        finally:
            if given.logs:
                shutil.copytree(BASE, given.logs, ignore=lambda _, found: [n for n in found if not n.endswith(".log")])
    _describe(made)
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()
    return 0


def _enter() -> None:
    """Start again in namespaces that end with the program. Process 1 of them also reaps processes without a parent."""
    shell = 'trap : INT; "$@"; exit $?'
    command = [sys.executable, "-m", "tests.cluster", *sys.argv[1:]]
    unshare = [needs.namespaces("mount", "pid"), "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    os.execve(unshare[0], [*unshare, "sh", "-c", shell, "sh", *command], {**os.environ, INSIDE: "1"})


def _describe(made: Cluster) -> None:
    for host in APPLICATIONS:
        url = f"http://{made.address(host)}:{PORT}/v1/threads?author=ada"
        print(f"{host}: curl -H 'X-API-Key: {BACKEND}' '{url}'  (admin: {ADMIN})")
    for socket in made.kms_sockets:
        print(f"key service: minikms status --socket {socket}")
    print(f"hosts of the database: {', '.join(f'{host} {made.address(host)}' for host in DATABASES)}")
    print("a shell beside the programs: nsenter --all --target $(pgrep --full '^sh -c trap.*tests.cluster')")
    print(f"the logs are there in {BASE}")
    print(f"there: patronictl -c {BASE}/db1/patroni.yaml list")
    print("Ctrl-C ends everything.", flush=True)


def _break(made: Cluster, names: list[str], seed: int, *, upgrade: bool) -> int:
    """1 if a rule was broken."""
    load = Load([made.address(host) for host in APPLICATIONS], seed)
    began = time.monotonic()
    with load.running():
        time.sleep(faults.BEFORE_S)
        try:
            for name in names:
                if name != "quiet":
                    faults.inflict(faults.FAULTS[name], made, load)
            if upgrade:
                faults.tables_upgraded(made, load)
        except AssertionError as error:
            load.errors.append(f"the cluster was not whole again: {error}")
    history = load.history
    for name, seconds, slowest in recoveries(history):
        print(f"recovery from {name}: {seconds:.1f} s ({slowest})")
    print(f"{len(history)} operations in {time.monotonic() - began:.0f} s, {load.rotations} rotations of a key")
    print(f"answers by status: {dict(sorted(load.statuses.items()))}")
    failed = [f"{load.statuses[500]} requests were answered 500"] if 500 in load.statuses else []
    broken = [*violations(history), *too_slow(history), *failed, *load.errors]
    if {faults.unreplicated_waits_ended.__name__, faults.unreplicated_waits_cancelled.__name__} & set(names):
        broken = [one for one in broken if not any(part in one for part in SEEN_TOO_EARLY)]
    return _report(broken)


def _break_keys(made: KeyCluster, names: list[str], seed: int) -> int:
    """1 if a rule was broken."""
    load = kms_load.Load(dict(zip(KEYS, made.kms_sockets, strict=True)), seed, server_uid=KMS_UID)
    messages = Load([made.address(host) for host in APPLICATIONS], seed)
    with messages.running(), load.running():
        time.sleep(faults.BEFORE_S)
        for name in names:
            try:
                kms_faults.inflict(kms_faults.FAULTS[name], made, load)
            except (AssertionError, RuntimeError) as error:
                load.errors.append(f"{name}: {error}"[:400])
        with load.fault(kms_faults.nothing.__name__):
            time.sleep(faults.QUIET_S)
    print(f"{'fault':<28}{'no use, s':>10}{'no new key, s':>15}{'calls':>8}")
    for one in kms_history.outages(load.history):
        print(f"{one.fault:<28}{one.used_s:>10.1f}{one.changed_s:>15.1f}{one.calls:>8}")
    print(f"{len(load.history)} calls, {len(messages.history)} operations on messages")
    found = [f"messages: {one}" for one in (*violations(messages.history), *messages.errors)]
    return _report([*kms_history.violations(load.history), *load.errors, *found])


def _report(broken: list[str]) -> int:
    print("\n".join([f"VIOLATION {one}" for one in broken] or ["no violation"]), flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
