"""What a program with the role `replicate` alone can have its host do."""

from pathlib import Path

import pytest

from minikms import api
from minikms.api.errors import KeyDestroyedError
from minikms.platform.clock import boot_ns
from tests.harness.waiting import wait_until
from tests.minikms_daemon.replica.hosts import Replicator, hosts


def test_a_lying_replicator_revives_nothing_that_its_host_saw_destroyed(tmp_path: Path) -> None:
    with hosts(tmp_path) as both:
        serving, standby = both.replicator_a, both.replicator_b
        seen, unseen = (serving.kms.create_dek_for_thread("t").key_id for _ in range(2))
        texts = {key_id: serving.kms.encrypt(key_id, b"text") for key_id in (seen, unseen)}
        for key_id in (seen, unseen):
            serving.kms.retire_key(key_id)
        serving.kms.destroy_key(seen)
        wait_until(lambda: standby.kms.replica_status().number == both.database.tables.number)
        with standby.away():
            serving.kms.destroy_key(unseen)
            wait_until(lambda: serves_by_a_lie(standby))
            assert serving.kms.replica_status().mode == "serving", "two serve"
            assert standby.kms.decrypt(unseen, texts[unseen]) == b"text"
            with pytest.raises(KeyDestroyedError):
                standby.kms.decrypt(seen, texts[seen])
            with pytest.raises(KeyDestroyedError):
                serving.kms.decrypt(unseen, texts[unseen])


def serves_by_a_lie(standby: Replicator) -> bool:
    """Grants a lease, and confirms commits, that no database has."""
    position = standby.kms.replica_follow(api.ASK_POSITION)
    number = position.number
    for _ in range(10):
        request = api.ReplicaNextRequest(term=1000, number=number, seals=position.seals, asked_ns=boot_ns())
        answer = standby.kms.replica_next(request)
        number = number if answer.commit is None else answer.commit.number
        if answer.position.mode == "serving":
            return True
    return False
