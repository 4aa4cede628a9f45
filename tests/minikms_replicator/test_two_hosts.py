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
        check_that_the_host_with_most_fills_the_database(hosts, a, b)
        with b.client(wait_s=0) as kms, pytest.raises(StandbyError):
            kms.list_keys()
        with a.client() as kms, pytest.raises(KeyDestroyedError):
            kms.decrypt(kept, sealed[kept], aad=b"a")


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
    said = forked.run("minikms", "doctor", *b.at)
    assert said.returncode == 1 and said.stdout.count("which the host a reports") == 1


def check_that_the_host_with_most_fills_the_database(hosts: KeyHosts, a: KeyHost, b: KeyHost) -> None:
    """The commands of the runbook, in its order; once more, at once on the host that serves."""
    files = []
    for name, words in (
        ("a", ("minikms", "replica", "evidence", "--data-dir", a.data_dir)),
        ("b", ("minikms", "replica", "evidence", "--data-dir", b.data_dir)),
        ("database", ("minikms_replicator", "evidence", "--config", a.config)),
    ):
        files.append(hosts.directory / f"{name}.json")
        files[-1].write_text(forked.run(*words, "--json").stdout)
    compared = forked.run("minikms", "replica", "evidence", *files)
    assert compared.returncode == 0 and "\nlacks nothing: a\n" in compared.stdout
    assert len(re.findall("lacks the tombstones of k_", compared.stdout)) == 2
    for _ in range(2):
        a.run("reset", "--url", hosts.owner, "--yes", program="minikms_replicator")
        a.run("replica", "promote", "--replace-database", "--wait", "60", "--yes", *a.at)
        wait_until(lambda: (b.status().mode, b.status().number) == ("following", a.status().number))
        assert a.status().mode == "serving"
