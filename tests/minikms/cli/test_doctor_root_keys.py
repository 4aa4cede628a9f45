"""What `minikms doctor` says of a keyring and of its root keys."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.cli.doctor import examine
from minikms.keys.keyring import ROOT_TEST_DAYS_MAX, ShareSet
from minikms.memory.arena import SecretArena
from minikms.platform.clock import unix_seconds
from tests.minikms.keys import keyrings

DAY_SECONDS = 86_400


@pytest.fixture
def arena() -> Iterator[SecretArena]:
    with keyrings.arena() as made:
        yield made


def told(directory: Path, data: bytes, *, days: float = 0) -> list[str]:
    """The findings about root keys, this many days after their test."""
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / "keyring.json").write_bytes(data)
    now = unix_seconds(keyrings.AT) + days * DAY_SECONDS
    findings = [found for found in examine(str(directory), None, now=now) if found.area == "root key"]
    assert all(found.level == "advice" for found in findings)
    return [found.what for found in findings if "was given" not in found.what]


@pytest.mark.parametrize(("version", "advice"), [(4, "make a new one"), (6, "Start the newer version")])
def test_no_backup_is_to_replace_a_keyring_of_another_version(
    arena: SecretArena, tmp_path: Path, version: int, advice: str
) -> None:
    """Archives of its time are of another version too."""
    unlocked = keyrings.fresh(arena)
    data = unlocked.encode(unlocked.body).replace(b'"version":5', b'"version":%d' % version, 1)
    (tmp_path / "keyring.json").write_bytes(data)
    [found] = [each for each in examine(str(tmp_path), None, now=0) if each.area == "keyring"]
    assert advice in found.what
    assert "restore" not in found.what + found.do


def test_a_single_root_key_without_a_recovery_slot_is_named(arena: SecretArena, tmp_path: Path) -> None:
    unlocked = keyrings.fresh(arena)
    alone, unkept = told(tmp_path / "d", unlocked.encode(unlocked.body))
    assert "only one root key opens the keyring" in alone
    assert "as shares or as a passphrase" in unkept
    keyrings.add(unlocked, keyrings.NEW_ROOT)
    assert told(tmp_path / "d", unlocked.encode(unlocked.body)) == [unkept]


@pytest.mark.parametrize("provider", ["shares", "passphrase"])
def test_a_recovery_slot_leaves_nothing_to_say(arena: SecretArena, tmp_path: Path, provider: str) -> None:
    unlocked = keyrings.fresh(arena)
    shares = ShareSet("00" * 8, 2, 2, (bytes(32), bytes(32))) if provider == "shares" else None
    keyrings.add(unlocked, keyrings.NEW_ROOT, provider, shares)
    assert told(tmp_path / "d", unlocked.encode(unlocked.body)) == []


def test_a_root_key_that_was_not_tested_for_90_days_is_named(arena: SecretArena, tmp_path: Path) -> None:
    unlocked = keyrings.fresh(arena)
    slot_id = keyrings.add(unlocked, keyrings.NEW_ROOT, "passphrase")
    data = unlocked.encode(unlocked.body)
    assert told(tmp_path / "d", data, days=ROOT_TEST_DAYS_MAX - 1) == []
    [untested] = told(tmp_path / "d", data, days=ROOT_TEST_DAYS_MAX)
    assert all(text in untested for text in ("s1 (file", f"{slot_id} (passphrase", keyrings.AT[:10]))
