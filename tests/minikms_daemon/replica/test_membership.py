"""The commands of an operator against two daemons that run: a third host joins, is promoted and is removed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.waiting import wait_until
from tests.minikms_daemon.replica.hosts import LAUNCHER, Hosts, hosts


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Hosts]:
    with hosts(tmp_path) as made:
        yield made


def run(*words: object, status: int = 0) -> str:
    """What a command prints, to standard error if it fails."""
    done = forked.run("minikms", *map(str, words))
    assert done.returncode == status, done
    return done.stderr if status else done.stdout


def at(daemon: LiveDaemon) -> tuple[object, ...]:
    return "--socket", daemon.socket


def own(daemon: LiveDaemon) -> tuple[object, ...]:
    return "--data-dir", daemon.data_dir, "--master-key-file", daemon.root_file


def examined(daemon: LiveDaemon) -> list[dict[str, Any]]:
    """The problems of a directory, and what is said of its hosts."""
    found = json.loads(forked.run("minikms", "doctor", *own(daemon), "--json").stdout)["findings"]
    return [each for each in found if each["level"] == "problem" or each["area"] == "hosts"]


def test_a_third_host_joins_takes_over_and_is_removed(both: Hosts, tmp_path: Path) -> None:
    a, b = both.a, both.b
    with a.client() as kms:
        key_id = kms.create_dek_for_thread("t").key_id
        sealed = kms.encrypt(key_id, b"text")
    base, root = tmp_path / "c", os.urandom(32)
    base.mkdir()
    data_dir, key_file = base / "data", base / "data.master-key"
    key_file.touch(0o600)
    key_file.write_text(root.hex())
    place = ("--data-dir", data_dir, "--master-key-file", key_file)
    invitation, request = tmp_path / "invite.json", tmp_path / "request.json"

    run("replica", "invite", "--invitation", invitation, *at(a))
    said = run("replica", "join", "--invitation", invitation, "--name", "c", "--request", request, *place)
    assert json.loads(request.read_text())["fingerprint"] not in said
    assert "this host joins" in forked.run("minikms", "doctor", *map(str, place)).stdout
    added = json.loads(run("replica", "add", request, "--yes", "--json", *at(a)))
    assert "opens the keyring already" in run("replica", "add", request, "--yes", *at(a), status=1)
    assert "it has not reported yet" in run("replica", "list", *at(a))
    wait_until(lambda: "c (m" in str(examined(b)))  # b has followed
    for name in ("keyring.json", "kms-tombstones"):  # as `minikms-replicator fetch` writes them
        if (b.data_dir / name).exists():
            shutil.copy(b.data_dir / name, data_dir / name)
    shutil.copytree(b.data_dir / "kms-deks", data_dir / "kms-deks")
    told = forked.run("minikms", "doctor", *map(str, place))
    assert told.returncode == 0 and "of 3 hosts" in told.stdout, told
    flags = ("--policy", str(both.policy))
    with LiveDaemon(base, "file", *flags, launcher=LAUNCHER, root=root) as c, both.replicator(c):
        wait_until(lambda: json.loads(run("replica", "status", "--json", *at(c), status=0))["number"] > 0)

        # A standby says where to go, and gives an archive, whose directory is that of one host.
        for words in (("root", "list"), ("rotate-kek", "--yes")):
            assert "`minikms replica list` shows which" in run(*words, *at(c), status=1)
        [finding] = examined(c)
        assert finding["what"].startswith("this is c of 3 hosts: a (m1), b (m")
        run("backup", "create", tmp_path / "archive", *own(c))
        run("backup", "restore", tmp_path / "archive", "--data-dir", tmp_path / "restored", *own(c)[2:], "--yes")
        assert not (tmp_path / "restored" / "kms-replica.json").exists()

        # It takes over: the same keys, its own log, and each log says who served in which term.
        assert "serves in term" in run("replica", "promote", *at(c))
        with c.client() as kms:
            assert kms.decrypt(key_id, sealed) == b"text"
        assert "promote" in run("replica", "remove", added["member_id"], "--yes", *at(c), status=1)
        run("audit", "verify", *own(c))
        assert "replica_serves" in run("audit", "find", "--actor", "minikms", *own(c)[:2])

        # And is removed, when another one serves again.
        run("replica", "promote", *at(a))
        assert json.loads(run("replica", "remove", added["member_id"], "--yes", "--json", *at(a)))["name"] == "c"
        wait_until(lambda: "revoking" not in run("root", "list", *at(a)))
        with a.client() as kms:
            assert kms.decrypt(key_id, sealed) == b"text"
        assert " c " not in run("replica", "list", *at(a))
    assert a.events("add_replica")[-1]["facts"]["name"] == a.events("remove_replica")[-1]["facts"]["name"] == "c"
