"""Batch backups: lines are found by the names of their files, blanked for destroyed keys, and pruned."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import KeyUnreadableError, StorageUnavailableError
from minikms.custody import batch_backups, files, rotation_backups, vault
from minikms.custody.batch_backups import BLANK, LINES_COUNT_MAX, BatchBackups, KeysWithin, Line
from minikms.keys.dek import FILE_BYTES
from tests.harness.vaults import OpenedVault, opened_vault
from tests.minikms.custody.disk_faults import failing, failing_os, refuse

VECTORS = Path(__file__).parents[2] / "vectors"
STAMP, LATER = "20260101T000000", "20260201T000000"


def key_id(number: int) -> str:
    return f"k_01jd{number:022d}"


def line(number: int, text: str = "") -> Line:
    content = b'{"id":"%s","text":"%s"}' % (key_id(number).encode(), text.encode())
    return Line(key_id(number), content.ljust(FILE_BYTES - 1) + b"\n")


def in_all_files(directory: Path, number: int) -> int:
    needle = b'"id":"%s"' % key_id(number).encode()
    return sum(path.read_bytes().count(needle) for path in directory.rglob("*") if path.is_file())


def contents(backups: BatchBackups) -> list[list[str]]:
    return [[one.key_id for one in backups.read(file)] for file in backups.listed()]


def blank(backups: BatchBackups, *key_ids: str, anew: tuple[str, ...] = ()) -> list[int]:
    """The number of lines of each key."""
    counts = backups.blank(backups.files_of(key_ids), anew=anew)
    return [counts[key_id] for key_id in key_ids]


def inodes(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in directory.rglob("*.jsonl")}


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_one_file_sorted_by_key_and_named_by_its_ends(tmp_path: Path) -> None:
    backups = BatchBackups(str(tmp_path))
    backups.write(STAMP, [line(3), line(1), line(2)])
    [path] = (tmp_path / STAMP).iterdir()
    assert path.name == f"{key_id(1)}-{key_id(3)}.jsonl"
    assert path.read_bytes() == b"".join(line(number).content for number in (1, 2, 3))
    assert contents(BatchBackups(str(tmp_path))) == contents(backups) == [[key_id(1), key_id(2), key_id(3)]]


def test_the_same_batch_again_is_one_file_and_other_contents_are_two(tmp_path: Path) -> None:
    backups = BatchBackups(str(tmp_path))
    for text in ("", "", "changed"):
        backups.write(STAMP, [line(1, text), line(2)])
    assert sorted(path.name for path in (tmp_path / STAMP).iterdir()) == [
        f"{key_id(1)}-{key_id(2)}.1.jsonl",
        f"{key_id(1)}-{key_id(2)}.jsonl",
    ]
    assert len(list(backups.listed())) == 2


def test_a_batch_that_the_disk_refuses_can_be_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backups = BatchBackups(str(tmp_path))
    for call in ("mkdir", "write", "rename", "fsync"):
        with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError):
            backups.write(LATER if call == "mkdir" else STAMP, [line(1)])
        backups.write(STAMP, [line(1)])
    assert contents(backups) == [[key_id(1)]]


def test_the_known_batch_is_read_and_written_in_the_same_bytes(tmp_path: Path) -> None:
    known = json.loads((VECTORS / "formats.json").read_text())["dek"]["batch_backup"]
    path = tmp_path / known["name"]
    path.parent.mkdir()
    path.write_text(known["file"])
    backups = BatchBackups(str(tmp_path))
    [file] = backups.listed()
    lines = backups.read(file)
    assert [found.key_id for found in lines] == known["key_ids"]
    path.unlink()
    backups.write(file.stamp, lines)
    assert path.read_text() == known["file"].replace(BLANK.decode(), "")


# --- erasure --------------------------------------------------------------------------------------------------------


def test_a_destroyed_key_is_in_no_line_and_its_neighbours_stay(tmp_path: Path) -> None:
    backups = BatchBackups(str(tmp_path))
    for stamp in (STAMP, LATER):
        backups.write(stamp, [line(1), line(2), line(3)])
        backups.write(stamp, [line(4), line(5)])
    before = sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))
    assert blank(backups, key_id(2), key_id(9), key_id(5)) == [2, 0, 2]
    assert blank(backups, key_id(2)) == [0]
    assert [in_all_files(tmp_path, number) for number in (1, 2, 3, 4, 5)] == [2, 0, 2, 2, 0]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl")) == before
    assert contents(backups) == [[key_id(1), key_id(3)], [key_id(4)]] * 2


def test_a_line_that_cannot_be_blanked_is_an_error_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backups = BatchBackups(str(tmp_path))
    backups.write(STAMP, [line(1), line(2)])
    for call in ("pwrite", "fsync"):
        with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError):
            blank(backups, key_id(1))
    blank(backups, key_id(1))
    assert in_all_files(tmp_path, 1) == 0
    [path] = (tmp_path / STAMP).iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageUnavailableError):
        blank(backups, key_id(2))


@pytest.mark.parametrize("stamps", [[STAMP], [f"2026010{number}T000000" for number in range(1, 6)]])
def test_a_file_whose_sync_failed_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamps: list[str]
) -> None:
    """Its page cache has the blank line, and a second sync would succeed without it. Of one file, and of a group."""
    monkeypatch.setattr(batch_backups, "syncfs_reports", lambda _directory: True)
    backups = BatchBackups(str(tmp_path))
    for stamp in stamps:
        backups.write(stamp, [line(1), line(2)])
    before = inodes(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
        patch.setattr(batch_backups, "syncfs", failing(files.syncfs, at=1))
        patch.setattr(os, "fsync", failing(os.fsync, at=1))
        blank(backups, key_id(1))
    assert in_all_files(tmp_path, 1) == 0, "in the page cache"
    assert blank(backups, key_id(1)) == [0]
    after = inodes(tmp_path)
    assert all(after[path] != before[path] for path in before)
    assert [in_all_files(tmp_path, number) for number in (1, 2)] == [0, len(stamps)]
    blank(backups, key_id(2))
    assert inodes(tmp_path) == after


def test_a_removal_that_an_earlier_run_began_writes_the_files_anew(tmp_path: Path) -> None:
    """Nobody knows whether the blank line that the page cache has is on the disk."""
    BatchBackups(str(tmp_path)).write(STAMP, [line(1), line(2)])
    [path] = (tmp_path / STAMP).iterdir()
    path.write_bytes(BLANK + line(2).content)
    inode = path.stat().st_ino
    assert blank(BatchBackups(str(tmp_path)), key_id(1), anew=(key_id(1),)) == [0]
    assert path.stat().st_ino != inode
    assert path.read_bytes() == BLANK + line(2).content


@pytest.mark.parametrize("at", [0, 512])
def test_a_torn_blank_line_is_blanked_by_the_next_attempt(tmp_path: Path, at: int) -> None:
    backups = BatchBackups(str(tmp_path))
    backups.write(STAMP, [line(1, "secret" * 90), line(2)])
    [path] = (tmp_path / STAMP).iterdir()
    torn = bytearray(path.read_bytes())
    torn[at : at + 512] = BLANK[at : at + 512]
    path.write_bytes(torn)
    assert blank(backups, key_id(1)) == [1 if at else 0]
    assert path.read_bytes() == BLANK + line(2).content


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_file_that_a_failed_write_left_in_place_is_blanked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    backups = BatchBackups(str(tmp_path))
    backups.write(STAMP, [line(9)])
    at = 2 if call == "fsync" else 1  # the sync of the directory, after the rename
    with failing_os(monkeypatch, call, at=at), pytest.raises(StorageUnavailableError):
        backups.write(STAMP, [line(1), line(2)])
    assert in_all_files(tmp_path, 1) == (call == "fsync")
    assert blank(backups, key_id(1)) == [int(call == "fsync")]
    assert in_all_files(tmp_path, 1) == 0


def test_a_file_that_cannot_be_read_keeps_no_other_line_from_being_blanked(tmp_path: Path) -> None:
    """It is an error of the keys that it may hold, until somebody removes it."""
    backups = BatchBackups(str(tmp_path))
    for stamp in (STAMP, LATER):
        backups.write(stamp, [line(1), line(2)])
    [bad] = (tmp_path / STAMP).iterdir()
    os.truncate(bad, LINES_COUNT_MAX * FILE_BYTES + 1)
    with pytest.raises(StorageUnavailableError, match=f"a rotation backup of {STAMP} may hold the key") as refused:
        blank(backups, key_id(1))
    assert "k_" not in str(refused.value), "whoever destroys one key need not know of another"
    assert in_all_files(tmp_path / LATER, 1) == 0
    assert list(backups.unreadable) == [f"{STAMP}/{bad.name}"]
    assert blank(backups, key_id(9)) == [0]
    assert sum(backups.prune(before=None, keeps=lambda key: False)) == 1, "the others are pruned"
    bad.unlink()
    assert blank(backups, key_id(1)) == [0]
    assert backups.unreadable == {}


# --- pruning --------------------------------------------------------------------------------------------------------


def test_pruning_removes_older_stamps_and_keeps_needed_lines(tmp_path: Path) -> None:
    backups = BatchBackups(str(tmp_path))
    backups.write(STAMP, [line(1), line(2)])
    backups.write(STAMP, [line(3)])
    backups.write(LATER, [line(1)])
    assert sum(backups.prune(before=LATER, keeps=lambda key: key == key_id(2))) == 2
    assert contents(backups) == [[key_id(2)], [key_id(1)]]
    assert sum(backups.prune(before=None, keeps=lambda key: False)) == 2
    assert backups.stamps() == []
    assert os.listdir(tmp_path) == []


def test_a_line_without_a_key_id_is_listed_and_pruned(tmp_path: Path) -> None:
    backups = BatchBackups(str(tmp_path))
    backups.write(STAMP, [line(1), line(2)])
    [path] = (tmp_path / STAMP).iterdir()
    path.write_bytes(b"\0" * 10 + path.read_bytes()[10:])
    assert contents(backups) == [["", key_id(2)]]
    assert sum(backups.prune(before=None, keeps=lambda key: True)) == 1
    assert contents(backups) == [[key_id(2)]]


def test_a_file_that_cannot_be_read_is_an_error_of_that_file(tmp_path: Path) -> None:
    backups = BatchBackups(str(tmp_path))
    backups.write(STAMP, [line(1)])
    [file] = backups.listed()
    path = tmp_path / STAMP / file.name
    path.unlink()
    assert backups.read(file) == []
    path.mkdir()
    with pytest.raises(KeyUnreadableError, match=f"{STAMP}/{key_id(1)}"):
        backups.read(file)


# --- in a data directory --------------------------------------------------------------------------------------------


def keep_in_batch(one: OpenedVault, key_ids: list[str], stamp: str = STAMP) -> None:
    """As a rotation under that stamp does."""
    one.vault.rotation_backups.batches.write(stamp, [Line(key, one.file(key).read_bytes()) for key in key_ids])


def rotation_stamp(one: OpenedVault) -> str:
    [stamp] = set(one.vault.rotation_backups.batches.stamps()) - {STAMP, LATER}
    return stamp


def test_a_receipt_counts_the_lines_and_none_is_left(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(4)
            for stamp in (STAMP, LATER):
                keep_in_batch(one, key_ids, stamp)
            gone, *others = key_ids
            await one.vault.retire(gone)
            assert await one.vault.destroy(gone) == 2
            files = [path for path in (tmp_path / "d" / "kms-deks-backup").rglob("*") if path.is_file()]
            assert len(files) == 2
            for path in files:
                assert gone.encode() not in path.read_bytes()
                assert all(key.encode() in path.read_bytes() for key in others)

    asyncio.run(main())


def test_a_start_blanks_the_lines_of_a_destruction_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            keep_in_batch(one, key_ids)
            await one.vault.retire(key_ids[0])
            with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
                patch.setattr(BatchBackups, "blank", refuse)
                await one.vault.destroy(key_ids[0])
            assert one.file(key_ids[0]).exists()
        async with opened_vault(tmp_path / "d") as again:
            await again.indexing.run()
            assert not again.file(key_ids[0]).exists()
            [file] = again.vault.rotation_backups.batches.listed()
            assert {found.key_id for found in again.vault.rotation_backups.batches.read(file)} == set(key_ids[1:])

    asyncio.run(main())


def test_a_repeated_destruction_trusts_no_sync_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same run and in the next one, which knows only that the key still has a file."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            keep_in_batch(one, key_ids)
            for key_id in key_ids:
                await one.vault.retire(key_id)
            [path] = (one.directory / "kms-deks-backup" / STAMP).iterdir()
            for key_id in key_ids[:2]:
                with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
                    patch.setattr(BatchBackups, "blank", fails_after(BatchBackups.blank))
                    await one.vault.destroy(key_id)
            inode = path.stat().st_ino
            assert await one.vault.destroy(key_ids[0]) == 0
            assert path.stat().st_ino != inode
            inode = path.stat().st_ino
            assert await one.vault.destroy(key_ids[0]) == 0
            assert path.stat().st_ino == inode, "its removal was completed"
        async with opened_vault(tmp_path / "d") as again:
            await again.indexing.run()
            assert path.stat().st_ino != inode
            assert path.read_bytes().count(BLANK) == 2

    asyncio.run(main())


def fails_after(blank: Callable[..., object]) -> Callable[..., object]:
    def failing(*arguments: object, **named: object) -> object:
        blank(*arguments, **named)
        raise StorageUnavailableError("the sync failed")

    return failing


def test_a_start_removes_the_temporary_files_of_a_batch_before_it_answers(tmp_path: Path) -> None:
    """Those of a journal and of a batch backup have the contents of many keys."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [key_id] = await one.make(1)
            keep_in_batch(one, [key_id])
            await one.vault.retire(key_id)
            content = one.file(key_id).read_bytes()
        backups = one.directory / "kms-deks-backup"
        folders = (one.directory, backups / STAMP, backups, one.directory / "kms-deks")
        for folder in folders:
            (folder / ".tmp-0123456789abcdef-7").write_bytes(2 * content)
        (one.directory / ".tmp-another").mkdir()
        async with opened_vault(tmp_path / "d") as again:
            assert [len(list(folder.glob(".tmp-0*"))) for folder in folders] == [0, 0, 1, 1]
            await again.vault.destroy(key_id)
            paths = [path for folder in folders for path in folder.iterdir() if path.is_file()]
            assert not [path for path in paths if content[:100] in path.read_bytes()]

    asyncio.run(main())


