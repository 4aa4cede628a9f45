"""What `minikms doctor` says of the root keys of a keyring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.cli.doctor import examine
from minikms.custody.files import unix_seconds
from minikms.keys.keyring import ROOT_TEST_DAYS_MAX, ShareSet
from minikms.memory.arena import SecretArena
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
