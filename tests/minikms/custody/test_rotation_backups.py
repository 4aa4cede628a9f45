"""Backups of batches: records are found by the names of their files, blanked for destroyed keys, and pruned."""

import asyncio
import errno
import os
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.errors import KeyUnreadableError, StorageUnavailableError
from minikms.custody import rotation_backups as backups_module
from minikms.custody import vault
from minikms.custody.deks import DekStore
from minikms.custody.journal_format import BLANK, BYTES_MAX, MAGIC, RECORD_BYTES, SECTOR_BYTES, Change, encode
from minikms.custody.rotation_backups import KeysWithin, RotationBackups
from minikms.custody.settled_keys import newest_key_id
from minikms.keys.dek import FILE_BYTES, KEY_ID_BYTES
from minikms.platform import sync
from minikms.platform.files import open_directory, replace_file
from tests.harness.disk_faults import failing, failing_os, flip, quick_directory, refuse
from tests.harness.vaults import OpenedVault, opened_vault

STAMP, LATER = "20260101T000000", "20260201T000000"
NAME = "a-journal"
AT = len(MAGIC)
"""Of the first record."""


def key_id(number: int) -> str:
    return f"k_01jd{number:022d}"


def record(number: int, text: str = "") -> Change:
    def content(side: str) -> bytes:
        return f'{{"id":"{key_id(number)}","{side}":"{text}"}}'.encode().ljust(FILE_BYTES)

    return Change(key_id(number), content("old"), content("new"))


def opened(directory: Path) -> RotationBackups:
    (directory / "kms-deks-backup").mkdir(exist_ok=True)
    return RotationBackups(str(directory))


def keep(backups: RotationBackups, stamp: str, *changes: Change) -> None:
    """As the journal does with a batch."""
    directory = open_directory(os.path.dirname(backups.directory))
    try:
        replace_file(directory, NAME, encode(changes))
        key_ids = [change.key_id for change in changes]
        backups.adopt(directory, NAME, stamp, min(key_ids), max(key_ids))
    finally:
        os.close(directory)


def in_all_files(directory: Path, number: int) -> int:
    """In how many records the key is."""
    needle = b'"id":"%s"' % key_id(number).encode()
    return sum(path.read_bytes().count(needle) for path in directory.rglob("*") if path.is_file()) // 2


def contents(backups: RotationBackups) -> list[list[str]]:
    return [[one.key_id for one in backups.read_journal(file)] for file in backups.journals()]


def blank(backups: RotationBackups, *key_ids: str, anew: tuple[str, ...] = ()) -> list[int]:
    """The number of records of each key."""
    counts = backups.blank(backups.files_of(key_ids), anew=anew)
    return [counts[key_id] for key_id in key_ids]


