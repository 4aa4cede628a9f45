"""Today's code opens what each release left on disk, reads all of it back, and goes on with it."""

from __future__ import annotations

import json
import os
import re
import tarfile
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import KeyDestroyedError
from minikms.client import Client, MacItem
from minikms.policy.meters import HOUR_NS, SAVED_NAME, Meters
from minikms.roots.pin import PinFile
from minikms_unlock.passphrase import read_config
from tests.harness import forked
from tests.harness.live_daemon import LiveDaemon
from tests.harness.message_server import ADMIN, server
from tests.harness.scripts import verify_audit
from tests.vectors.make_release import (
    AAD,
    LISTS,
    SQL,
    VECTORS,
    answers,
    auditor,
    in_postgres,
    key_service,
    say,
    store_settings,
)

RELEASES = sorted(VECTORS.glob("release-*.tar.xz"))


class Release:
    """What one left, below `base`, and a key service of today over it, which people have unsealed with two shares."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.expected: dict[str, Any] = json.loads((base / "expected.json").read_text())
        (base / "data/audit-dir").write_text(f"{base}/audit\n")  # which the directories were moved to
        self.buckets = (base / "data" / SAVED_NAME).read_bytes()


@pytest.fixture(scope="module", params=RELEASES, ids=lambda path: path.name)
def release(request: pytest.FixtureRequest) -> Iterator[Release]:
    """Its audit log is intact before and after all tests of this module."""
    with tempfile.TemporaryDirectory(prefix="release-") as name:
        base = Path(name)
        with tarfile.open(request.param) as archive:
            archive.extraction_filter = lambda member, path: member  # the argument `filter` is newer than Python 3.11.2
            archive.extractall(base)
        base.chmod(0o755)
        made = Release(base)
        verify_audit(base / "data", base / "data.master-key")
        yield made
        verify_audit(base / "data", base / "data.master-key")


@pytest.fixture(scope="module")
def daemon(release: Release) -> Iterator[LiveDaemon]:
    with key_service(release.base) as daemon:
        with daemon.client() as kms:
            assert kms.unseal_status().by  # of the marker
            for file in sorted((release.base / "shares").iterdir())[1:]:
                answer = kms.unseal(share=file.read_text().strip())
            assert not answer.sealed
        yield daemon
        daemon.stop()


@pytest.fixture
def kms(daemon: LiveDaemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client


def holds(found: object, expected: object) -> bool:
    """Whether it is what was expected. An object may have members that are newer."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(holds(found.get(name), value) for name, value in expected.items())
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(holds, found, expected))
    return found == expected


def test_each_release_of_the_changelog_has_an_archive() -> None:
    changes = (VECTORS.parents[1] / "CHANGELOG.md").read_text("utf-8")
    released = re.findall(r"^## \[(.+)\] - [0-9]", changes, re.MULTILINE)
    assert RELEASES and {f"release-{version}.tar.xz" for version in released} <= {path.name for path in RELEASES}


def test_a_key_service_lists_keys_keks_and_root_keys_as_before(release: Release, daemon: LiveDaemon) -> None:
    for words in LISTS:
        found = json.loads(say("minikms", *words, "--json", "--socket", daemon.socket))
        assert holds(found, release.expected[" ".join(words)]), (words, found)


def test_a_key_service_opens_what_was_encrypted(release: Release, kms: Client) -> None:
    keys, sealed = release.expected["keys"], release.expected["sealed"]
    for name in ("active", "retired", "next"):
        assert kms.decrypt(keys[name], b64decode(sealed[name]), aad=AAD) == name.encode()
    with pytest.raises(KeyDestroyedError):
        kms.decrypt(keys["destroyed"], b64decode(sealed["destroyed"]), aad=AAD)
    key, mac = release.expected["mac"]
    assert kms.mac(key, [MacItem(plaintext=b"text", aad=AAD)])[0].hex() == mac


def test_a_file_decrypts_and_the_parameters_of_a_passphrase_are_read(release: Release, daemon: LiveDaemon) -> None:
    read_config(release.base / "passphrase.toml")
    note = say("minikms", "decrypt", release.base / "note.kms", "--socket", daemon.socket, "--output", "-")
    assert note == "the door code is 4711"


def test_a_pin_names_its_root_key(release: Release, as_root: None) -> None:
    """Only root's own file counts."""
    root = memoryview(bytes.fromhex((release.base / "data.master-key").read_text()))
    assert PinFile(release.base / "pin").read().names(root)


async def test_the_hourly_limits_go_on(release: Release) -> None:
    async def keep(_: bytes) -> None: ...

    meters = Meters(release.buckets, keep=keep, now_ns=lambda: HOUR_NS)
    assert json.loads(meters.save()) == json.loads(release.buckets)


def test_an_archive_is_whole_and_restores(release: Release) -> None:
    archive, key = release.base / "keys.minikms", ("--master-key-file", release.base / "data.master-key")
    say("minikms", "backup", "verify", archive, *key)
    say("minikms", "backup", "restore", archive, "--data-dir", release.base / "restored", *key, "--yes")
    verify_audit(release.base / "restored", release.base / "data.master-key")


def test_the_journal_of_a_killed_key_service_is_replayed(release: Release) -> None:
    base = release.base / "killed"
    key, sealed = release.expected["killed"]
    root = bytes.fromhex((base / "data.master-key").read_text())
    with LiveDaemon(base, root=root) as daemon, daemon.client() as kms:
        assert kms.decrypt(key, b64decode(sealed)) == b"killed"
        daemon.stop()
    verify_audit(base / "data", base / "data.master-key")


def test_a_store_answers_as_before_and_takes_a_message(release: Release, daemon: LiveDaemon) -> None:
    """In RocksDB. Its backup is whole too."""
    expected = release.expected["store"]
    with server(release.base, store_settings(daemon)) as asked:
        found = answers(asked, list(expected))
        assert holds(found, expected), found
        thread = next(path for path, answer in expected.items() if answer["body"].get("messages")).split("/")[3]
        assert asked.ask("POST", "/v1/messages", {"thread": thread, "author": "ada", "body": 1}, key=ADMIN).status < 300
    settings = {f"PROGRESSDB_{name}": value for name, value in store_settings(daemon).items()}
    for words in (("check",), ("backup", "verify", release.base / "db/backups/monday")):
        done = forked.run("progressdb_server", *words, "--db", release.base / "db", env=os.environ | settings)
        assert done.returncode == 0, done


def test_a_store_in_postgresql_answers_as_before(release: Release, daemon: LiveDaemon) -> None:
    expected = release.expected["postgres"]
    with in_postgres(release.base, store_settings(daemon), release.base / SQL) as (asked, _):
        found = answers(asked, list(expected))
    assert holds(found, expected), found


def test_an_auditor_goes_on_with_its_tree(release: Release, daemon: LiveDaemon) -> None:
    config = f"--config={release.base / 'auditor.toml'}"
    before = json.loads((release.base / "auditor/state.json").read_text())
    with auditor(release.base), daemon.client() as kms:
        kms.create_dek_for_thread("after")
    for line in (1, before["size"], before["size"] + 1):
        proven = json.loads(say("minikms_auditor", "prove", str(line), config))
        assert json.loads(proven["line"])["event"]["seq"] == line