def test_no_key_is_destroyed_while_a_temporary_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of this run, whose write and whose removal failed."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_id, other = await one.make(2)
            await one.vault.retire(key_id)
            with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
                patch.setattr(os, "rename", failing(os.rename, at=1))
                patch.setattr(os, "unlink", failing(os.unlink, at=1))
                keep_in_batch(one, [key_id, other])
            folder = one.directory / "kms-deks-backup" / STAMP
            assert in_all_files_of(folder, key_id)
            with failing_os(monkeypatch, "unlink"), pytest.raises(StorageUnavailableError, match="temporary files"):
                await one.vault.destroy(key_id)
            await one.vault.destroy(key_id)
            assert not in_all_files_of(folder, key_id)

    asyncio.run(main())


def in_all_files_of(directory: Path, key_id: str) -> bool:
    return any(key_id.encode() in path.read_bytes() for path in directory.iterdir())


@pytest.mark.parametrize("damage", ["too long", "a symbolic link"])
def test_a_batch_that_cannot_be_read_stops_no_start_and_no_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(vault, "REMOVAL_RETRY_SECONDS", 0.01)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            gone, left, other = await one.make(3)
            for stamp in (STAMP, LATER):
                keep_in_batch(one, [gone, left, other], stamp)
            for key_id in (gone, left):
                await one.vault.retire(key_id)
            saved = one.file(left).read_bytes()
            for key_id in (gone, left):
                await one.vault.destroy(key_id)
            one.file(left).write_bytes(saved)  # as if its removal had been interrupted
        bad, good = sorted((tmp_path / "d" / "kms-deks-backup").rglob("*.jsonl"))
        good.write_bytes(b"".join(sorted((saved, saved.replace(left.encode(), gone.encode())))))
        if damage == "too long":
            os.truncate(bad, LINES_COUNT_MAX * FILE_BYTES + 1)
        else:
            bad.unlink()
            bad.symlink_to("elsewhere")
        async with opened_vault(tmp_path / "d") as again:
            scan = asyncio.create_task(again.indexing.run())
            await again.indexing.wait_complete()
            while good.read_bytes() != BLANK * 2:
                await asyncio.sleep(0.001)
            assert again.file(left).exists(), "what may be left is not forgotten"
            assert list(again.vault.rotation_backups.batches.unreadable) == [f"{STAMP}/{bad.name}"]
            await again.pruning.prune(backups=True)
            assert not good.exists()
            bad.unlink()
            await scan
            assert again.vault.rotation_backups.batches.unreadable == {}
            assert not again.file(left).exists()

    asyncio.run(main())