def journals(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.journal"))


def inodes(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in journals(directory)}


def prune(backups: RotationBackups, *, before: str | None, spare: tuple[str, ...] = ()) -> int:
    """The number of removed records. Keys without a file count as destroyed, except those in `spare`."""

    class Every(set[str]):
        def __contains__(self, _: object) -> bool:
            return True

    os.makedirs(os.path.join(os.path.dirname(backups.directory), "kms-deks"), exist_ok=True)
    store = DekStore(os.path.dirname(backups.directory))
    return sum(backups.prune(store, before=before, spare=spare, destroyed=Every()))


# --- files ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_named_by_its_ends_and_a_name_is_used_once(tmp_path: Path) -> None:
    backups = opened(tmp_path)
    keep(backups, STAMP, record(3), record(1), record(2))
    keep(backups, STAMP, record(1, "changed"), record(3))
    name = f"{key_id(1)}-{key_id(3)}"
    assert [path.name for path in journals(tmp_path)] == [f"{name}.1.journal", f"{name}.journal"]
    assert journals(tmp_path)[1].read_bytes() == encode([record(3), record(1), record(2)])
    assert contents(opened(tmp_path)) == contents(backups)
    assert sorted(map(len, contents(backups))) == [2, 3]


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_a_batch_that_the_disk_refuses_can_be_kept_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    backups = opened(tmp_path)
    for at in range(1, 9):
        with failing_os(monkeypatch, call, at=at):
            try:
                keep(backups, STAMP, record(1))
            except StorageUnavailableError:
                continue
            break
    assert 1 < at < 8
    assert {*map(tuple, contents(backups))} == {(key_id(1),)}
    blank(backups, key_id(1))
    assert in_all_files(tmp_path, 1) == 0


# --- erasure --------------------------------------------------------------------------------------------------------


def test_a_destroyed_key_is_in_no_record_and_its_neighbours_stay(tmp_path: Path) -> None:
    backups = opened(tmp_path)
    for stamp in (STAMP, LATER):
        keep(backups, stamp, record(1), record(2), record(3))
        keep(backups, stamp, record(4), record(5))
    before = sum(path.stat().st_size for path in journals(tmp_path))
    assert blank(backups, key_id(2), key_id(9), key_id(5)) == [2, 0, 2]
    assert blank(backups, key_id(2)) == [0]
    assert [in_all_files(tmp_path, number) for number in (1, 2, 3, 4, 5)] == [2, 0, 2, 2, 0]
    assert sum(path.stat().st_size for path in journals(tmp_path)) == before
    assert contents(backups) == [[key_id(1), key_id(3)], [key_id(4)]] * 2


def test_a_damaged_record_is_blanked_if_one_of_three_places_names_its_key(tmp_path: Path) -> None:
    backups = opened(tmp_path)
    keep(backups, STAMP, record(1), record(2), record(3))
    [path] = journals(tmp_path)
    whole = path.read_bytes()
    begin = AT + RECORD_BYTES
    places = {0: KEY_ID_BYTES, KEY_ID_BYTES: 40, KEY_ID_BYTES + FILE_BYTES: 40}
    for intact in places:
        damaged = bytearray(whole)
        for place, length in places.items():
            if place != intact:
                damaged[begin + place : begin + place + length] = b"?" * length
        path.write_bytes(damaged)
        assert blank(backups, key_id(2)) == [1]
        assert path.read_bytes() == whole[:begin] + BLANK + whole[begin + RECORD_BYTES :]


def test_a_record_that_cannot_be_blanked_is_an_error_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backups = opened(tmp_path)
    keep(backups, STAMP, record(1), record(2))
    for call in ("pwrite", "fsync"):
        with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError):
            blank(backups, key_id(1))
    blank(backups, key_id(1))
    assert in_all_files(tmp_path, 1) == 0
    [path] = (tmp_path / "kms-deks-backup" / STAMP).iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageUnavailableError):
        blank(backups, key_id(2))


@pytest.mark.parametrize("stamps", [[STAMP], [f"2026010{number}T000000" for number in range(1, 6)]])
def test_a_file_whose_sync_failed_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamps: list[str]
) -> None:
    """Its page cache has the blank record, and a second sync would succeed without it. Of one file, and of a group."""
    monkeypatch.setattr(backups_module, "syncfs_reports", lambda _directory: True)
    backups = opened(tmp_path)
    for stamp in stamps:
        keep(backups, stamp, record(1), record(2))
    before = inodes(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
        patch.setattr(backups_module, "syncfs", failing(sync.syncfs, at=1))
        patch.setattr(os, "fdatasync", failing(os.fdatasync, at=1))
        blank(backups, key_id(1))
    assert in_all_files(tmp_path, 1) == 0, "in the page cache"
    assert blank(backups, key_id(1)) == [0]
    after = inodes(tmp_path)
    assert all(after[path] != before[path] for path in before)
    assert [in_all_files(tmp_path, number) for number in (1, 2)] == [0, len(stamps)]
    blank(backups, key_id(2))
    assert inodes(tmp_path) == after


def test_a_removal_that_an_earlier_run_began_writes_the_files_anew(tmp_path: Path) -> None:
    """Nobody knows whether the blank record that the page cache has is on the disk."""
    keep(opened(tmp_path), STAMP, record(1), record(2))
    [path] = journals(tmp_path)
    blanked = MAGIC + BLANK + path.read_bytes()[AT + RECORD_BYTES :]
    path.write_bytes(blanked)
    inode = path.stat().st_ino
    assert blank(opened(tmp_path), key_id(1), anew=(key_id(1),)) == [0]
    assert path.stat().st_ino != inode
    assert path.read_bytes() == blanked


@pytest.mark.parametrize("pruned", [False, True])
def test_a_file_that_is_written_anew_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruned: bool
) -> None:
    """After a failed sync the kernel may drop the pages, so that a second read finds what the disk has."""
    backups = opened(tmp_path)
    keep(backups, STAMP, record(1), record(2), record(3))
    [path] = journals(tmp_path)
    on_disk = path.read_bytes()
    with failing_os(monkeypatch, "fdatasync"), pytest.raises(StorageUnavailableError):
        blank(backups, key_id(1))
    opens = 0

    def dropped(name: str, *args: Any, open_now: Callable[..., int] = os.open, **named: Any) -> int:
        nonlocal opens
        opens += name == path.name
        if opens == 2:
            path.write_bytes(on_disk)
        return open_now(name, *args, **named)

    monkeypatch.setattr(os, "open", dropped)
    if pruned:
        assert prune(backups, before=None, spare=(key_id(2),)) == 1
    else:
        assert blank(backups, key_id(3)) == [1]
    assert [in_all_files(tmp_path, number) for number in (1, 2, 3)] == [0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.sets(st.integers(0, 5)))
