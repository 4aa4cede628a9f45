"""Two daemons of one key service, each with a replicator: which serves, and what the other one answers."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from minikms import Client, api
from minikms.api import errors
from minikms.api.base64 import encode_text
from minikms.cli.status import page as status_page
from minikms.keys import keyring
from minikms_daemon.server.lagging import SERVED
from tests.harness.live_daemon import LiveDaemon
from tests.harness.small_disks import filled
from tests.harness.unix_http import unix_request
from tests.harness.waiting import wait_until
from tests.minikms_daemon.replica.hosts import LEASE_S, Hosts, Replicator, hosts


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


class Side:
    """One host. `number`: of changes that its replicator reports."""

    def __init__(self, daemon: LiveDaemon, replicator: Replicator) -> None:
        self.daemon, self.replicator = daemon, replicator
        self.kms = replicator.kms

    @property
    def mode(self) -> str:
        """Empty if it stood by, or was sealed, while it was asked."""
        with contextlib.suppress(errors.RequestInterruptedError, errors.SealedError):
            return self.kms.replica_status().mode
        return ""

    def events(self, *types: str) -> list[dict[str, Any]]:
        return self.daemon.events(*types)


def files_of(side: Side) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (side.daemon.data_dir / "kms-deks").iterdir()}


def sides(both: Hosts) -> tuple[Side, Side]:
    """The one that serves, then the other, which has all changes."""
    a, b = Side(both.a, both.replicator_a), Side(both.b, both.replicator_b)
    found: list[Side] = []

    def settled() -> bool:
        found[:] = sorted((a, b), key=lambda side: side.mode != "serving")
        position = found[1].kms.replica_follow(api.ASK_POSITION)
        return (found[0].mode, position.mode) == ("serving", "following") and (
            position.number == both.database.tables.number and position.ready
        )

    wait_until(settled)
    return found[0], found[1]


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_standby_has_every_key_and_uses_none(both: Hosts) -> None:
    serving, standby = sides(both)
    key_id = serving.kms.create_dek_for_thread("t").key_id
    sealed = serving.kms.encrypt(key_id, b"text")
    sides(both)
    assert (standby.daemon.data_dir / "kms-deks" / f"{key_id}.json").read_bytes() == (
        serving.daemon.data_dir / "kms-deks" / f"{key_id}.json"
    ).read_bytes()
    lines = len(standby.daemon.events("decrypt", "create_dek", "refused"))
    others = {
        (verb.method, verb.path.format(key_id=key_id, slot_id="s1", member_id="m2"))
        for verb in api.VERBS
        if verb not in SERVED
    }
    for method, target in (*others, ("GET", "/ready"), ("GET", "/nowhere")):
        reply = unix_request(standby.daemon.socket, target, method)
        assert (reply.status, json.loads(reply.body)["code"]) == (503, "standby"), target
    with pytest.raises(errors.NotSealedError):
        standby.kms.unseal()
    assert len(standby.daemon.events("decrypt", "create_dek", "refused")) == lines
    assert standby.kms.health() and serving.kms.ready()
    with both.client() as kms:
        assert kms.decrypt(key_id, sealed) == b"text"


def test_the_status_and_the_metrics_say_who_serves(both: Hosts) -> None:
    serving, standby = sides(both)
    for side, mode, status in ((serving, "serving", "ok"), (standby, "following", "standby")):
        answer = side.kms.status()
        assert answer.replica is not None
        assert (answer.status, answer.replica.mode, answer.replica.lag_changes) == (status, mode, 0)
        assert answer.replica.serving == serving.replicator.member_id
        shown = "".join(map(str, status_page(answer).renderables))
        assert f"{answer.replica.member_id} {mode}, term {both.database.tables.term}, change" in shown
        metrics = unix_request(side.daemon.socket, "/metrics").body.decode()
        assert f"minikms_replica_serving {int(mode == 'serving')}\n" in metrics
        assert f"minikms_replica_term {both.database.tables.term}\n" in metrics


def test_an_auditor_can_not_be_attached_on_a_standby(both: Hosts) -> None:
    _, standby = sides(both)
    with pytest.raises(errors.StandbyError):
        standby.kms.report_audit_position(origin="o", log_id="", seq=0, mac=b"")
    assert standby.events("report_audit_position") == []


def test_a_promotion_moves_the_service_with_its_lines(both: Hosts) -> None:
    before, after = sides(both)
    key_id = before.kms.create_dek_for_thread("moved").key_id
    epoch = before.kms.status().epoch
    sides(both)
    after.kms.promote_replica()
    wait_until(lambda: after.mode == "serving")
    assert sides(both)[0].daemon is after.daemon
    assert before.mode == "following"
    assert after.kms.status().epoch > epoch
    sealed = after.kms.encrypt(key_id, b"text")
    assert after.kms.decrypt(key_id, sealed) == b"text"
    term = both.database.tables.term
    serves, stands_by = after.events("replica_serves")[-1], before.events("replica_stands_by")[-1]
    assert serves["facts"]["term"] == term and serves["facts"]["member"] == after.replicator.member_id
    assert stands_by["facts"] == {"term": term - 1} and "was promoted" in stands_by["detail"]


def test_without_its_replicator_a_host_serves_no_longer_than_its_lease(both: Hosts) -> None:
    before, after = sides(both)
    key_id = before.kms.create_dek_for_thread("t").key_id
    with before.replicator.away():
        wait_until(lambda: before.mode == "following")
        with pytest.raises(errors.StandbyError):
            before.kms.get_wrapped(key_id)
        wait_until(lambda: after.mode == "serving")
        assert after.kms.get_wrapped(key_id)
    assert sides(both)[0].daemon is after.daemon


def test_a_suspended_daemon_answers_nothing_after_its_lease(both: Hosts) -> None:
    """What it had begun before, and what came meanwhile."""
    before, after = sides(both)
    key_id = before.kms.create_dek_for_thread("t").key_id
    answers: list[int] = []

    def ask() -> None:
        answers.append(unix_request(before.daemon.socket, f"/get_wrapped?key_id={key_id}").status)

    with stopped(before.daemon.pid):
        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        wait_until(lambda: after.mode == "serving")
    for thread in asking:
        thread.join()
    assert answers == [503] * 4
    assert sides(both)[0].daemon is after.daemon
    assert before.events("replica_stands_by")[-1]["detail"] == "the lease has ended"


def test_a_change_that_waits_is_not_answered_by_who_serves_no_more(both: Hosts) -> None:
    before, after = sides(both)
    failed: list[Exception] = []

    def create() -> None:
        with Client(before.daemon.socket, wait_s=0) as kms:
            try:
                kms.create_dek_for_thread("waits")
            except errors.KmsError as error:
                failed.append(error)

    with before.replicator.away():
        creating = threading.Thread(target=create)
        creating.start()
        creating.join()
        wait_until(lambda: after.mode == "serving")
    assert isinstance(failed[0], errors.RequestInterruptedError)
    sides(both)
    assert after.kms.list_keys(thread_id="waits").keys == []


def test_a_stop_releases_the_head_and_a_start_follows(both: Hosts) -> None:
    before, after = sides(both)
    before.daemon.stop()
    wait_until(lambda: after.mode == "serving")
    made = after.kms.create_dek_for_thread("t").key_id
    before.daemon.start()
    assert sides(both)[0].daemon is after.daemon
    assert (before.daemon.data_dir / "kms-deks" / f"{made}.json").exists()


def test_a_killed_daemon_follows_what_it_had_not_written(both: Hosts) -> None:
    before, after = sides(both)
    before.daemon.kill()
    before.daemon.start()
    serving, _ = sides(both)
    key_id = serving.kms.create_dek_for_thread("t").key_id
    sides(both)
    assert all((side.daemon.data_dir / "kms-deks" / f"{key_id}.json").exists() for side in (before, after))


def test_a_rotation_goes_on_at_the_other_host(both: Hosts) -> None:
    before, after = sides(both)
    for _ in range(3):
        before.kms.create_dek_for_thread("t")
    sides(both)
    with before.replicator.away(), Client(before.daemon.socket, timeout_s=30) as kms:
        beginning = threading.Thread(target=kms.rotate_kek, kwargs={"wait": False})
        beginning.start()
        wait_until(lambda: before.replicator.grant().commit is not None)
        before.replicator.grant()
        beginning.join()
        wait_until(lambda: after.mode == "serving")
    wait_until(lambda: after.kms.status().rotation is None)
    assert after.events("rotate_kek_done") and not before.events("rotate_kek_done")
    sides(both)
    versions = {side.kms.status().keks[-1].version for side in (before, after)}
    assert len(versions) == 1
    assert set(after.kms.status().keys.by_kek_version) == {str(*versions)}


def test_a_seal_of_one_host_seals_all_and_an_unseal_one(both: Hosts) -> None:
    serving, standby = sides(both)
    assert standby.kms.seal().sealed
    wait_until(lambda: serving.mode == "sealed")
    wait_until(lambda: both.database.tables.member == "")
    assert serving.kms.unseal_status().by == "another_member"
    wait_until(lambda: serving.kms.unseal_status().stays_sealed)
    serving.daemon.kill()
    serving.daemon.start()
    assert serving.kms.unseal_status().sealed
    assert not standby.kms.unseal().sealed
    wait_until(lambda: standby.mode == "serving")
    assert serving.mode == "sealed"
    assert not serving.kms.unseal().sealed
    sides(both)
    assert [event["actor"] for event in serving.events("seal")][-1:] == ["another_member"]


def test_a_seal_that_no_other_host_knows_says_so_and_goes_on(both: Hosts) -> None:
    serving, standby = sides(both)
    with standby.replicator.away():
        with pytest.raises(errors.StorageUnavailableError, match="other hosts may still serve"):
            standby.kms.seal()
        assert standby.kms.status().status == "sealed" and serving.mode == "serving"
        standby.daemon.kill()
        standby.daemon.start()
    wait_until(lambda: serving.mode == "sealed")
    wait_until(lambda: serving.kms.unseal_status().stays_sealed)
    for side in (serving, standby):
        side.kms.unseal()
    sides(both)


def test_a_host_that_was_off_during_a_seal_serves_nothing_before_it(both: Hosts) -> None:
    serving, standby = sides(both)
    serving.daemon.stop()
    assert standby.kms.seal().sealed
    serving.daemon.start()
    wait_until(lambda: serving.mode == "sealed")
    assert (
        len(serving.events("replica_serves")) == 0
        or serving.events("replica_serves")[-1]["seq"] < (serving.events("start")[-1]["seq"])
    )
    for side in (serving, standby):
        side.kms.unseal()
    sides(both)


@pytest.mark.parametrize("full", ["the one that follows", "the one that serves"])
def test_a_host_whose_disk_was_full_follows_once_there_is_room(both: Hosts, full: str) -> None:
    """A full disk is not a fork: the status names it, and another host serves."""
    b, a = sorted(sides(both), key=lambda side: side.daemon is both.a)
    serving = a if full == "the one that follows" else b
    serving.kms.promote_replica()
    wait_until(lambda: serving.mode == "serving")
    sides(both)
    with filled(both.disk_b), both.client() as kms:

        def is_shown() -> bool:
            with contextlib.suppress(errors.KmsError):
                kms.create_dek_for_thread("full")
            with contextlib.suppress(errors.KmsError):
                answer, number = b.kms.status(), b.kms.replica_status().number
                reasons = [each for each in answer.warnings if "does not follow: storage_unavailable" in each]
                shown = bool(reasons) and reasons[0] in str(status_page(answer).renderables)
                mode = answer.replica.mode if answer.replica else ""
                is_full = shown and mode == "following" and "No space left on device" in reasons[0]
                return is_full and both.database.tables.number > number + 5
            return False

        wait_until(is_shown)
    assert sides(both)[0].daemon is a.daemon
    assert b.kms.replica_status().why == ""
    files = [
        {path.name: path.read_bytes() for path in (side.daemon.data_dir / "kms-deks").iterdir()} for side in (a, b)
    ]
    assert files[0] == files[1]


def test_older_and_reordered_parts_change_nothing(both: Hosts) -> None:
    serving, standby = sides(both)
    older = both.database.tables.parts(0, 0)
    serving.kms.create_dek_for_thread("t")
    sides(both)
    with standby.replicator.away():
        before = sorted((path, path.read_bytes()) for path in standby.daemon.data_dir.rglob("*.json"))
        for part in older:
            with pytest.raises((errors.ReplicaRolledBackError, errors.ConflictError)):
                standby.kms.replica_follow(part)
        assert sorted((path, path.read_bytes()) for path in standby.daemon.data_dir.rglob("*.json")) == before
    assert sides(both)[0].daemon is serving.daemon


def test_a_forged_keyring_closes_a_standby_until_its_next_unseal(both: Hosts) -> None:
    """Only a root key can tell that it is forged."""
    serving, standby = sides(both)
    with standby.replicator.away():
        body, _, tag = keyring.parse_file(both.database.tables.keyring)
        forged = msgspec.structs.replace(body, epoch=body.epoch + 1, key_version=body.key_version + 1)
        (part,) = both.database.tables.parts(0, 0)
        assert isinstance(part.head, api.ReplicaHead)
        part.head.keyring = encode_text(keyring.encode_file(keyring.encode_body(forged), tag))
        with contextlib.suppress(errors.SealedError):
            standby.kms.replica_follow(part)
        assert standby.mode == "sealed"
        assert not standby.kms.unseal().sealed
    assert sides(both)[0].daemon is serving.daemon


def test_an_idle_host_keeps_its_lease(both: Hosts) -> None:
    serving, _ = sides(both)
    term = both.database.tables.term
    until = time.monotonic() + 1.5 * LEASE_S
    while time.monotonic() < until:
        assert serving.mode == "serving"
    assert both.database.tables.term == term


def test_a_standby_follows_the_removal_of_a_root_key_with_its_own(both: Hosts) -> None:
    """Its next take-over gives it another audit key, since the removed root key could open the one before."""
    before, after = sides(both)
    root = os.urandom(32)
    slot_id = before.kms.add_root(root.hex(), provider="file").slot_id
    sides(both)
    keys = {side.daemon.pid: side.kms.status().audit.public_key for side in (before, after)}
    before.kms.remove_root(slot_id)
    wait_until(lambda: before.kms.status().rotation is None)
    assert sides(both)[0].daemon is before.daemon
    unsealed = after.events("unseal")[-1]
    assert (unsealed["actor"], unsealed["facts"]["kind"]) == ("minikms", "from_source")
    assert before.kms.status().audit.public_key != keys[before.daemon.pid]
    after.kms.promote_replica()
    wait_until(lambda: after.mode == "serving")
    assert after.kms.status().audit.public_key != keys[after.daemon.pid]
    with both.client() as kms:
        assert kms.encrypt(kms.create_dek_for_thread("t").key_id, b"")


def test_a_promoted_host_fills_an_emptied_database(both: Hosts) -> None:
    before, after = sides(both)
    key_id = before.kms.create_dek_for_thread("t").key_id
    number = both.database.tables.number
    sides(both)
    with pytest.raises(errors.ConflictError, match="once its lease has ended"):
        before.kms.promote_replica(replace_database=True)
    both.empty_database()
    wait_until(lambda: before.mode == "following")
    after.kms.promote_replica(replace_database=True)
    wait_until(lambda: after.mode == "serving")
    assert after.kms.get_wrapped(key_id)
    assert both.database.tables.number > number
    sides(both)
