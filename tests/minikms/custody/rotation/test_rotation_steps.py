"""The steps of a KEK rotation, and their interruptions: no key is lost, and the next attempt completes it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from minikms.custody.keyring_file import KeyringFile
from minikms.errors import (
    ArenaFullError,
    ConflictError,
    KeyUnreadableError,
    StartError,
    StorageUnavailableError,
)
from minikms.keys import keyring
from tests.harness.vaults import key_file, opened_vault
from tests.minikms.custody.disk_faults import refuse

pytestmark = pytest.mark.usefixtures("quick_rotation")


NEW_ROOT = bytes(range(100, 132))
OTHER_ROOT = bytes(range(50, 82))


# --- a rotation that nothing disturbs -----------------------------------------------------------------------------


def test_every_key_is_rewrapped_keeps_its_value_and_leaves_a_backup(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(20)
            before, files = one.keys(key_ids), {key_id: one.file(key_id).read_bytes() for key_id in key_ids}
            await one.rotate()
            assert one.keks_on_disk(key_ids) == {2}
            assert {one.on_disk(key_id).version for key_id in key_ids} == {2}
            assert one.keys(key_ids) == before
            assert one.kek_states() == {1: "retired", 2: "active"}
            assert one.rotation.rewrapped == 20
            assert one.vault.index.by_kek[2] == 20
            for key_id in key_ids:
                [backup] = one.backups(key_id)
                assert backup.read_bytes() == files[key_id]

    asyncio.run(main())


def test_two_rotations_in_one_second_leave_two_backups_of_each_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            await one.rotate()
            await one.rotate()
            for key_id in key_ids:
                contents = [backup.read_bytes() for backup in one.backups(key_id)]
                assert len(contents) == len(set(contents)) == 2

    asyncio.run(main())


def test_keys_made_meanwhile_are_wrapped_under_the_new_version_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            old = await one.make(30)
            creating = asyncio.create_task(one.make(30))
            await asyncio.sleep(0)
            await one.rotation.begin(None)
            new = await one.make(10)
            await one.rotation.run()
            assert one.keks_on_disk(new) == {2}
            assert one.keks_on_disk([*old, *await creating]) == {2}

    asyncio.run(main())


def test_keys_retired_or_destroyed_during_a_rotation_stay_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(40)
            gone, retired = key_ids[:10], key_ids[10:20]
            for key_id in gone:
                await one.vault.retire(key_id)
            await asyncio.gather(
                one.rotate(),
                *(one.vault.destroy(key_id) for key_id in gone),
                *(one.vault.retire(key_id) for key_id in retired),
            )
            assert one.keks_on_disk(key_ids[10:]) == {2}
            assert {one.on_disk(key_id).state for key_id in retired} == {"retired"}
            assert {one.on_disk(key_id).state for key_id in key_ids[20:]} == {"active"}
            assert not any(one.file(key_id).exists() or one.backups(key_id) for key_id in gone)

    asyncio.run(main())


# --- who may begin what -------------------------------------------------------------------------------------------


def test_a_repeated_request_joins_the_running_rotation(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            new, other = one.slot_of(NEW_ROOT), one.slot_of(OTHER_ROOT)
            assert (await one.rotation.begin(None)).newly
            assert not (await one.rotation.begin(None)).newly
            with pytest.raises(ConflictError, match="another rotation is running"):
                await one.rotation.begin(new)
            await one.rotation.run()
            begun = await one.rotation.begin(new)
            assert begun.newly
            assert await one.rotation.begin(new) == (False, begun.slot_id)
            for root in (other, None):
                with pytest.raises(ConflictError, match="is running"):
                    await one.rotation.begin(root)
            await one.rotation.run()
            assert await one.rotation.begin(new) == (False, begun.slot_id)
            assert one.rotation.running is None
            assert one.kek_states() == {1: "retired", 2: "retired", 3: "active"}

    asyncio.run(main())


def test_a_root_key_is_never_used_twice(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            first = one.slot_of(bytes.fromhex(key_file(tmp_path / "d").read_text()))
            assert not (await one.rotation.begin(first)).newly  # it is the newest: nothing to do
            new = one.slot_of(NEW_ROOT)
            await one.rotate(new)
            with pytest.raises(ConflictError, match="not the newest"):
                await one.rotation.begin(first)
            await one.rotation.drop_older_slots(one.vault.keyring.body.slots[-1].slot_id)
            with pytest.raises(ConflictError, match="was rotated away before"):
                await one.rotation.begin(first)

    asyncio.run(main())


def test_a_full_keyring_refuses_a_rotation_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "KEKS_OPEN_COUNT_MAX", 2)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            await one.rotate()
            used = one.arena.in_use
            with pytest.raises(ConflictError, match="/kek/prune"):
                await one.rotation.begin(None)
            assert one.arena.in_use == used
            assert (await one.pruning.prune(backups=True)).destroyed == [1]
            await one.rotate()

    asyncio.run(main())


def test_no_rotation_begins_while_it_is_excluded(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            async with one.rotation.excluded():
                beginning = asyncio.create_task(one.rotation.begin(None))
                await asyncio.sleep(0.02)
                assert one.rotation.running is None
            assert (await beginning).newly
            with pytest.raises(ConflictError, match="a rotation is running"):
                async with one.rotation.excluded():
                    pass

    asyncio.run(main())


# --- beginnings that fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [None, NEW_ROOT])
def test_a_begin_that_the_disk_refuses_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: bytes | None
) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            given = None if root is None else one.slot_of(root)
            used, body, keys = one.arena.in_use, one.vault.keyring.body, one.keys(key_ids)
            used += len(key_ids)
            with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
                patched.setattr(KeyringFile, "store_now", refuse)
                await one.rotation.begin(given)
            assert one.vault.keyring.body is body
            assert one.arena.in_use == used
            await one.make(1)
            await one.rotate(given)
            assert one.keys(key_ids) == keys
            assert one.kek_states() == {1: "retired", 2: "active"}

    asyncio.run(main())


def test_a_begin_that_failed_after_it_reached_the_disk_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only the last sync fails, the new file may be there until a power loss: both files must work."""
    store_now = KeyringFile.store_now

    def stored_but_refused(self: KeyringFile, data: bytes) -> None:
        store_now(self, data)
        refuse()

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            keys = one.keys(key_ids)
            with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
                patched.setattr(KeyringFile, "store_now", stored_but_refused)
                await one.rotation.begin(one.slot_of(NEW_ROOT))
        async with opened_vault(tmp_path / "d") as again:  # under the old root; the file has both
            assert again.rotation.running is not None
            await again.rotation.run()
            assert again.keys(key_ids) == keys
        async with opened_vault(tmp_path / "d") as one:
            with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
                patched.setattr(KeyringFile, "store_now", stored_but_refused)
                await one.rotation.begin(None)
            later = await one.make(1)
            [destroyed] = await one.make(1)
            await one.vault.retire(destroyed)
            await one.vault.destroy(destroyed)  # writes the keyring
        async with opened_vault(tmp_path / "d") as again:
            assert again.rotation.running is None
            assert len(again.keys([*key_ids, *later])) == 4

    asyncio.run(main())


