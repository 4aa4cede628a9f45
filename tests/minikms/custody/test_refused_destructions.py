"""A destruction is refused before its tombstone, or carried out; other keys of its group are not concerned."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import StorageUnavailableError
from minikms.custody.destruction import Destroyed
from minikms.custody.rotation_backups import RotationBackups
from minikms.platform.files import open_directory
from tests.harness.disk_faults import refuse
from tests.harness.vaults import OpenedVault, opened_vault


def backup_of(one: OpenedVault, first: str, last: str) -> Path:
    [path] = (one.directory / "kms-deks-backup").glob(f"*/{first}-{last}.journal")
    return path


@pytest.mark.parametrize("cause", ["cut", "read-only", "no directory", "no journal"])
async def test_a_refused_destruction_leaves_the_key_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    """Alone, and in a group, of which it refuses no other key."""
    async with opened_vault(tmp_path / "d") as one:
        [kept] = await one.make(1)
        await one.rotate()
        [gone] = await one.make(1)
        await one.rotate()
        for key_id in (kept, gone):
            await one.vault.retire(key_id)
        before = one.keys([kept])
        bad = backup_of(one, kept, kept)
        whole = bad.read_bytes()
        with monkeypatch.context() as patch:
            if cause == "cut":
                os.truncate(bad, len(whole) - 700)
            elif cause == "read-only":  # not by its mode: root may write it all the same
                patch.setattr(os, "access", lambda name, *_, **__: name != bad.name)
            elif cause == "no directory":
                patch.setattr(RotationBackups, "files_of", refuse)
            else:
                patch.setattr(one.vault.journal, "forget", refuse)
            with pytest.raises(StorageUnavailableError, match="the key is not destroyed, and opens as before"):
                await one.vault.destroy(kept)
            if cause in {"cut", "read-only"}:
                assert list(one.vault.rotation_backups.unreadable) == [f"{bad.parent.name}/{bad.name}"]
                both = map(one.vault.destroy, (kept, gone))
                refused, receipt = await asyncio.gather(*both, return_exceptions=True)
                assert isinstance(refused, StorageUnavailableError)
                assert isinstance(receipt, Destroyed) and receipt[:2] == (1, [])
                assert one.backups(gone) == []
        bad.write_bytes(whole)
        assert one.keys([kept]) == before
        assert len(one.backups(kept)) == 2
        assert not one.vault.unfinished_destructions
    async with opened_vault(tmp_path / "d") as again:
        assert again.keys([kept]) == before
        assert (await again.vault.destroy(kept)).backups == 2
        assert again.vault.rotation_backups.unreadable == {}


async def test_a_backup_that_is_damaged_later_stops_only_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tombstone is there: a repetition in a group with other keys fails alone. What is left needs no KEK."""
    async with opened_vault(tmp_path / "d") as one:
        [stuck] = await one.make(1)
        await one.rotate()
        [other] = await one.make(1)
        for key_id in (stuck, other):
            await one.vault.retire(key_id)
        with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError, match="the key is destroyed"):
            patch.setattr(RotationBackups, "blank", refuse)
            await one.vault.destroy(stuck)
        bad = backup_of(one, stuck, stuck)
        os.truncate(bad, bad.stat().st_size - 700)
        both = map(one.vault.destroy, (stuck, other))
        failed, receipt = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(failed, StorageUnavailableError)
        assert isinstance(receipt, Destroyed) and receipt[:2] == (0, [])
        assert one.vault.unfinished_destructions == {stuck}
        await one.rotate()
        kept = (await one.pruning.prune(backups=False)).kept
        assert [each.version for each in kept] == [1, 2]
        assert all(each.why.endswith("see the warnings of /status") for each in kept), "a rotation would not help"
        bad.unlink()
        assert (await one.pruning.prune(backups=False)).destroyed == [1, 2]


async def test_a_destruction_reads_a_backup_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It blanks after the tombstone what it found before, and what a rotation has kept meanwhile."""
    read: list[str] = []

    def counted(path: Any, flags: int, *args: Any, open_now: Callable[..., int] = os.open, **named: Any) -> int:
        if str(path).endswith(".journal") and not flags & os.O_WRONLY:
            read.append(path)
        return open_now(path, flags, *args, **named)

    async with opened_vault(tmp_path / "d") as one:
        key_id, other = await one.make(2)
        await one.rotate()
        await one.vault.retire(key_id)
        backup = backup_of(one, *sorted((key_id, other))).read_bytes()
        append = one.vault.destroyed.append

        def slowly(staged: Any) -> None:
            (one.directory / "later").write_bytes(backup)
            directory = open_directory(one.directory)
            one.vault.rotation_backups.adopt(directory, "later", "20370101T000000", *sorted((key_id, other)))
            os.close(directory)
            append(staged)

        monkeypatch.setattr(one.vault.destroyed, "append", slowly)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", counted)
            assert (await one.vault.destroy(key_id)).backups == 2
        assert len(read) == 2
        assert one.backups(key_id) == []
        assert len(one.backups(other)) == 2
