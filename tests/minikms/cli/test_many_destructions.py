"""`minikms keys destroy` with many keys: it asks for their number, and a key that fails stops no other."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import KeyDestroyedError
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon


def minikms(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run("minikms", *arguments)


def retired(daemon: LiveDaemon, count: int, thread: str = "t") -> list[str]:
    with daemon.client() as kms:
        key_ids = [kms.create_dek_for_thread(thread).key_id for _ in range(count)]
        for key_id in key_ids:
            kms.retire_key(key_id)
    return key_ids


def destroy(daemon: LiveDaemon, *arguments: str) -> tuple[int, dict[str, Any], str]:
    done = minikms("keys", "destroy", *arguments, "--yes", "--json", "--socket", daemon.socket)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_a_key_that_cannot_be_destroyed_stops_no_other(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        key_ids = retired(daemon, 40)
        with daemon.client() as kms:
            active = kms.create_dek_for_thread("t").key_id
        code, told, _ = destroy(daemon, *key_ids[:20], active, "k_" + "0" * 26, *key_ids[20:])
        assert code == 1
        assert {receipt["key_id"] for receipt in told["destroyed"]} == set(key_ids)
        assert {(one["key_id"], one["code"]) for one in told["failed"]} == {
            (active, "conflict"), ("k_" + "0" * 26, "key_not_found"),
        }  # fmt: skip
        assert told["not_tried"] == []
        with daemon.client() as kms, pytest.raises(KeyDestroyedError):
            kms.get_key(key_ids[0])


def test_a_thread_with_an_active_key_only_says_what_to_do_first(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        with daemon.client() as kms:
            active = kms.create_dek_for_thread("t").key_id
        code, told, error = destroy(daemon, "--thread", "t")
        assert (code, told) == (1, {})
        assert f"retire it first: minikms keys retire {active}" in error
        assert destroy(daemon, "--thread", "t", "--older-than", "0m")[0] == 0, "old keys may be none"


def test_retired_keys_are_chosen_by_thread_and_age(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        here, there = retired(daemon, 3, "here"), retired(daemon, 2, "there")
        assert destroy(daemon, "--older-than", "1h")[:2] == (0, {"destroyed": [], "failed": [], "not_tried": []})
        code, told, _ = destroy(daemon, "--thread", "here")
        assert (code, {receipt["key_id"] for receipt in told["destroyed"]}) == (0, set(here))
        code, told, _ = destroy(daemon, "--state", "retired", "--older-than", "0m")
        assert (code, {receipt["key_id"] for receipt in told["destroyed"]}) == (0, set(there))


@pytest.mark.parametrize("arguments", [[], ["k_" + "0" * 26, "--thread", "t"], ["--older-than", "soon"]])
def test_keys_are_named_or_chosen_and_not_both(tmp_path: Path, arguments: list[str]) -> None:
    done = minikms("keys", "destroy", *arguments, "--yes", "--socket", tmp_path / "s")
    assert done.returncode == 2
    assert done.stdout == ""


def test_without_a_terminal_many_keys_need_a_confirmation_flag(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        retired(daemon, 2)
        done = minikms("keys", "destroy", "--state", "retired", "--socket", daemon.socket)
        assert (done.returncode, "confirm with --yes" in done.stderr) == (2, True)


@pytest.mark.parametrize(("answer", "left"), [("2", 3), ("y", 3), ("3", 0)])
def test_a_terminal_asks_for_the_number_of_keys(tmp_path: Path, answer: str, left: int) -> None:
    """Any other answer than their number destroys nothing."""
    with LiveDaemon(tmp_path) as daemon:
        retired(daemon, 3)
        master, terminal = pty.openpty()
        try:
            command = [sys.executable, "-m", "minikms", "keys", "destroy", "--state", "retired", "--socket"]
            process = subprocess.Popen([*command, str(daemon.socket)], stdin=terminal, stderr=terminal)
            os.write(master, answer.encode() + b"\n")
            assert process.wait(60) == (1 if left else 0)
        finally:
            os.close(master)
            os.close(terminal)
        with daemon.client() as kms:
            assert len(kms.list_keys(state="retired").keys) == left
