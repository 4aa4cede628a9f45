"""The change of the audit key of a member of a replicated key service, and what a lost connection leaves of it."""

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Never

import msgspec
import pytest

from minikms.api.errors import StandbyError, StartError, StorageUncertainError
from minikms.audit import AuditLog, Event, ExpectedLog
from minikms.audit.queries import verify_directory
from minikms.crypto.aead import NonceSource
from minikms.custody.keyring_file import KeyringFile, StoredKeyring
from minikms.custody.replica_file import Mark
from minikms.datadir import audit_keys
from minikms.keys import keyring
from minikms.keys.keyring import AuditState, Member
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from tests.harness.disk_faults import stored_but_refused, stored_once
from tests.harness.members import opened_member, write_mark
from tests.harness.replica_database import ReplicaDatabase
from tests.harness.vaults import OpenedVault, copied_vault, opened_vault
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import AT, NEW_ROOT


async def as_member(one: OpenedVault) -> None:
    """The vault becomes that of the first host of a key service, and can lose a root key."""
    unlocked = one.vault.unlocked
    first = Member("m1", "a", "s1", AT, 1)
    await one.vault.keyring.change(lambda body: keyring.next_epoch(body, at=AT, members=(first,)))
    unlocked.member_id = "m1"
    with one.slot_of(NEW_ROOT) as root:
        await one.vault.keyring.change(
            lambda body: keyring.next_epoch(
                body, at=AT, slots=(*body.slots, unlocked.make_slot(root.view, "file", slot_id="s9", at=AT))
            )
        )


def member(one: OpenedVault) -> Member:
    found = one.vault.keyring.body.member("m1")
    assert found is not None
    return found


def versions(audit: AuditState) -> list[int]:
    return [key.version for key in audit.audit_keys]


async def change_key_version(one: OpenedVault) -> None:
    """Removes a root key, as if another member had done it."""
    await one.removal.remove(lambda body: {"s9"})
    assert (member(one).key_version, member(one).unconfirmed, one.audit.key_version) == (2, False, 2)
    former = msgspec.structs.replace(member(one), key_version=1)
    await one.vault.keyring.change(lambda body: keyring.next_epoch(body, at=AT, members=(former,)))


def keys_of_lines(directory: Path) -> list[object]:
    """The audit keys that lines of the log have announced."""
    lines = map(json.loads, (directory / "minikms-audit.log").read_text().splitlines())
    return [line["event"]["facts"]["next_key"] for line in lines if line["event"]["type"] == "audit_key"]


