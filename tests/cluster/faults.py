"""What breaks in the cluster, one thing after the other, while it is used.

Owns: each fault, and its end. A fault is a function of the cluster that breaks something, waits, and mends it. Recovery
is measured from its begin, so that a part that stays broken is what the service recovers from.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from tests.cluster.history import FAULT, Operation
from tests.cluster.load import Load
from tests.cluster.machines import APPLICATIONS, BASE, DATABASES, TTL_S, Cluster, run, send
from tests.harness.waiting import wait_until

KILL, STOP, CONTINUE = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
LONG_S: Final = TTL_S + 10.0
"""Another host could be the primary by then."""
SHORT_S: Final = 8.0
BEFORE_S: Final = 10.0
"""Without a fault, before the first one."""
REPLACED_S_MAX: Final = 45.0
QUIET_S: Final = 3.0
"""Without a fault, between two."""
WHOLE_S_MAX: Final = 90.0
Fault = Callable[[Cluster], None]


def _others(cluster: Cluster, host: str, *, databases_only: bool = False) -> list[str]:
    everybody = DATABASES if databases_only else (*DATABASES, *APPLICATIONS)
    return [one for one in everybody if one != host]


def _until_replaced(cluster: Cluster, host: str) -> None:
    """Returns when another host has been the primary for some time, or none becomes it."""
    end = time.monotonic() + REPLACED_S_MAX
    while cluster.leader(host) in ("", host) and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(SHORT_S)


@contextmanager
def _gone(cluster: Cluster, host: str) -> Iterator[None]:
    """A host of the database loses its power."""
    for program in ("patroni", "postgres", "etcd"):
        cluster.signal(host, program, KILL)
    yield
    cluster.start_etcd(host)
    cluster.start_patroni(host)


# --- processes --------------------------------------------------------------------------------------------------------
def postgres_killed(cluster: Cluster) -> None:
    cluster.signal(cluster.primary(), "postgres", KILL)
    time.sleep(SHORT_S)


def postgres_stopped(cluster: Cluster) -> None:
    pids = cluster.pids(cluster.primary(), "postgres")
    send(pids, STOP)
    time.sleep(LONG_S)
    send(pids, CONTINUE)


def host_killed(cluster: Cluster) -> None:
    host = cluster.primary()
    with _gone(cluster, host):
        _until_replaced(cluster, host)


def host_stopped(cluster: Cluster) -> None:
    """The primary's host stands still, with its watchdog, and goes on when another one is the primary."""
    host = cluster.primary()
    pids = [pid for program in ("patroni", "postgres", "etcd") for pid in cluster.pids(host, program)]
    cluster.unwatched.add(host)
    send(pids, STOP)
    _until_replaced(cluster, host)
    send(pids, CONTINUE)
    cluster.unwatched.remove(host)


def patroni_killed(cluster: Cluster) -> None:
    host = cluster.primary()
    cluster.signal(host, "patroni", KILL)
    _until_replaced(cluster, host)
    cluster.start_patroni(host)


def patroni_stopped(cluster: Cluster) -> None:
    host = cluster.primary()
    cluster.signal(host, "patroni", STOP)
    _until_replaced(cluster, host)
    cluster.signal(host, "patroni", CONTINUE)


def etcd_leader_killed(cluster: Cluster) -> None:
    host = cluster.etcd_leader()
    cluster.signal(host, "etcd", KILL)
    time.sleep(SHORT_S)
    cluster.start_etcd(host)


def etcd_leader_stopped(cluster: Cluster) -> None:
    host = cluster.etcd_leader()
    cluster.signal(host, "etcd", STOP)
    time.sleep(SHORT_S)
    cluster.signal(host, "etcd", CONTINUE)


def server_killed(cluster: Cluster) -> None:
    cluster.signal("app1", "server", KILL)
    time.sleep(SHORT_S)
    cluster.start_application("app1")


def server_stopped(cluster: Cluster) -> None:
    cluster.signal("app2", "server", STOP)
    time.sleep(SHORT_S)
    cluster.signal("app2", "server", CONTINUE)


def switchover(cluster: Cluster) -> None:
    host = cluster.primary()
    command = ("patronictl", "-c", BASE / host / "patroni.yaml", "switchover", "progressdb", "--leader", host)
    run(*command, "--force", host=host, user="postgres")


# --- the network ------------------------------------------------------------------------------------------------------
def primary_alone(cluster: Cluster) -> None:
    _cut(cluster, cluster.primary())


def primary_unheard(cluster: Cluster) -> None:
    """Nothing that the primary sends arrives."""
    _cut(cluster, cluster.primary(), incoming=False)


def primary_deaf(cluster: Cluster) -> None:
    """Nothing arrives at the primary."""
    _cut(cluster, cluster.primary(), outgoing=False)


