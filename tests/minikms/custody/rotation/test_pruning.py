"""Pruning removes nothing that a file may still need, and no last copy of a key."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import KeyUnreadableError
from minikms.custody import deks, rotation_backups
from minikms.custody.journal_format import Change
from minikms.keys import dek
from minikms.platform import files
from minikms_daemon import rotation
from tests.harness.vaults import OpenedVault, opened_vault


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


async def test_a_retired_kek_is_destroyed_when_no_key_or_backup_needs_it(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(5)
        keys = one.keys(key_ids)
        await one.rotate()
        told: list[dict[str, int]] = []
        kept = await one.pruning.prune(backups=False, permit=lambda: told.append(dict(one.pruning.progress or {})))
        assert (told, one.pruning.progress) == ([{"read": 5, "total": 5}], None)
        assert (kept.destroyed, kept.backups_removed) == ([], 0)
        assert [why.version for why in kept.kept] == [1]
        assert "backup of a key is wrapped under it" in kept.kept[0].why
        gone = await one.pruning.prune(backups=True)
        assert (gone.destroyed, gone.kept, gone.backups_removed) == ([1], [], 5)
        assert one.kek_states() == {1: "destroyed", 2: "active"}
        assert one.keys(key_ids) == keys
    async with opened_vault(tmp_path / "d") as again:
        assert again.keys(key_ids) == keys
        with pytest.raises(KeyUnreadableError, match="KEK version 1"):
            again.vault.unlocked.kek(1)


async def test_a_pass_over_the_directory_lists_parts_of_it_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = sorted(await one.make(40))
        assert list(one.vault.store.list_ids(changed={"last"})) == [*key_ids, "last"]
        monkeypatch.setattr(deks, "SORTED_IDS", 16)
        listed = list(one.vault.store.list_ids())
        assert sorted(listed) == key_ids
        assert listed[:16] == sorted(listed[:16])


async def test_backups_are_removed_up_to_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)
        for stamp in ("20250101T000000", "20260101T000000"):
            await rotate_at(one, stamp, monkeypatch)
        assert (await one.pruning.prune(backups=True, before="20260101T000000")).backups_removed == 1
        assert one.vault.rotation_backups.stamps() == ["20260101T000000"]


def test_the_thread_of_the_disk_is_free_between_two_batch_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Creates need it too. Each job of a pruning removes at most one file of many backups."""
    jobs = Jobs(1)
    removed: list[int] = []

    def counted(directory: int, name: str) -> None:
        removed.append(jobs.begun)
        files.remove_file(directory, name)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = sorted(await one.make(6))
            for number in range(3):
                some = key_ids[2 * number : 2 * number + 2]
                contents = {key_id: one.file(key_id).read_bytes() for key_id in some}
                batch = [Change.summed(key_id, content, content) for key_id, content in contents.items()]
                async with one.vault.locks.hold(some) as held:
                    await one.vault.journal.replace(held, batch, "20250101T000000")
            one.vault.journal.flush()
            monkeypatch.setattr(rotation_backups, "remove_file", counted)
            pruning = rotation.Pruning(one.vault, reader=one.reader, disk=jobs)
            assert (await pruning.prune(backups=True)).backups_removed == 6
            assert one.vault.rotation_backups.stamps() == []

    with jobs:
        asyncio.run(main())
    assert len(set(removed)) == len(removed) == 3


class Jobs(ThreadPoolExecutor):
    """Counts the jobs."""

    begun = 0

    def submit(self, *given: Any, **named: Any) -> Future[Any]:
        self.begun += 1
        return super().submit(*given, **named)


async def test_backups_of_a_key_without_a_readable_file_stay_with_their_kek(tmp_path: Path) -> None:
    """They may be its last copy."""
    async with opened_vault(tmp_path / "d") as one:
        damaged, missing, sound = await one.make(3)
        keys = one.keys([damaged, missing])
        await one.rotate()
        damage(one.file(damaged))
        one.file(missing).unlink()
        pruned = await one.pruning.prune(backups=True)
        assert (pruned.destroyed, pruned.backups_removed) == ([], 1)
        assert one.backups(sound) == []
        for key_id in (damaged, missing):
            [backup] = one.backups(key_id)
            one.file(key_id).write_bytes(backup)
        assert one.keys([damaged, missing]) == keys


