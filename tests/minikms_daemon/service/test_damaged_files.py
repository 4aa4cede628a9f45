"""Damaged, swapped, foreign and outdated files: each is found and named, and harms nothing else."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_daemon.service.asking import encrypted, new_key, post, status, status_once


def indexed(found: dict[str, Any]) -> bool:
    """Whether every file was looked at."""
    return not found["keys"]["indexing"]


def opens(daemon: LiveDaemon, key_id: str, sealed: str) -> bool:
    answer = post(daemon, "/decrypt", {"key_id": key_id, "ciphertext": sealed})
    assert answer.status == 200 or answer.code == "key_unreadable", answer
    return answer.status == 200


def refused_start(daemon: LiveDaemon, *flags: str) -> str:
    """What a start says that is refused; it must end by itself."""
    done = forked.run(*daemon.words, *flags, env=daemon.environ)
    assert done.returncode == 2, done.stderr
    return done.stderr


def reduced(text: bytes, **changes: object) -> bytes:
    return json.dumps(json.loads(text) | changes, separators=(",", ":")).encode().ljust(1024)


DAMAGES: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "empty": (lambda own, other: b"", "damaged"),
    "truncated": (lambda own, other: own[: len(own.rstrip()) // 2], "damaged"),
    "a flipped bit": (
        lambda own, other: own.rstrip().replace(b'"wrapped":"', b'"wrapped":"AAAA', 1)[:-3] + b"\n",
        "damaged",
    ),
    "another key's file": (lambda own, other: other, "another key's record"),
    "another key's file under its own name": (
        lambda own, other: reduced(other, id=json.loads(own)["id"]),
        "does not unwrap",
    ),
    "moved to another thread": (lambda own, other: reduced(own, thread_id="mine"), "does not unwrap"),
    "an unknown format version": (lambda own, other: reduced(own, format=2), "format version 2"),
    "a field of a later version": (lambda own, other: reduced(own, quorum=2), "unknown format version"),
    "another installation's": (lambda own, other: reduced(own, wrapped="A" * 80), "another installation"),
    "a KEK version that was never made": (lambda own, other: reduced(own, kek_version=9), "KEK version 9"),
    "too large": (lambda own, other: own + b" " * 20_000, "can't be read"),
}


def test_each_kind_of_damage_is_named_and_no_other_key_is_harmed(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        sealed = {key_id: encrypted(daemon, key_id) for key_id in (new_key(daemon) for _ in range(len(DAMAGES) + 3))}
        damaged = dict(zip(DAMAGES, list(sealed)[3:], strict=True))
        sound = list(sealed)[:3]
        folder = daemon.data_dir / "kms-deks"
        files = {key_id: (folder / f"{key_id}.json").read_bytes() for key_id in sealed}
        daemon.stop()
        for what, key_id in damaged.items():
            (folder / f"{key_id}.json").write_bytes(DAMAGES[what][0](files[key_id], files[sound[0]]))
        (folder / "README").write_text("not a key")
        (folder / f".{sound[0]}.json.swp").write_bytes(b"an editor's")
        daemon.start()

        for what, key_id in damaged.items():
            answer = post(daemon, "/decrypt", {"key_id": key_id, "ciphertext": sealed[key_id]})
            assert (answer.status, answer.code) == (503, "key_unreadable"), what
        assert all(opens(daemon, key_id, sealed[key_id]) for key_id in sound)
        told = status_once(daemon, indexed)
        for what, key_id in damaged.items():
            assert DAMAGES[what][1] in told["keys"]["unreadable_files"].pop(key_id), what
        assert told["keys"]["unreadable_files"] == {}
        assert told["keys"]["unreadable"] == len(damaged)
        assert any(f"{len(damaged)} key files can't be read" in warning for warning in told["warnings"])

        # A rotation neither stops for them nor takes their KEK away; mended, they are as they were.
        assert post(daemon, "/rotate_kek", {}).body["rewrapped"] == len(sound)
        [backup] = (daemon.data_dir / "kms-deks-backup").glob("*/*.journal")
        os.truncate(backup, 5 * 1024 * 1024)
        assert post(daemon, "/kek/prune", {"backups": True}).body["destroyed"] == []
        assert any(
            f"1 rotation backups can't be read or written, first {backup.parent.name}/{backup.name}" in warning
            for warning in status(daemon)["warnings"]
        )
        assert daemon.events("rotate_kek_done")[-1]["facts"]["unreadable"] == len(damaged)
        for key_id in damaged.values():
            (folder / f"{key_id}.json").write_bytes(files[key_id])
        assert all(opens(daemon, key_id, sealed[key_id]) for key_id in sealed)
        assert status(daemon)["keys"]["unreadable"] == 0


def test_an_operator_learns_that_a_journal_was_damaged(tmp_path: Path) -> None:
    with LiveDaemon(tmp_path) as daemon:
        key_id = new_key(daemon)
        daemon.kill()
        (daemon.data_dir / "kms-deks" / f"{key_id}.json").unlink()
        journal = daemon.data_dir / "kms-journal"
        content = bytearray(journal.read_bytes())
        content[2000] ^= 1
        journal.write_bytes(content)
        daemon.start()
        assert any("1 records of the journal of key files were damaged" in text for text in status(daemon)["warnings"])
        assert "journal damaged" in daemon.log.read_text()
        told = forked.run("minikms", "doctor", "--data-dir", daemon.data_dir)
        assert (told.returncode, key_id in told.stdout) == (1, True)


def test_a_link_or_a_pipe_in_place_of_a_key_is_not_opened(tmp_path: Path) -> None:
    """It blocks nothing."""
    with LiveDaemon(tmp_path) as daemon:
        linked, piped, sound = (new_key(daemon) for _ in range(3))
        sealed = encrypted(daemon, sound)
        daemon.stop()
        folder = daemon.data_dir / "kms-deks"
        for key_id in (linked, piped):
            (folder / f"{key_id}.json").rename(tmp_path / f"{key_id}.json")
        (folder / f"{linked}.json").symlink_to(tmp_path / f"{linked}.json")
        os.mkfifo(folder / f"{piped}.json")
        daemon.start()
        for key_id in (linked, piped):
            assert post(daemon, "/encrypt", {"key_id": key_id, "plaintext": ""}).code == "key_unreadable"
        assert opens(daemon, sound, sealed)
        assert status_once(daemon, indexed)["keys"]["unreadable"] == 2


# --- the keyring ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"version":5', b'"version":6', 1)), "version 6"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b'"epoch":', b'"epoch":1')), "altered"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_a_damaged_keyring_is_refused_and_not_replaced(tmp_path: Path, spoil: Callable[[Path], None], why: str) -> None:
    with LiveDaemon(tmp_path) as daemon:
        new_key(daemon)
        daemon.stop()
        path = daemon.data_dir / "keyring.json"
        whole = path.read_bytes()
        spoil(path)
        spoilt = path.read_bytes() if path.exists() else None
        assert why in refused_start(daemon)
        assert (path.read_bytes() if path.exists() else None) == spoilt
        path.write_bytes(whole)
        daemon.start()


def test_a_keyring_older_than_the_audit_log_is_refused_until_accepted(tmp_path: Path) -> None:
    """It does not know what was made and destroyed since: a key that it does not know as destroyed would open again."""
    with LiveDaemon(tmp_path) as daemon:
        key_id, kept = new_key(daemon), new_key(daemon)
        sealed = encrypted(daemon, kept)
        older = (daemon.data_dir / "keyring.json").read_bytes()
        post(daemon, f"/keys/{key_id}/retire", {})
        post(daemon, f"/keys/{key_id}/destroy", {"key_id": key_id})
        newest = status(daemon)["epoch"]
        daemon.kill()  # also without a last line
        (daemon.data_dir / "keyring.json").write_bytes(older)
        text = refused_start(daemon)
        assert f"the log has {newest}" in text
        assert "--accept-restore" in text
        assert (daemon.data_dir / "keyring.json").read_bytes() == older

        command = daemon.command
        daemon.command = [*command, "--accept-restore"]
        daemon.start()
        told = status(daemon)
        assert told["epoch"] > newest
        assert opens(daemon, kept, sealed)
        assert opens(daemon, kept, encrypted(daemon, kept))
        facts = daemon.events("start")[-1]["facts"]
        assert facts["epoch_before"] == newest
        assert facts["restore_accepted"] < newest
        # Later starts need the flag no more.
        for flags in (["--accept-restore"], []):
            daemon.stop()
            daemon.command = [*command, *flags]
            daemon.start()
        assert status(daemon)["epoch"] > told["epoch"]


def test_an_older_keyring_and_an_older_log_with_newer_keys_isolates_those(tmp_path: Path) -> None:
    """No other file in the directory tells of the epoch; what the older keyring can't open is named."""
    with LiveDaemon(tmp_path) as daemon:
        before = new_key(daemon)
        daemon.stop()
        names = ("keyring.json", "minikms-audit.log", "minikms-audit.log.confirmed")
        older = {name: (daemon.data_dir / name).read_bytes() for name in names}
        daemon.start()
        post(daemon, "/rotate_kek", {})
        after = new_key(daemon)
        daemon.stop()
        for name, content in older.items():
            (daemon.data_dir / name).write_bytes(content)
        daemon.start()
        told = status_once(daemon, indexed)
        assert set(told["keys"]["unreadable_files"]) == {before, after}
        assert all("the keyring is older than the key" in why for why in told["keys"]["unreadable_files"].values())
        encrypted(daemon, new_key(daemon))
