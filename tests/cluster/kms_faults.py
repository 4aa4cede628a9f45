"""What breaks in the cluster with a key service on three hosts, one thing after the other, while it is used.

Owns: each fault of a key host, and its end. Faults of the database are those of `tests.cluster.faults`.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from tests.cluster import faults
from tests.cluster.faults import CONTINUE, KILL, REPLACED_S_MAX, SHORT_S, STOP, WHOLE_S_MAX
from tests.cluster.kms_history import OK
from tests.cluster.kms_hosts import KEYS, KeyCluster, frozen, killed
from tests.cluster.kms_load import Client, Load
from tests.cluster.machines import BASE, DATABASES, KMS_UID, send
from tests.harness.waiting import wait_until

KeyFault = Callable[[KeyCluster, Load], None]
LEASE_OVER_S: Final = 14.0
"""A member that can't renew its lease serves no more after that, and another one does if it can."""
TABLES: Final = ("kms_head", "kms_file", "kms_tombstone")


def _until_another(cluster: KeyCluster, host: str) -> None:
    """Returns when another host has served for some time, or none does."""
    end = time.monotonic() + REPLACED_S_MAX
    while cluster.serving() in ("", host) and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(SHORT_S)


# --- processes --------------------------------------------------------------------------------------------------------
def daemon_killed(cluster: KeyCluster, load: Load) -> None:
    """A service manager starts it again."""
    host = cluster.active()
    cluster.signal(host, "daemon", KILL)
    cluster.start_daemon(host)
    time.sleep(SHORT_S)


def replicator_killed(cluster: KeyCluster, load: Load) -> None:
    host = cluster.active()
    cluster.signal(host, "replicator", KILL)
    cluster.start_replicator(host)
    time.sleep(SHORT_S)


def key_host_killed(cluster: KeyCluster, load: Load) -> None:
    host = cluster.active()
    killed(cluster, host)
    _until_another(cluster, host)
    cluster.start_key_host(host)


def replicator_gone(cluster: KeyCluster, load: Load) -> None:
    host = cluster.active()
    cluster.signal(host, "replicator", KILL)
    _until_another(cluster, host)
    cluster.start_replicator(host)


def daemon_stopped(cluster: KeyCluster, load: Load) -> None:
    _stopped(cluster, "daemon")


def replicator_stopped(cluster: KeyCluster, load: Load) -> None:
    _stopped(cluster, "replicator")


def key_host_stopped(cluster: KeyCluster, load: Load) -> None:
    _stopped(cluster, "daemon", "replicator")


def _stopped(cluster: KeyCluster, *programs: str) -> None:
    """It stands still for longer than its lease."""
    host = cluster.active()
    pids = [cluster.processes[host, program].pid for program in programs]
    send(pids, STOP)
    _until_another(cluster, host)
    send(pids, CONTINUE)
    time.sleep(SHORT_S)


def key_host_frozen(cluster: KeyCluster, load: Load) -> None:
    host = cluster.active()
    with frozen(cluster.pair(host)):
        _until_another(cluster, host)
    time.sleep(SHORT_S)


# --- the network ------------------------------------------------------------------------------------------------------
def key_host_alone(cluster: KeyCluster, load: Load) -> None:
    _cut(cluster)


def key_host_unheard(cluster: KeyCluster, load: Load) -> None:
    """Nothing that its replicator sends arrives."""
    _cut(cluster, incoming=False)


def key_host_deaf(cluster: KeyCluster, load: Load) -> None:
    """Nothing arrives at its replicator: commits are made, and it does not know."""
    _cut(cluster, outgoing=False)


def key_host_from_primary(cluster: KeyCluster, load: Load) -> None:
    """Only its connection to the primary is cut."""
    _cut(cluster, others=(cluster.primary(),))


def _cut(
    cluster: KeyCluster, *, others: Sequence[str] = DATABASES, incoming: bool = True, outgoing: bool = True
) -> None:
    host = cluster.active()
    cluster.cut(host, others, incoming=incoming, outgoing=outgoing)
    _until_another(cluster, host)
    cluster.mend(host)


# --- disks ------------------------------------------------------------------------------------------------------------
def disk_full(cluster: KeyCluster, load: Load) -> None:
    """Of the member that serves."""
    host = cluster.active()
    path = BASE / host / "filler"
    with path.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    time.sleep(LEASE_OVER_S + SHORT_S)
    path.unlink()


def directory_put_back(cluster: KeyCluster, load: Load) -> None:
    """The member that serves is lost, and comes back with an older data directory."""
    host = cluster.active()
    data, copy = cluster.home(host) / "data", BASE / f"{host}-copy"
    killed(cluster, host)
    shutil.copytree(data, copy)
    cluster.start_key_host(host)
    wait_until(cluster.keys_whole, seconds=WHOLE_S_MAX)
    time.sleep(SHORT_S)
    killed(cluster, host)
    shutil.rmtree(data)
    shutil.move(copy, data)
    for path in (data, *data.rglob("*")):
        os.chown(path, KMS_UID, KMS_UID)
    cluster.start_key_host(host)