def test_a_torn_blank_record_is_blanked_by_the_next_start(number: int, lost: set[int]) -> None:
    """Whichever sectors of it the crash left, also those without the key id. No other record changes."""
    with tempfile.TemporaryDirectory(dir=quick_directory()) as place:
        changes = [record(each, "secret" * 160) for each in range(41)]
        keep(opened(Path(place)), STAMP, *changes)
        [path] = journals(Path(place))
        torn = bytearray(path.read_bytes())
        begin = AT + number * RECORD_BYTES
        for sector in lost:
            first = max(begin, (begin // SECTOR_BYTES + sector) * SECTOR_BYTES)
            end = min(begin + RECORD_BYTES, (begin // SECTOR_BYTES + sector + 1) * SECTOR_BYTES)
            torn[first:end] = bytes(max(0, end - first))
        path.write_bytes(torn)
        again = opened(Path(place))
        [file] = again.journals()
        found = again.destroyed_in(file, {key_id(number)})
        if found is not None:
            again.blank([found])
        expected = bytearray(encode(changes))
        expected[begin : begin + RECORD_BYTES] = BLANK
        assert path.read_bytes() == expected


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_blanked(tmp_path: Path) -> None:
    """It is an error of the keys that it may hold, until somebody removes it."""
    backups = opened(tmp_path)
    for stamp in (STAMP, LATER):
        keep(backups, stamp, record(1), record(2))
    [bad] = (tmp_path / "kms-deks-backup" / STAMP).iterdir()
    os.truncate(bad, BYTES_MAX + 1)
    with pytest.raises(StorageUnavailableError, match=f"a rotation backup of {STAMP} may hold the key") as refused:
        blank(backups, key_id(1))
    assert "k_" not in str(refused.value), "whoever destroys one key need not know of another"
    assert in_all_files(tmp_path / "kms-deks-backup" / LATER, 1) == 0
    assert list(backups.unreadable) == [f"{STAMP}/{bad.name}"]
    assert blank(backups, key_id(9)) == [0]
    assert prune(backups, before=None) == 1, "the others are pruned"
    bad.unlink()
    assert blank(backups, key_id(1)) == [0]
    assert backups.unreadable == {}


# --- pruning --------------------------------------------------------------------------------------------------------


def test_pruning_removes_older_stamps_and_keeps_needed_records(tmp_path: Path) -> None:
    backups = opened(tmp_path)
    keep(backups, STAMP, record(1), record(2))
    keep(backups, STAMP, record(3))
    keep(backups, LATER, record(1))
    assert prune(backups, before=LATER, spare=(key_id(2),)) == 2
    assert contents(backups) == [[key_id(2)], [key_id(1)]]
    assert prune(backups, before=None) == 2
    assert backups.stamps() == []
    assert os.listdir(tmp_path / "kms-deks-backup") == []


def test_a_record_without_a_key_id_is_listed_and_pruned(tmp_path: Path) -> None:
    backups = opened(tmp_path)
    keep(backups, STAMP, record(1), record(2))
    [path] = journals(tmp_path)
    content = bytearray(path.read_bytes())
    for at in (AT, AT + 16, AT + 16 + FILE_BYTES):  # the id, and the beginnings of both contents
        content[at : at + 40] = b"?" * 40
    path.write_bytes(content)
    found = contents(backups)
    assert [found[0][0] != key_id(1), found[0][1]] == [True, key_id(2)]
    assert prune(backups, before=None, spare=(key_id(2),)) == 1
    assert contents(backups) == [[key_id(2)]]


@pytest.mark.parametrize("name", ["", STAMP])
def test_a_directory_that_cannot_be_looked_at_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A key in it would be destroyed without its records, or stay in them after a start."""
    backups = opened(tmp_path)
    keep(backups, STAMP, record(1))
    bad, look = os.path.join(backups.directory, name).rstrip("/"), os.stat

    def stat(path: Any, **others: Any) -> os.stat_result:
        if path == bad:
            raise OSError(errno.EIO, "bad sector")
        return look(path, **others)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(StorageUnavailableError):
        backups.journals()


def test_a_file_that_cannot_be_read_is_an_error_of_that_file(tmp_path: Path) -> None:
    backups = opened(tmp_path)
    keep(backups, STAMP, record(1))
    [file] = backups.journals()
    path = tmp_path / "kms-deks-backup" / STAMP / file.name
    path.unlink()
    assert backups.read_journal(file) == []
    path.mkdir()
    with pytest.raises(KeyUnreadableError, match=f"{STAMP}/{key_id(1)}"):
        backups.read_journal(file)


# --- in a data directory --------------------------------------------------------------------------------------------


def keep_in_batch(one: OpenedVault, key_ids: list[str], stamp: str = STAMP) -> None:
    """As a rotation under that stamp does."""
    files_now = {key: one.file(key).read_bytes() for key in key_ids}
    keep(one.vault.rotation_backups, stamp, *(Change(key, now, now) for key, now in files_now.items()))


def rotation_stamp(one: OpenedVault) -> str:
    [stamp] = set(one.vault.rotation_backups.stamps()) - {STAMP, LATER}
    return stamp


async def test_a_receipt_counts_the_records_and_none_is_left(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(4)
        for stamp in (STAMP, LATER):
            keep_in_batch(one, key_ids, stamp)
        gone, *others = key_ids
        await one.vault.retire(gone)
        assert (await one.vault.destroy(gone)).backups == 2
        files = [path for path in (tmp_path / "d" / "kms-deks-backup").rglob("*") if path.is_file()]
        assert len(files) == 2
        for path in files:
            assert gone.encode() not in path.read_bytes()
            assert all(key.encode() in path.read_bytes() for key in others)


async def test_a_start_blanks_the_records_of_a_destruction_that_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        keep_in_batch(one, key_ids)
        await one.vault.retire(key_ids[0])
        with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
            patch.setattr(RotationBackups, "blank", refuse)
            await one.vault.destroy(key_ids[0])
        assert one.file(key_ids[0]).exists()
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert not again.file(key_ids[0]).exists()
        [file] = again.vault.rotation_backups.journals()
        assert {found.key_id for found in again.vault.rotation_backups.read_journal(file)} == set(key_ids[1:])


async def test_a_repeated_destruction_trusts_no_sync_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same run and in the next one, which knows only that the key still has a file."""
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        keep_in_batch(one, key_ids)
        for key_id in key_ids:
            await one.vault.retire(key_id)
        [path] = (one.directory / "kms-deks-backup" / STAMP).iterdir()
        for key_id in key_ids[:2]:
            with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
                patch.setattr(RotationBackups, "blank", fails_after(RotationBackups.blank))
                await one.vault.destroy(key_id)
        inode = path.stat().st_ino
        assert (await one.vault.destroy(key_ids[0])).backups == 0
        assert path.stat().st_ino != inode
        inode = path.stat().st_ino
        assert (await one.vault.destroy(key_ids[0])).backups == 0
        assert path.stat().st_ino == inode, "its removal was completed"
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert path.stat().st_ino != inode
        assert path.read_bytes().count(BLANK) == 2


def fails_after(blank: Callable[..., object]) -> Callable[..., object]:
    def failing(*arguments: object, **named: object) -> object:
        blank(*arguments, **named)
        raise StorageUnavailableError("the sync failed")

    return failing


async def test_a_start_removes_the_temporary_files_of_a_batch_before_it_answers(tmp_path: Path) -> None:
    """Those of a journal have the contents of many keys."""
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
        assert [len(list(folder.glob(".tmp-0*"))) for folder in folders] == [0, 0, 0, 1]
        await again.vault.destroy(key_id)
        paths = [path for folder in folders for path in folder.iterdir() if path.is_file()]
        assert not [path for path in paths if content[:100] in path.read_bytes()]


async def test_no_key_is_destroyed_while_a_temporary_file_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of this run, whose write and whose removal failed."""
    async with opened_vault(tmp_path / "d") as one:
        key_id, other = await one.make(2)
        await one.vault.retire(key_id)
        with monkeypatch.context() as patch, pytest.raises(StorageUnavailableError):
            patch.setattr(os, "rename", failing(os.rename, at=1))
            patch.setattr(os, "unlink", failing(os.unlink, at=1))
            keep_in_batch(one, [key_id, other])
        assert in_left_temps(one.directory, key_id)
        with failing_os(monkeypatch, "unlink"), pytest.raises(StorageUnavailableError, match="temporary files"):
            await one.vault.destroy(key_id)
        await one.vault.destroy(key_id)
        assert not in_left_temps(one.directory, key_id)


def in_left_temps(directory: Path, key_id: str) -> bool:
    return any(key_id.encode() in path.read_bytes() for path in directory.glob(".tmp-*"))


@pytest.mark.parametrize("damage", ["too long", "a symbolic link"])
async def test_a_batch_that_cannot_be_read_stops_no_start_and_no_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(vault, "REMOVAL_RETRY_SECONDS", 0.01)

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
    bad, good = journals(tmp_path / "d")
    again_there = saved.replace(left.encode(), gone.encode())
    good.write_bytes(encode([Change(left, saved, saved), Change(gone, again_there, again_there)]))
    if damage == "too long":
        os.truncate(bad, BYTES_MAX + 1)
    else:
        bad.unlink()
        bad.symlink_to("elsewhere")
    async with opened_vault(tmp_path / "d") as again:
        scan = asyncio.create_task(again.indexing.run())
        await again.indexing.wait_complete()
        while good.read_bytes() != MAGIC + BLANK * 2:
            await asyncio.sleep(0.001)
        assert again.file(left).exists(), "what may be left is not forgotten"
        assert list(again.vault.rotation_backups.unreadable) == [f"{STAMP}/{bad.name}"]
        await again.pruning.prune(backups=True)
        assert not good.exists()
        bad.unlink()
        await scan
        assert again.vault.rotation_backups.unreadable == {}
        assert not again.file(left).exists()


async def test_the_batches_of_a_rotation_beside_the_scan_are_all_blanked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan lists the backups in another thread. A batch that is written meanwhile is known all the same."""
    listed, written = threading.Event(), threading.Event()
    real = backups_module.list_stamps

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

        monkeypatch.setattr(backups_module, "list_stamps", slowly)
        scan = asyncio.create_task(one.indexing.run())
        assert await asyncio.to_thread(listed.wait, 60)
        await asyncio.to_thread(keep_in_batch, one, [key_id])
        written.set()
        await scan
        assert (await one.vault.destroy(key_id)).backups == 1
        assert one.backups(key_id) == []


async def test_a_large_group_of_destructions_is_many_short_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So another job of the disk thread waits for a few files only."""
    monkeypatch.setattr(vault, "BLANK_FILES_MAX", 2)
    jobs: list[int] = []
    blank = RotationBackups.blank

    def counted(self: RotationBackups, files: list[KeysWithin], **named: Any) -> Counter[str]:
        jobs.append(len(files))
        return blank(self, files, **named)

    monkeypatch.setattr(RotationBackups, "blank", counted)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(5)
        for key_id in key_ids:
            keep_in_batch(one, [key_id])
            await one.vault.retire(key_id)
        done = await asyncio.gather(*map(one.vault.destroy, key_ids))
        assert [each[:2] for each in done] == [(1, [])] * 5
        assert jobs == [2, 2, 1]
        assert one.backups() == []


async def test_a_record_keeps_its_kek_until_it_is_pruned(tmp_path: Path) -> None:
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


async def test_a_damaged_record_keeps_every_kek_until_its_file_is_removed(tmp_path: Path) -> None:
    """By hand. A start finds it, for the warnings of the status, and no pruning removes it."""
    async with opened_vault(tmp_path / "d") as one:
        keep_in_batch(one, await one.make(1))
        await one.rotate()
        shutil.rmtree(one.directory / "kms-deks-backup" / rotation_stamp(one))
        [path] = (one.directory / "kms-deks-backup" / STAMP).iterdir()
        flip(path, AT + 100)
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert again.vault.rotation_backups.damaged == {f"{STAMP}/{path.name}"}
        for backups in (False, True):
            [kept] = (await again.pruning.prune(backups=backups)).kept
            assert "can't be read" in kept.why
        path.unlink()
        assert (await again.pruning.prune(backups=True)).destroyed == [1]
        assert again.vault.rotation_backups.damaged == set()


def test_the_newest_key_id_counts_keys_that_only_a_backup_has(tmp_path: Path) -> None:
    newest = "k_7zzzzzzzzzzzzzzzzzzzzzzzzz"
    keep(opened(tmp_path), STAMP, Change(newest, record(1).old, record(1).new), record(1))
    assert newest_key_id(str(tmp_path)) == newest
