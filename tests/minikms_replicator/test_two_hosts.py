"""Two hosts of one key service, as their operators make them: real daemons, real replicators, one PostgreSQL."""

import re
from pathlib import Path

import pytest

from minikms.api.errors import KeyDestroyedError, StandbyError
from tests import needs
from tests.harness import forked
from tests.harness.replica_hosts import KeyHost, KeyHosts, key_hosts
from tests.harness.waiting import wait_until


def test_a_second_host_serves_the_same_keys_when_the_first_is_lost(public: Path) -> None:
    needs.library("asyncpg")
    with key_hosts(public) as hosts:
        a = hosts.first("a")
        b = hosts.joined("b", a)
        with a.client() as kms:
            kept = kms.get_or_create_dek_for_thread("kept", purpose="data").key_id
            gone = kms.get_or_create_dek_for_thread("gone", purpose="data").key_id
            sealed = {key_id: kms.encrypt(key_id, b"text", aad=b"a") for key_id in (kept, gone)}
            kms.retire_key(gone)
            kms.destroy_key(gone)
        a.end()
        wait_until(lambda: b.status().mode == "serving")
        with b.client() as kms:
            assert kms.decrypt(kept, sealed[kept], aad=b"a") == b"text"
            with pytest.raises(KeyDestroyedError):
                kms.decrypt(gone, sealed[gone], aad=b"a")
            made = kms.get_or_create_dek_for_thread("later", purpose="data").key_id
            later = kms.encrypt(made, b"later", aad=b"b")
        a.start()
        wait_until(lambda: a.status().number == b.status().number)
        b.end()
        hosts.back_up()
        wait_until(lambda: a.status().mode == "serving")
        with a.client() as kms:
            assert kms.decrypt(made, later, aad=b"b") == b"later"
            with pytest.raises(KeyDestroyedError):
                kms.decrypt(gone, sealed[gone], aad=b"a")
            kms.retire_key(kept)
            kms.destroy_key(kept)
        check_that_the_host_that_was_away_does_not_serve(hosts, a, b)


def check_that_the_host_that_was_away_does_not_serve(hosts: KeyHosts, a: KeyHost, b: KeyHost) -> None:
    """The database is the one that `b` has seen last, and nobody holds the head: only the report of `a` tells."""
    hosts.restore("UPDATE kms_head SET member = ''")
    wait_until(lambda: a.status().mode == "refused")
    b.start()
    wait_until(lambda: b.status().why or b.status().mode == "serving")
    assert re.search("lacks change [0-9]+ of term 3, which the host a reports", b.status().why)
    with pytest.raises(StandbyError), b.client(wait_s=0) as kms:
        kms.list_keys()
    said = forked.run("minikms", "replica", "status", *b.at)
    assert said.returncode == 1 and "which the host a reports" in said.stdout