def primary_from_databases(cluster: Cluster) -> None:
    """The message servers still reach the primary, which another one replaces."""
    _cut(cluster, cluster.primary(), databases_only=True)


def server_alone(cluster: Cluster) -> None:
    _cut(cluster, "app3")


def _cut(
    cluster: Cluster, host: str, *, incoming: bool = True, outgoing: bool = True,
    databases_only: bool = False,
) -> None:  # fmt: skip
    others = _others(cluster, host, databases_only=databases_only)
    cluster.cut(host, others, incoming=incoming, outgoing=outgoing)
    if host in DATABASES:
        _until_replaced(cluster, host)
    else:
        time.sleep(SHORT_S)
    cluster.mend(host)


# --- what is stored on one disk alone ---------------------------------------------------------------------------------
def unreplicated_host_killed(cluster: Cluster) -> None:
    """For some seconds no standby gets what the primary writes. Then the primary is lost, with what it alone has."""
    host = cluster.primary()
    cluster.cut(host, _others(cluster, host, databases_only=True), incoming=False)
    time.sleep(3)
    with _gone(cluster, host):
        _until_replaced(cluster, host)
        cluster.mend(host)  # only now: until then its kernel would send what its programs had written


def unreplicated_waits_ended(cluster: Cluster) -> None:
    """As before; and an operator ends the sessions that wait for a standby. PostgreSQL makes their writes readable
    then, so that a reader may see what is lost with the primary; nobody acknowledged it."""
    _end_unreplicated_waits(cluster, "pg_terminate_backend")


def unreplicated_waits_cancelled(cluster: Cluster) -> None:
    """As before, but their waits alone end, with success and a warning."""
    _end_unreplicated_waits(cluster, "pg_cancel_backend")


def _end_unreplicated_waits(cluster: Cluster, how: str) -> None:
    host = cluster.primary()
    standbys = _others(cluster, host, databases_only=True)
    cluster.cut(host, standbys, incoming=False)
    waiting = f"SELECT count({how}(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    for _ in range(6):
        time.sleep(0.5)
        cluster.sql(waiting, host=host)
    with _gone(cluster, host):
        _until_replaced(cluster, host)
        cluster.mend(host)  # only now: until then its kernel would send what its programs had written


# --- operators --------------------------------------------------------------------------------------------------------
def tables_upgraded(cluster: Cluster, load: Load) -> None:
    """The tables get a later number, and a copy of what they held then. A server of this version writes nothing until
    the number is the earlier one again."""
    started = time.monotonic()
    for _ in range(4):
        begin = time.monotonic()
        cluster.sql(
            "BEGIN; UPDATE store_schema SET number = number + 1;"
            " CREATE TABLE held AS SELECT key, md5(value) AS value FROM store_entry; SELECT pg_sleep(0.2); COMMIT"
        )
        end = time.monotonic()
        time.sleep(1)
        later = cluster.sql(
            "SET enable_nestloop = off;"  # there are no statistics of the copy
            " SELECT encode(entry.key, 'escape') FROM store_entry AS entry LEFT JOIN held USING (key)"
            " WHERE held.value IS DISTINCT FROM md5(entry.value) LIMIT 3"
        ).split()
        cluster.sql("DROP TABLE held; UPDATE store_schema SET number = number - 1")
        load.record(Operation("upgrade", "", begin, end, "ok", note=json.dumps(later) if later else ""))
        time.sleep(1)
    load.record(Operation(FAULT + tables_upgraded.__name__, "", started, time.monotonic(), "ok"))


PARTS: Final[Mapping[str, Sequence[Fault]]] = {
    "processes": (postgres_killed, patroni_killed, etcd_leader_killed, server_killed, host_killed, switchover),
    "stops": (server_stopped, etcd_leader_stopped, patroni_stopped, postgres_stopped, host_stopped),
    "network": (server_alone, primary_alone, primary_unheard, primary_deaf, primary_from_databases),
    "replication": (unreplicated_host_killed, unreplicated_waits_ended, unreplicated_waits_cancelled, switchover),
}
"""What a run of the torture test does, in this order."""
FAULTS: Final[Mapping[str, Fault]] = {one.__name__: one for part in PARTS.values() for one in part}


def inflict(fault: Fault, cluster: Cluster, load: Load) -> None:
    """The fault, until the cluster is whole again and the service is used for some time."""
    print(f"{time.strftime('%H:%M:%S')} {fault.__name__}", flush=True)
    begin = time.monotonic()
    fault(cluster)
    load.record(Operation(FAULT + fault.__name__, "", begin, time.monotonic(), "ok"))
    wait_until(cluster.whole, seconds=WHOLE_S_MAX)
    wait_until(cluster.serves, seconds=WHOLE_S_MAX)
    time.sleep(QUIET_S)
