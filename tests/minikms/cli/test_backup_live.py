"""A backup that is made while keys are created, rotated and destroyed is whole, and restores to a working daemon."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from minikms.client import Client
from minikms.client.errors import KmsRefusedError
from tests.harness.live_daemon import LiveDaemon

BACKUPS = 3


def minikms(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "minikms", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def churn(socket: Path, stop: threading.Event) -> None:
    """Makes, retires and destroys keys, rotates the KEK and destroys the old ones, until told to stop."""
    with Client(socket) as kms:
        number = 0
        while not stop.is_set():
            number += 1
            key = kms.create_dek_for_thread(f"churn-{number}").key_id
            if number % 3 == 0:
                kms.retire_key(key)
                kms.destroy_key(key)
            if number % 7 == 0:
                kms.rotate_kek()
                kms.prune_kek(backups=True)


def test_backups_beside_a_busy_daemon_are_good_and_hold_what_was_there(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon, daemon.client() as kms:
        sealed = {}
        for number in range(50):
            key_id = kms.create_dek_for_thread(f"t-{number}").key_id
            sealed[key_id] = kms.encrypt(key_id, b"hello %d" % number)
        stop = threading.Event()
        busy = threading.Thread(target=churn, args=(daemon.socket, stop))
        busy.start()
        try:
            places: list[str | Path] = ["--data-dir", daemon.data_dir, "--master-key-file", daemon.root_file]
            for number in range(BACKUPS):
                done = minikms("backup", "create", tmp_path / f"b{number}", *places)
                assert done.returncode == 0, done.stderr
        finally:
            stop.set()
            busy.join(60)
        newest = daemon.data_dir / "keyring.json"
        victim = next(iter(sealed))
        kms.retire_key(victim)
        receipt = kms.destroy_key(victim)
        assert set(receipt.archives) >= {str(tmp_path / f"b{number}") for number in range(BACKUPS)}
        daemon.process.terminate()
        daemon.process.wait(20)
        restored: list[str | Path] = ["--data-dir", tmp_path / "restored", "--master-key-file", daemon.root_file]
        done = minikms("backup", "restore", tmp_path / "b0", *restored, "--newer-keyring", newest)
        assert done.returncode == 0, done.stderr
        daemon.data_dir.rename(tmp_path / "old")
        (tmp_path / "restored").rename(daemon.data_dir)
        daemon.start()
        with daemon.client() as again:
            for key_id, ciphertext in sealed.items():
                try:
                    opened = again.decrypt(key_id, ciphertext)
                except KmsRefusedError as error:
                    assert (key_id, error.code) == (victim, "key_destroyed")
                else:
                    assert opened.startswith(b"hello") and key_id != victim
                    assert again.get_key(key_id).uses_max > 2**30