def test_the_batches_of_a_rotation_beside_the_scan_are_all_blanked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan lists the batch backups in another thread. A batch that is written meanwhile is known all the same."""
    listed, written = threading.Event(), threading.Event()
    real = batch_backups.list_stamps

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            destroyed, key_id = await one.make(2)
            for each in (destroyed, key_id):
                await one.vault.retire(each)
            await one.vault.destroy(destroyed)
        async with opened_vault(tmp_path / "d") as one:
            reader = one.reader.submit(threading.current_thread).result()

            def slowly(directory: str) -> list[str]:
                found = real(directory)
                if threading.current_thread() is reader:
                    listed.set()
                    written.wait(60)
                return found

            monkeypatch.setattr(batch_backups, "list_stamps", slowly)
            scan = asyncio.create_task(one.indexing.run())
            assert await asyncio.to_thread(listed.wait, 60)
            await asyncio.to_thread(keep_in_batch, one, [key_id])
            written.set()
            await scan
            assert await one.vault.destroy(key_id) == 1
            assert one.backups(key_id) == []

    asyncio.run(main())


def test_a_large_group_of_destructions_is_many_short_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So another job of the disk thread waits for a few files only."""
    monkeypatch.setattr(vault, "BLANK_FILES_MAX", 2)
    jobs: list[int] = []
    blank = BatchBackups.blank

    def counted(self: BatchBackups, files: list[KeysWithin], **named: Any) -> Counter[str]:
        jobs.append(len(files))
        return blank(self, files, **named)

    monkeypatch.setattr(BatchBackups, "blank", counted)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(5)
            for key_id in key_ids:
                keep_in_batch(one, [key_id])
                await one.vault.retire(key_id)
            assert await asyncio.gather(*map(one.vault.destroy, key_ids)) == [1] * 5
            assert jobs == [2, 2, 1]
            assert one.backups() == []

    asyncio.run(main())


