"""Three message servers on a database that Patroni keeps available: used, broken in every way, and checked.

Each part runs `python -m tests.cluster`, which fails where an acknowledged write is lost, made twice or out of order,
where a removed member reads or writes, and where the service is not back in time. Each mutant must fail so.
"""

import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.cluster import kms_faults
from tests.cluster.faults import PARTS
from tests.cluster.mutants import MUTANTS

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]
PROJECT = Path(__file__).parents[2]
RUN_S_MAX = 800
MUTANT_RUNS_MAX = 6


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Of one cluster. Its output is shown."""
    needs.root()
    needs.namespaces("mount", "pid")
    for program in ("etcd", "etcdctl", "faketime", "ip", "nft", "nsenter", "patroni", "setpriv"):
        needs.program(program)
    needs.postgresql()
    command = [sys.executable, "-m", "tests.cluster", *arguments]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=RUN_S_MAX, check=False)
    print(f"\n{' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done


@pytest.mark.parametrize("part", PARTS)
def test_no_fault_of_the_cluster_breaks_a_rule(part: str) -> None:
    names = ",".join(fault.__name__ for fault in PARTS[part])
    upgrade = ("--upgrade",) if part == "replication" else ()
    assert run("--faults", names, "--seed", str(secrets.randbelow(10**6)), *upgrade).returncode == 0


@pytest.mark.parametrize("part", kms_faults.PARTS)
def test_no_fault_breaks_a_rule_of_several_key_hosts(part: str) -> None:
    """The rules of `tests.cluster.kms_history`: never two, nothing acknowledged lost, destroyed is destroyed."""
    names = ",".join(fault.__name__ for fault in kms_faults.PARTS[part])
    assert run("--key-hosts", "--faults", names, "--seed", str(secrets.randbelow(10**6))).returncode == 0


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_checker_finds_each_mutant(mutant: str) -> None:
    """In one of some runs: a retry has to meet the moment in which its first attempt is on one disk alone."""
    for seed in range(MUTANT_RUNS_MAX):
        done = run("--mutant", mutant, *MUTANTS[mutant].arguments, "--seed", str(seed))
        if done.returncode == 1 and MUTANTS[mutant].found in done.stdout:
            return
    pytest.fail("no run has found it")