def database_restored(cluster: KeyCluster, load: Load) -> None:
    """The tables become what they were some seconds ago."""
    _sql(cluster, "".join(f"CREATE TABLE old_{name} AS TABLE {name};" for name in TABLES))
    time.sleep(SHORT_S)
    back = "".join(f"INSERT INTO {name} TABLE old_{name};" for name in TABLES)
    gone = f"DROP TABLE {', '.join(f'old_{name}' for name in TABLES)}"
    _sql(cluster, f"BEGIN; TRUNCATE {', '.join(TABLES)}; {back} COMMIT; {gone}")
    _filled_anew(cluster, load)


def database_forged(cluster: KeyCluster, load: Load) -> None:
    """Whoever has the database puts older key files back, as a change that no member has made."""
    _sql(cluster, "CREATE TABLE old_file AS TABLE kms_file")
    time.sleep(SHORT_S)
    _sql(
        cluster,
        "WITH later AS (UPDATE kms_head SET number = number + 1000 RETURNING number) UPDATE kms_file"
        " SET content = old_file.content, number = later.number FROM old_file, later"
        " WHERE kms_file.key_id = old_file.key_id AND kms_file.content <> old_file.content; DROP TABLE old_file",
    )
    _filled_anew(cluster, load)


def _sql(cluster: KeyCluster, statement: str) -> None:
    cluster.sql(statement, database="minikms")


def _filled_anew(cluster: KeyCluster, load: Load) -> None:
    """No member takes what the database has. An operator empties it, and one with the newest changes fills it."""
    time.sleep(LEASE_OVER_S)
    assert not cluster.serving(), "a member serves with a database that no member wrote"
    states = {host: cluster.state(host) for host in KEYS}
    newest = max(KEYS, key=lambda host: one.number if (one := states[host]) is not None else 0)
    cluster.empty_tables()
    _operate(load, "promote", newest, lambda client: client.promote_replica(replace_database=True))
    wait_until(lambda: cluster.serving() == newest, seconds=WHOLE_S_MAX)


# --- operators --------------------------------------------------------------------------------------------------------
def _operate(load: Load, kind: str, host: str, ask: Callable[..., object]) -> None:
    client = Client(load, kind)
    asked = client.once(kind, host, ask)
    client.close()
    assert asked.call.outcome == OK, f"{kind} at {host} was {asked.call.outcome}"


def promoted(cluster: KeyCluster, load: Load) -> None:
    host = next(one for one in KEYS if one != cluster.active())
    _operate(load, "promote", host, lambda client: client.promote_replica())
    wait_until(lambda: cluster.serving() == host)
    time.sleep(SHORT_S)


def sealed(cluster: KeyCluster, load: Load) -> None:
    """All members, by a seal of the one that serves. Each is unsealed by its own root key."""
    _operate(load, "seal", cluster.active(), lambda client: client.seal())
    time.sleep(SHORT_S)
    for host in KEYS:
        _operate(load, "unseal", host, lambda client: client.unseal())


def nothing(cluster: KeyCluster, load: Load) -> None:
    time.sleep(SHORT_S)


def _of_database(fault: faults.Fault) -> KeyFault:
    def inflicted(cluster: KeyCluster, load: Load) -> None:
        fault(cluster)

    inflicted.__name__ = fault.__name__
    return inflicted


PARTS: Final[Mapping[str, Sequence[KeyFault]]] = {
    "key processes": (promoted, daemon_killed, replicator_killed, replicator_gone, key_host_killed, sealed),
    "key stops": (daemon_stopped, replicator_stopped, key_host_stopped, key_host_frozen),
    "key network": (key_host_alone, key_host_unheard, key_host_deaf, key_host_from_primary),
    "key disks": (disk_full, directory_put_back, database_restored, database_forged),
    "key database": (
        *map(_of_database, (faults.postgres_killed, faults.postgres_stopped, faults.host_killed, faults.switchover)),
        *map(_of_database, (faults.etcd_leader_killed, faults.primary_alone, faults.unreplicated_host_killed)),
    ),
}
"""What a run of the torture test does, in this order."""
FAULTS: Final[Mapping[str, KeyFault]] = {one.__name__: one for part in PARTS.values() for one in (nothing, *part)}


def inflict(fault: KeyFault, cluster: KeyCluster, load: Load) -> None:
    """The fault, until the cluster is whole again and the service is used for some time."""
    print(f"{time.strftime('%H:%M:%S')} {fault.__name__}", flush=True)
    with load.fault(fault.__name__):
        fault(cluster, load)
        print(f"{time.strftime('%H:%M:%S')} over", flush=True)
        wait_until(cluster.whole, seconds=WHOLE_S_MAX)
        wait_until(cluster.serves, seconds=WHOLE_S_MAX)
    time.sleep(faults.QUIET_S)