def test_a_line_keeps_its_kek_until_it_is_pruned(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            keep_in_batch(one, key_ids)
            await one.rotate()
            shutil.rmtree(one.directory / "kms-deks-backup" / rotation_stamp(one))
            kept = await one.pruning.prune(backups=False)
            assert [why.version for why in kept.kept] == [1]
            one.file(key_ids[0]).unlink()
            kept = await one.pruning.prune(backups=True, before=LATER)
            assert (kept.destroyed, [why.version for why in kept.kept], kept.backups_removed) == ([], [1], 2)
            [last] = one.backups(key_ids[0])
            one.file(key_ids[0]).write_bytes(last)  # restored from its line
            assert len(one.keys(key_ids)) == 3
            await one.rotate()
            assert (await one.pruning.prune(backups=True)).destroyed == [1, 2]

    asyncio.run(main())


def test_a_damaged_line_keeps_every_retired_kek(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(2)
            keep_in_batch(one, key_ids)
            await one.rotate()
            shutil.rmtree(one.directory / "kms-deks-backup" / rotation_stamp(one))
            [path] = (one.directory / "kms-deks-backup" / STAMP).iterdir()
            path.write_bytes(b"\0" * (2 * FILE_BYTES))
            [kept] = (await one.pruning.prune(backups=False)).kept
            assert "can't be read" in kept.why

    asyncio.run(main())


def test_the_newest_key_id_counts_keys_that_only_a_batch_has(tmp_path: Path) -> None:
    batches = BatchBackups(str(tmp_path / "kms-deks-backup"))
    (tmp_path / "kms-deks-backup").mkdir(0o700)
    batches.write(STAMP, [Line("k_7zzzzzzzzzzzzzzzzzzzzzzzzz", line(1).content), line(1)])
    assert rotation_backups.newest_key_id(str(tmp_path)) == "k_7zzzzzzzzzzzzzzzzzzzzzzzzz"
