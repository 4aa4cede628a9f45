"""A backup that is made while keys are created, rotated and destroyed is whole, and restores to a working daemon."""

import json
import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minikms.api import development_key_path
from minikms.api.errors import KmsRefusedError
from minikms.archives.create import RETIRED_NAMED_MAX
from minikms.client import Client, DecryptItem, EncryptItem
from minikms.crypto.aead import NONCE_BYTES, PREFIX_BYTES
from minikms.keys import dek
from minikms.processes import handover
from tests.harness import decryptor, forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.unlocking import UnlockListener
from tests.harness.waiting import wait_until

BACKUPS = 3
BATCH_ITEMS = 20
ROUNDS = 10
"""Of each writer, while both daemons serve."""


def minikms(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return forked.run("minikms", *words)


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
        daemon.process.wait(60)
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


def test_any_root_key_verifies_and_restores_an_archive(tmp_path: Path) -> None:
    """Made beside the daemon under the one in use; opened with a spare, which came later."""
    spare, archive = tmp_path / "spare.key", tmp_path / "archive"
    spare.touch(0o600)
    spare.write_text(os.urandom(32).hex() + "\n")
    with LiveDaemon(tmp_path) as daemon, daemon.client() as kms:
        kms.create_dek_for_thread("t")
        kms.add_root(bytearray(spare.read_bytes().strip()), provider="file")
        made = minikms("backup", "create", archive, "--data-dir", daemon.data_dir, "--root", f"file:{daemon.root_file}")
        assert made.returncode == 0, made.stderr
    for words in (("verify", archive), ("restore", archive, "--data-dir", tmp_path / "restored", "--yes")):
        done = minikms("backup", *words, "--root", f"file:{spare}")
        assert done.returncode == 0, done.stderr


def test_an_unlock_service_gives_the_root_key_of_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for that keyring, and no data directory is needed."""
    monkeypatch.setenv("PROGRESSDB_MINIKMS_UNLOCK_UIDS", str(os.geteuid()))
    archive = tmp_path / "archive"
    with UnlockListener(tmp_path / "unlock.sock") as listener, LiveDaemon(tmp_path) as daemon:
        listener.answer = handover.KEY + bytes.fromhex(daemon.root_file.read_text())
        unlock = ("--root", f"unlock:{listener.path}")
        made = minikms("backup", "create", archive, "--data-dir", daemon.data_dir, *unlock, "--json")
        assert made.returncode == 0, made.stderr
        daemon.data_dir.rename(tmp_path / "old")
        verified = minikms("backup", "verify", archive, *unlock)
        assert verified.returncode == 0, verified.stderr
        words = ("backup", "restore", archive, "--data-dir", daemon.data_dir)
        newer = ("--newer-keyring", tmp_path / "old" / "keyring.json", "--newer-root", unlock[1])
        done = minikms(*words, *unlock, *newer)
        assert done.returncode == 0, done.stderr
        keyring_id = json.loads(made.stdout)["keyring_id"]
        assert {question and question.keyring_id for question in listener.asked} == {keyring_id}
        assert len(listener.asked) == 4
        listener.answer = handover.KEY + os.urandom(32)
        other = minikms("backup", "verify", archive, *unlock)
    assert (other.returncode, "give one that opened the keyring when the backup was made" in other.stderr) == (1, True)


def test_a_development_key_is_found_beside_the_data_directory(tmp_path: Path) -> None:
    archive, key = tmp_path / "archive", tmp_path / "d.master-key"
    with LiveDaemon(tmp_path) as daemon:
        daemon.root_file.rename(key)
        key = key.rename(development_key_path(daemon.data_dir))
        places: list[str | Path] = ["--data-dir", daemon.data_dir, "--root", "dev:"]
        for step in ("create", "verify"):
            done = minikms("backup", step, archive, *places)
            assert done.returncode == 0, done.stderr


def removed_root(daemon: LiveDaemon, base: Path) -> tuple[Path, Path, str, bytes]:
    """A spare root key; an archive; then the first root key removed, and the daemon ended. Also a key and what it
    encrypted.
    """
    spare, archive = base / "spare.key", base / "archive"
    spare.touch(0o600)
    spare.write_text(os.urandom(32).hex() + "\n")
    places: list[str | Path] = ["--data-dir", daemon.data_dir, "--master-key-file", daemon.root_file]
    with daemon.client() as kms:
        key_id = kms.create_dek_for_thread("t").key_id
        sealed = kms.encrypt(key_id, b"hello")
        assert minikms("backup", "create", archive, *places).returncode == 0
        kms.add_root(bytearray(spare.read_bytes().strip()), provider="file")
        kms.remove_root("s1")
        wait_until(lambda: [root.state for root in kms.list_roots().roots] == ["active"])
    daemon.process.terminate()
    daemon.process.wait(60)
    return spare, archive, key_id, sealed


def test_a_root_key_that_was_removed_after_the_backup_stays_removed(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        spare, archive, key_id, sealed = removed_root(daemon, tmp_path)
        words: list[str | Path] = ["backup", "restore", archive, "--data-dir", tmp_path / "restored"]
        words += ["--master-key-file", daemon.root_file, "--newer-keyring", daemon.data_dir / "keyring.json"]
        lacking = minikms(*words)
        assert (lacking.returncode, "--newer-master-key-file" in lacking.stderr) == (2, True)
        done = minikms(*words, "--newer-master-key-file", spare, "--json")
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert (len(told["roots"]), len(told["roots_removed"])) == (1, 1) and told["roots"] != told["roots_removed"]
        refused = minikms("audit", "verify", "--data-dir", tmp_path / "restored", "--master-key-file", daemon.root_file)
        assert (refused.returncode != 0, told["roots_removed"][0] in refused.stderr) == (True, True)
        good = minikms("audit", "verify", "--data-dir", tmp_path / "restored", "--master-key-file", spare)
        assert good.returncode == 0, good.stdout + good.stderr
        daemon.data_dir.rename(tmp_path / "old")
        (tmp_path / "restored").rename(daemon.data_dir)
        daemon.root_file.write_text(spare.read_text())
        daemon.start()
        with daemon.client() as again:
            assert again.decrypt(key_id, sealed) == b"hello"
            wait_until(lambda: len(again.list_roots().roots) == 1)
            assert [kek.version for kek in again.status().keks if kek.state == "active"] == [2]


def test_a_restore_without_a_newer_keyring_says_which_roots_open_it(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        _, archive, _, _ = removed_root(daemon, tmp_path)
        places: list[str | Path] = ["--data-dir", tmp_path / "restored", "--master-key-file", daemon.root_file]
        done = minikms("backup", "restore", archive, *places, "--yes")
        assert done.returncode == 0, done.stderr
        assert "A root key that was removed after the backup opens it again" in done.stdout


def test_keys_that_a_restore_may_bring_back_are_named_before(tmp_path: Path) -> None:
    """Without a newer keyring nobody knows which retired key was destroyed since; a new installation's is none."""
    archive, other = tmp_path / "archive", tmp_path / "other"
    with LiveDaemon(tmp_path) as daemon, daemon.client() as kms:
        active, *retired = [kms.create_dek_for_thread("t").key_id for _ in range(RETIRED_NAMED_MAX + 3)]
        retired.sort()  # the ids of one millisecond are not in the order of their creation
        for key_id in retired:
            kms.retire_key(key_id)
        key = ("--master-key-file", daemon.root_file)
        assert minikms("backup", "create", archive, "--data-dir", daemon.data_dir, *key).returncode == 0
        kms.destroy_key(retired[0])
    restore = ("backup", "restore", archive, "--data-dir", tmp_path / "restored", *key)
    asked = minikms(*restore)
    assert asked.returncode != 0 and not (tmp_path / "restored").exists(), asked
    assert minikms("init", "--data-dir", other, *key).returncode == 0
    foreign = minikms(*restore, "--newer-keyring", other / "keyring.json")
    assert foreign.returncode == 1 and "such as that of a new installation" in foreign.stderr, foreign
    done = minikms(*restore, "--yes")
    assert done.returncode == 0, done
    for said in (asked.stderr, done.stderr):
        assert f"{len(retired)} retired key(s)" in said and "and 2 more" in said
        named = [key_id for key_id in (active, *retired) if key_id in said]
        assert named == retired[:RETIRED_NAMED_MAX]


def write(daemon: LiveDaemon, key_id: str, stop: threading.Event, written: list[tuple[DecryptItem, bytes]]) -> None:
    """Encrypts one by one and in batches until told to stop."""
    with daemon.client() as kms:
        while not stop.is_set():
            texts = [os.urandom(8) for _ in range(BATCH_ITEMS + 1)]
            batch = kms.encrypt_batch([EncryptItem(key_id=key_id, plaintext=text) for text in texts[1:]])
            for text, sealed in zip(texts, [kms.encrypt(key_id, texts[0]), *batch], strict=True):
                assert isinstance(sealed, bytes)
                written.append((DecryptItem(key_id=key_id, ciphertext=sealed), text))


def wrap_prefixes(daemon: LiveDaemon) -> set[bytes]:
    files = (daemon.data_dir / "kms-deks").glob("*.json")
    return {dek.parse(file.read_bytes(), file.stem).wrapped[:PREFIX_BYTES] for file in files}


def test_a_restored_copy_and_its_original_write_on_under_the_same_keys(tmp_path: Path) -> None:
    """The archive is restored beside running writers. Each daemon opens what both wrote, before and after a rotation
    of its KEK; no nonce and no derived key is used twice.
    """
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    stop = threading.Event()
    with (
        LiveDaemon(tmp_path / "first") as first,
        LiveDaemon(tmp_path / "second") as second,
        first.client() as to_first,
        ThreadPoolExecutor() as threads,
    ):
        second.stop()
        second.data_dir.rename(tmp_path / "unused")
        second.root_file.write_text(first.root_file.read_text())
        key_ids = [to_first.create_dek_for_thread(f"t-{number}").key_id for number in range(2)]
        written: dict[LiveDaemon, list[tuple[DecryptItem, bytes]]] = {first: [], second: []}
        writers = [threads.submit(write, first, key_id, stop, written[first]) for key_id in key_ids]
        try:
            places: list[str | Path] = ["--master-key-file", first.root_file, "--data-dir"]
            made = minikms("backup", "create", tmp_path / "archive", *places, first.data_dir)
            assert made.returncode == 0, made.stderr
            done = minikms("backup", "restore", tmp_path / "archive", *places, second.data_dir, "--yes")
            assert done.returncode == 0, done.stderr
            second.start()
            writers += [threads.submit(write, second, key_id, stop, written[second]) for key_id in key_ids]
            enough = {daemon: len(items) + ROUNDS * BATCH_ITEMS for daemon, items in written.items()}
            wait_until(lambda: all(len(written[each]) >= count for each, count in enough.items()))
        finally:
            stop.set()
        for writer in writers:
            writer.result()
        every = [*written[first], *written[second]]
        for daemon in (first, second):
            with daemon.client() as kms:
                for _ in range(2):
                    for start in range(0, len(every), 1000):
                        part = every[start : start + 1000]
                        assert kms.decrypt_batch([item for item, _ in part]) == [text for _, text in part]
                    kms.rotate_kek()
        deks = [{name: key for name, key in each.keys().items() if name.startswith("DEK ")} for each in (first, second)]
        assert deks[0] == deks[1]
        assert not wrap_prefixes(first) & wrap_prefixes(second)
    nonces = {item.ciphertext[:NONCE_BYTES] for item, _ in every}
    assert len(nonces) == len(every)
    prefixes = [{item.ciphertext[:PREFIX_BYTES] for item, _ in written[each]} for each in (first, second)]
    derived = {decryptor.derived(key, prefix) for key in deks[0].values() for each in prefixes for prefix in each}
    assert len(derived) == len(key_ids) * sum(map(len, prefixes))
