"""Two hosts of a key service on one machine, used, broken and checked: the part of the cluster's proof for each run.

`tests/torture/test_cluster.py` has three of them, with a database that Patroni keeps, and many more faults.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import needs
from tests.cluster.kms_history import OK, violations
from tests.cluster.kms_load import Client, Load
from tests.harness.waiting import wait_until

needs.library("asyncpg")
needs.postgresql()

from tests.harness.replica_hosts import KeyHost, KeyHosts, key_hosts  # noqa: E402  asyncpg has to be there


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[KeyHosts]:
    with key_hosts(tmp_path) as made:
        yield made


def serves(host: KeyHost) -> bool:
    return bool(host.status().mode == "serving")


def test_killed_stopped_and_sealed_hosts_break_no_rule(hosts: KeyHosts) -> None:
    """A promotion; the daemon that serves stands still for longer than its lease; both processes of the host that
    serves are killed; a seal, and unseals of both.
    """
    one = hosts.first("a")
    other = hosts.joined("b", one)
    load = Load({"a": one.socket, "b": other.socket}, seed=1, server_uid=os.geteuid())
    with load.running():
        wait_until(lambda: load.history)
        operator = Client(load, "operator")
        assert operator.once("promote", "b", lambda kms: kms.promote_replica()).call.outcome == OK
        wait_until(lambda: serves(other))
        assert other.daemon is not None
        os.kill(other.daemon.pid, signal.SIGSTOP)
        wait_until(lambda: serves(one))
        os.kill(other.daemon.pid, signal.SIGCONT)
        wait_until(lambda: other.status().mode == "following")
        one.end()
        wait_until(lambda: serves(other))
        one.start()
        wait_until(lambda: one.status().mode == "following")
        assert operator.once("seal", "b", lambda kms: kms.seal()).call.outcome == OK
        wait_until(lambda: one.status().mode == other.status().mode == "sealed")
        for name in load.members:
            assert operator.once("unseal", name, lambda kms: kms.unseal()).call.outcome == OK
        operator.close()
    assert [*violations(load.history), *load.errors] == []
    assert {call.member for call in load.history if call.kind == "create" and call.outcome == OK} == {"a", "b"}