def test_an_arena_without_room_for_new_keys_refuses_and_keeps_none(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d", slots=12) as one:
            root = one.slot_of(NEW_ROOT)
            taken = [one.arena.allocate() for _ in range(one.arena.slots - one.arena.in_use - 1)]
            used = one.arena.in_use
            with pytest.raises(ArenaFullError):
                await one.rotation.begin(root)
            assert one.arena.in_use == used
            for slot in taken:
                slot.release()
            await one.rotate(root)

    asyncio.run(main())


# --- root keys ----------------------------------------------------------------------------------------------------


def test_both_roots_open_until_the_older_slots_are_dropped(tmp_path: Path) -> None:
    old, new = key_file(tmp_path / "d"), tmp_path / "new.key"
    new.touch(0o600)
    new.write_text(NEW_ROOT.hex())

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            keys = one.keys(key_ids)
            await one.rotate(one.slot_of(NEW_ROOT))
        for key in (old, new):
            async with opened_vault(tmp_path / "d", key=key) as one:
                assert one.keys(key_ids) == keys
        async with opened_vault(tmp_path / "d", key=new) as one:
            older, newest = one.vault.keyring.body.slots
            with pytest.raises(ConflictError):
                await one.rotation.drop_older_slots(older.slot_id)
            assert await one.rotation.drop_older_slots(newest.slot_id) == [older.fingerprint]
            assert await one.rotation.drop_older_slots(newest.slot_id) == []
        with pytest.raises(StartError, match="rotated away on"):
            async with opened_vault(tmp_path / "d", key=old):
                pass
        async with opened_vault(tmp_path / "d", key=new) as one:
            assert one.keys(key_ids) == keys

    asyncio.run(main())


def test_a_key_under_an_unknown_kek_version_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [key_id] = await one.make(1)
            older = (one.directory / "keyring.json").read_bytes()
            await one.rotate()
        (tmp_path / "d" / "keyring.json").write_bytes(older)
        async with opened_vault(tmp_path / "d") as again:
            with pytest.raises(KeyUnreadableError, match="the keyring is older than the key"):
                again.vault.opened(key_id)
            await again.indexing.run()
            assert set(again.vault.unreadable.listed()) == {key_id}

    asyncio.run(main())