async def test_backups_of_a_destroyed_key_keep_no_kek(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        await one.rotate()
        [path] = (one.directory / "kms-deks-backup").rglob("*.journal")
        content = path.read_bytes()
        await one.vault.retire(key_id)
        await one.vault.destroy(key_id)
        path.write_bytes(content)  # put back, by a copy of the directory say
        assert (await one.pruning.prune(backups=True)).destroyed == [1]
        assert one.backups() == []


@pytest.mark.parametrize("where", ["a live file", "a backup"])
async def test_one_file_that_cannot_be_read_keeps_every_retired_kek(tmp_path: Path, where: str) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_id, _ = await one.make(2)
        await one.rotate()
        await one.rotate()
        first, *others = sorted((one.directory / "kms-deks-backup").rglob("*.journal"))
        for path in others if where == "a backup" else (first, *others):
            path.unlink()
        damage(one.file(key_id) if where == "a live file" else first)
        pruned = await one.pruning.prune(backups=False)
        assert pruned.destroyed == []
        assert [kept.version for kept in pruned.kept] == [1, 2]
        assert all("can't be read and may need it" in kept.why for kept in pruned.kept)


async def test_a_false_kek_version_in_a_file_keeps_the_true_kek(tmp_path: Path) -> None:
    """The file says version 2 but is wrapped under 1. Destroying 1 would turn a flipped digit into a lost key."""
    async with opened_vault(tmp_path / "d") as one:
        key_id, _ = await one.make(2)
        before = one.file(key_id).read_bytes()
        keys = one.keys([key_id])
        await one.rotate()
        for path in (one.directory / "kms-deks-backup").rglob("*.journal"):
            path.unlink()
        one.file(key_id).write_bytes(before.replace(b'"kek_version":1', b'"kek_version":2'))
        assert (await one.pruning.prune(backups=False)).destroyed == []
        one.file(key_id).write_bytes(before)
        assert one.keys([key_id]) == keys


async def test_the_newest_rotations_keep_their_backups_and_older_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_id, damaged = await one.make(2)
        for number in range(4):
            await rotate_at(one, f"2026010{number + 1}T000000", monkeypatch)
        damage(one.file(damaged))
        one.vault.unreadable.add(damaged, "truncated")
        assert await one.pruning.keep_rotations(2) == 2
        assert sorted(dek.parse(line, key_id).version for line in one.backups(key_id)) == [3, 4]
        assert len(one.backups(damaged)) == 4
        assert await one.pruning.keep_rotations(2) == 0


async def rotate_at(one: OpenedVault, stamp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rotation, "stamp", lambda _unix_ns: stamp)
        await one.rotate()


# --- files that are replaced while the directory is listed ----------------------------------------------------------


@contextmanager
def passed_over(one: OpenedVault, key_id: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """During the listing the key is retired, and the listing omits its file, as readdir(3p) allows."""
    loop = asyncio.get_running_loop()
    real = deks.list_names

    def list_names(directory: str) -> Iterator[str]:
        names = list(real(directory))
        if directory == one.vault.store.directory:
            asyncio.run_coroutine_threadsafe(one.vault.retire(key_id, again=True), loop).result()
            names.remove(deks.file_name(key_id))
        yield from names

    with monkeypatch.context() as patch:
        patch.setattr(deks, "list_names", list_names)
        yield


async def test_a_key_that_is_retired_while_the_directory_is_listed_keeps_its_kek(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key whose file was unreadable during the rotation and was repaired since is under the older KEK."""
    async with opened_vault(tmp_path / "d") as one:
        key_id, _ = await one.make(2)
        keys = one.keys([key_id])
        whole = one.file(key_id).read_bytes()
        damage(one.file(key_id))
        await one.rotate()
        one.file(key_id).write_bytes(whole)
        with passed_over(one, key_id, monkeypatch):
            pruned = await one.pruning.prune(backups=True)
        assert (pruned.destroyed, [why.version for why in pruned.kept]) == ([], [1])
        assert "a key is wrapped under it" in pruned.kept[0].why
        assert one.on_disk(key_id).state == "retired"
        assert one.keys([key_id]) == keys


async def test_a_key_that_is_retired_while_the_directory_is_listed_is_rewrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        await one.begin(None)
        running = one.rotation.running
        assert running is not None
        with passed_over(one, key_id, monkeypatch):
            assert await one.rotation.run_pass(running) == 1
        await one.rotation.run()
        assert (one.on_disk(key_id).state, one.on_disk(key_id).kek_version) == ("retired", 2)


async def test_backups_stay_when_more_files_are_damaged_than_can_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minikms.custody.deks.UNREADABLE_COUNT_MAX", 1)

    async with opened_vault(tmp_path / "d") as one:
        damaged = await one.make(2)
        await one.make(1)
        keys = one.keys(damaged)
        await rotate_at(one, "20250101T000000", monkeypatch)
        for key_id in damaged:
            damage(one.file(key_id))
        await one.rotate()
        await one.pruning.keep_rotations(1)
        for key_id in damaged:
            [backup] = one.backups(key_id)
            one.file(key_id).write_bytes(backup)
        assert one.keys(damaged) == keys


async def test_a_backup_that_cannot_be_read_does_not_stop_a_rotation(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        await one.begin(None)
        running = one.rotation.running
        assert running is not None
        damaged = one.directory / "kms-deks-backup" / running.stamp / f"{key_id}-{key_id}.journal"
        damaged.mkdir(parents=True)
        async with asyncio.timeout(60):
            await one.rotation.run()
        assert one.on_disk(key_id).kek_version == 2
        [written] = set(damaged.parent.iterdir()) - {damaged}
        assert written.name == f"{key_id}-{key_id}.1.journal"