async def test_a_take_over_raises_the_epoch_and_keeps_the_audit_key(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await as_member(one)
        before = one.vault.keyring.body
        await one.removal.take_over("s9", oldest=0)
        body = one.vault.keyring.body
        assert (body.epoch, versions(one.vault.unlocked.audit)) == (before.epoch + 1, [1])
        assert body.slots[1].tested_at > AT == before.slots[1].tested_at


async def test_a_take_over_after_a_removal_changes_the_audit_key(tmp_path: Path) -> None:
    """Of a root key, by another member: the removed one could open the former audit key."""
    async with opened_vault(tmp_path / "d") as one:
        await as_member(one)
        await change_key_version(one)
        await one.removal.take_over("s1", oldest=2)
        assert (member(one).key_version, member(one).unconfirmed, one.audit.key_version) == (2, False, 3)
        assert versions(one.vault.unlocked.audit) == [2, 3], "no line is under the first one"
        await one.removal.take_over("s1", oldest=0)
        assert one.audit.key_version == 3
    assert keys_of_lines(one.directory) == [2, 3]


async def stands_by(stored: StoredKeyring) -> Never:
    raise StandbyError


async def lost(one: OpenedVault, changing: Awaitable[None], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A change whose answer was lost, after which the member serves no more and writes a line. The keyring of the
    database.
    """
    with monkeypatch.context() as patched:
        patched.setattr(KeyringFile, "store_now", stored_but_refused)
        patched.setattr(StoredKeyring, "store_again", stands_by)
        with pytest.raises(StorageUncertainError):
            await changing
        while not one.log.writable:
            await asyncio.sleep(0)
            one.log.tick()
    one.log.add(Event(type="status", actor="t"))
    one.log.commit(durable=True)
    return (one.directory / "keyring.json").read_bytes()


async def test_a_start_leaves_out_an_audit_key_that_never_came_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the database got it before a crash. Once the keyring says that it is in use, the log has to be under it."""
    async with opened_vault(tmp_path / "d") as one:
        await as_member(one)
        data = await lost(one, one.removal.remove(lambda body: {"s9"}), monkeypatch)
        copied_vault(one, tmp_path / "copy")
        root = memoryview(bytes.fromhex(one.key.read_text()))
        with SecretArena(64, force_fallback=True) as arena:
            unlocked, _ = UnlockedKeyring.open(arena, root, data, nonces=NonceSource().next, member_id="m1")
            assert versions(unlocked.audit) == [1, 2]
            log = AuditLog(str(tmp_path / "copy"), audit_keys(unlocked), expected=ExpectedLog(True))
            assert log.writer.key.version == 1
            log.close()
            unlocked.body = keyring.confirmed(unlocked.body, "m1")
            with pytest.raises(StartError, match="under audit key version 1, but version 2 was introduced"):
                AuditLog(str(tmp_path / "copy"), audit_keys(unlocked), expected=ExpectedLog(True))
            unlocked.release()


async def test_a_take_over_replaces_an_audit_key_that_never_came_to_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await as_member(one)
        await change_key_version(one)
        data = await lost(one, one.removal.take_over("s1", oldest=0), monkeypatch)
        unlocked = one.vault.unlocked
        keyrings.adopt(unlocked, unlocked.advance(data))
        assert (versions(unlocked.audit), one.audit.key_version) == ([1, 2, 3], 2)
        await one.removal.take_over("s1", oldest=0)
        assert (versions(unlocked.audit), one.audit.key_version) == ([1, 2, 4], 4)
        one.log.sync.fdatasync()
        assert verify_directory(str(one.directory), audit_keys(unlocked).trust()).findings == []
    assert keys_of_lines(one.directory) == [2, 4]


async def test_a_crash_before_the_confirmation_completes_at_the_next_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await as_member(one)
        with monkeypatch.context() as patched:
            patched.setattr(KeyringFile, "store_now", stored_once(KeyringFile.store_now))
            await one.removal.remove(lambda body: {"s9"})
        assert (member(one).unconfirmed, one.audit.key_version) == (True, 2)
        await one.removal.take_over("s1", oldest=0)
        assert (member(one).unconfirmed, one.audit.key_version) == (False, 2)


async def test_a_take_over_whose_answer_was_lost_is_repeated_after_following(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await as_member(one)
        await change_key_version(one)
    write_mark(tmp_path / "d", Mark(member_id="m1", name="a", begins=True))
    async with opened_member(tmp_path / "d", ReplicaDatabase()) as first:
        await first.serve()
        with monkeypatch.context() as patched:
            patched.setattr(first.directory, "confirm", lambda number: first.directory.stop_serving())
            with pytest.raises(StorageUncertainError):
                await first.one.removal.take_over("s1", oldest=0)
        await first.stop()
        await first.follow()
        first.one.log.add(Event(type="status", actor="t"))
        first.one.log.commit(durable=True)
        unlocked = first.vault.unlocked
        assert (versions(unlocked.audit), first.one.audit.key_version) == ([1, 2, 3], 2)
        await first.serve()
        await first.one.removal.take_over("s1", oldest=0)
        assert (versions(unlocked.audit), first.one.audit.key_version) == ([1, 2, 4], 4)
        assert (member(first.one).unconfirmed, member(first.one).key_version) == (False, 2)
