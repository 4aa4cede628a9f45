"""The journal of a batch: it is written whole, becomes the backup, and a replay completes what a crash interrupted."""

import contextlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.api.errors import StartError, StorageUnavailableError
from minikms.custody import deks, journal, settled_keys
from minikms.custody.journal import NAME, Journal, Replayed, replay
from minikms.custody.journal_format import MAGIC, RECORD_BYTES, Change, Decoded, decode, encode
from minikms.custody.settled_keys import SettledKeys
from minikms.keys import dek
from minikms.keys.dek import FILE_BYTES
from minikms.platform.files import open_directory
from tests.harness.disk_faults import failing_os, refuse
from tests.harness.vaults import OpenedVault, copied_vault, opened_vault

STAMP = "20260101T000000"


# --- a batch --------------------------------------------------------------------------------------------------------


async def rewraps(one: OpenedVault, key_ids: list[str]) -> list[Change]:
    """What a rotation would write: the old contents are on disk again afterwards."""
    olds = {key_id: one.file(key_id).read_bytes() for key_id in key_ids}
    await one.rotate()
    batch = [Change.summed(key_id, olds[key_id], one.file(key_id).read_bytes()) for key_id in key_ids]
    for change in batch:
        one.file(change.key_id).write_bytes(change.old)
    return batch


def journal_of(one: OpenedVault) -> Journal:
    return one.vault.journal


async def write(one: OpenedVault, batch: list[Change], stamp: str = STAMP) -> None:
    """As a rotation does."""
    async with one.vault.locks.hold(change.key_id for change in batch) as held:
        await journal_of(one).replace(held, batch, stamp)
    journal_of(one).flush()


async def test_a_batch_keeps_inodes_leaves_a_backup_and_no_journal(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        batch = await rewraps(one, await one.make(5))
        inodes = [one.file(rewrap.key_id).stat().st_ino for rewrap in batch]
        await write(one, batch)
        assert [one.file(rewrap.key_id).stat().st_ino for rewrap in batch] == inodes
        assert all(one.file(rewrap.key_id).read_bytes() == rewrap.new for rewrap in batch)
        [path] = (one.directory / "kms-deks-backup" / STAMP).iterdir()
        assert path.read_bytes() == encode(batch)
        key_ids = sorted(rewrap.key_id for rewrap in batch)
        assert path.name == f"{key_ids[0]}-{key_ids[-1]}.journal"
        assert not (one.directory / NAME).exists()


async def test_a_file_with_two_links_is_replaced_by_rename(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        linked, _ = batch = await rewraps(one, await one.make(2))
        copy = tmp_path / "copy"
        os.link(one.file(linked.key_id), copy)
        await write(one, batch)
        assert copy.read_bytes() == linked.old
        assert all(one.file(rewrap.key_id).read_bytes() == rewrap.new for rewrap in batch)


async def test_a_file_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        gone, usual = batch = await rewraps(one, await one.make(2))
        one.file(gone.key_id).unlink()
        await write(one, batch)
        assert not one.file(gone.key_id).exists()
        assert one.file(usual.key_id).read_bytes() == usual.new


@pytest.mark.parametrize("call", ["mkdir", "write", "rename", "fsync", "pwrite", "open"])
async def test_a_batch_on_a_failing_disk_is_whole_or_withdrawn(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call of this kind in turn. The next flush completes a batch that was not refused."""
    async with opened_vault(tmp_path / "d") as one:
        batch = await rewraps(one, await one.make(2))
        for at in range(1, 21):  # more than there are calls
            for rewrap in batch:
                one.file(rewrap.key_id).write_bytes(rewrap.old)
            refused = False
            with failing_os(monkeypatch, call, at=at):
                async with one.vault.locks.hold(change.key_id for change in batch) as held:
                    try:
                        await journal_of(one).replace(held, batch, f"20260101T{at:06}")
                    except StorageUnavailableError:
                        refused = True
                with contextlib.suppress(StorageUnavailableError):
                    journal_of(one).flush()
            journal_of(one).flush()
            found = {one.file(rewrap.key_id).read_bytes() for rewrap in batch}
            assert found == ({rewrap.old for rewrap in batch} if refused else {rewrap.new for rewrap in batch})
            assert not (one.directory / NAME).exists()
        assert not refused


async def test_while_a_batch_is_unwritten_nothing_else_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A destroyed key may be in the journal, so its receipt waits too."""
    async with opened_vault(tmp_path / "d") as one:
        [victim] = await one.make(1)
        await one.vault.retire(victim)
        batch = await rewraps(one, [victim, *await one.make(1)])
        with monkeypatch.context() as patch:
            patch.setattr(journal, "overwrite_file", refuse)
            patch.setattr(journal, "write_files", refuse)
            async with one.vault.locks.hold(change.key_id for change in batch) as held:
                with contextlib.suppress(StorageUnavailableError):
                    await journal_of(one).replace(held, batch, STAMP)
            assert [one.vault.store.read(each.key_id) for each in batch] == [each.new for each in batch]
            for change in (one.make(1), one.vault.destroy(victim)):
                with pytest.raises(StorageUnavailableError):
                    await change
        await one.vault.destroy(victim)
        assert one.backups(victim) == []
        assert len(one.backups(batch[1].key_id)) == 2


# --- the replay -----------------------------------------------------------------------------------------------------


def mixture(rewrap: Change) -> bytes:
    """Valid JSON, in which only half of the wrapped key is new."""
    at = rewrap.old.index(b'"wrapped":"') + 40
    return rewrap.new[:at] + rewrap.old[at:]


Damage = Callable[[Change], bytes]
STATES: dict[str, tuple[Damage, Damage]] = {
    "the old content": (lambda one: one.old, lambda one: one.new),
    "the new content": (lambda one: one.new, lambda one: one.new),
    "a torn overwrite": (mixture, lambda one: one.new),
    "bytes in another order": (lambda one: one.old[:90] + one.new[90:], lambda one: one.new),
    "a block of zeros": (lambda one: bytes(512) + one.new[512:], lambda one: one.new),
    "a cut file": (lambda one: one.new[:100], lambda one: one.new),
    "an empty file": (lambda one: b"", lambda one: one.new),
    "a newer content": (lambda one: later(one.new), lambda one: later(one.new)),
}
"""For what the file holds at the start: the content, and the content after the replay."""


def later(content: bytes) -> bytes:
    record = dek.parse(content, json.loads(content)["id"])
    return dek.encode(dek.retired(record, at="2026-11-25T00:00:00Z"))


def put_journal(one: OpenedVault, batch: list[Change]) -> None:
    journal_of(one).flush()  # else the stop would remove the file
    (one.directory / NAME).write_bytes(encode(batch))


@pytest.mark.parametrize("state", STATES)
async def test_a_replay_completes_the_batch_and_leaves_other_contents(tmp_path: Path, state: str) -> None:
    before, after = STATES[state]

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(5)
        keys = one.keys(key_ids)
        batch = await rewraps(one, key_ids)
        put_journal(one, batch)
        for rewrap in batch[1:]:
            one.file(rewrap.key_id).write_bytes(before(rewrap))
    async with opened_vault(tmp_path / "d") as again:
        assert one.file(batch[0].key_id).read_bytes() == batch[0].new
        assert all(again.file(rewrap.key_id).read_bytes() == after(rewrap) for rewrap in batch[1:])
        assert not (again.directory / NAME).exists()
        assert again.keys(key_ids) == keys


async def test_a_directory_of_a_key_files_name_costs_no_content(tmp_path: Path) -> None:
    """The start is refused until somebody has moved it away."""
    async with opened_vault(tmp_path / "d") as one:
        [rewrap] = batch = await rewraps(one, await one.make(1))
        put_journal(one, batch)
        saved = one.file(rewrap.key_id).rename(tmp_path / "saved")
        one.file(rewrap.key_id).mkdir()
    with pytest.raises(StartError, match=f"{rewrap.key_id}.json in kms-deks is a directory: move it away"):
        async with opened_vault(tmp_path / "d"):
            pass
    one.file(rewrap.key_id).rmdir()
    saved.rename(one.file(rewrap.key_id))
    async with opened_vault(tmp_path / "d") as again:
        assert again.replayed == Replayed(written=1)
        assert again.file(rewrap.key_id).read_bytes() == rewrap.new


async def test_a_reader_beside_the_daemon_parses_the_journal_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each key: a backup of many keys beside a journal would take hours."""
    parsed: list[int] = []

    def counted(content: bytes) -> Decoded:
        parsed.append(len(content))
        return decode(content)

    monkeypatch.setattr(settled_keys, "decode", counted)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(4)
        batch = await rewraps(one, key_ids)
        created = [Change(each.key_id, b"", each.old) for each in batch[2:]]
        put_journal(one, [*batch[:2], *created])
        os.utime(one.directory / NAME, ns=(1, 1))
        one.file(key_ids[3]).unlink()
        with SettledKeys(str(one.directory)) as settled:
            assert settled.key_ids() == sorted(key_ids)
            latest = [*(rewrap.new for rewrap in batch[:2]), *(rewrap.old for rewrap in batch[2:])]
            assert [settled.read(key_id) for key_id in key_ids] == latest
            assert len(parsed) == 1
            put_journal(one, batch)
            one.file(key_ids[2]).write_bytes(b"")
            assert settled.read(key_ids[2]) == batch[2].new, "a new journal is noticed"


async def test_a_replay_makes_no_file_of_an_absent_or_destroyed_key(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        absent, destroyed, usual = batch = await rewraps(one, key_ids)
        await one.vault.retire(destroyed.key_id)
        await one.vault.destroy(destroyed.key_id)
        one.file(absent.key_id).unlink()
        put_journal(one, batch)
    async with opened_vault(tmp_path / "d") as again:
        assert again.replayed == Replayed(written=1)
        await again.indexing.run()
        assert [path.stem for path in (again.directory / "kms-deks").iterdir()] == [usual.key_id]
        needle = b'"id":"%s"' % destroyed.key_id.encode()
        paths = [path for path in again.directory.rglob("*") if path.is_file()]
        assert not any(needle in path.read_bytes() for path in paths)


async def test_a_destroyed_key_with_a_file_of_before_stays_destroyed(tmp_path: Path) -> None:
    """The crash came between the tombstone and the removal of the file."""
    async with opened_vault(tmp_path / "d") as one:
        [gone, _] = batch = await rewraps(one, await one.make(2))
        await one.vault.retire(gone.key_id)
        await one.vault.destroy(gone.key_id)
        put_journal(one, batch)
        one.file(gone.key_id).write_bytes(gone.old)
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert not again.file(gone.key_id).exists()


async def test_under_a_restored_keyring_a_replay_writes_the_old_contents(tmp_path: Path) -> None:
    """The keyring lacks the KEK of the new contents."""
    async with opened_vault(tmp_path / "d") as one:
        batch = await rewraps(one, await one.make(2))
        put_journal(one, batch)
        one.file(batch[0].key_id).write_bytes(batch[0].new[:512] + batch[0].old[512:])
        backups, store = one.vault.rotation_backups, one.vault.store
        directory = open_directory(one.directory)
        done = replay(directory, store, backups, destroyed=(), has_kek=lambda version: version == 1, stamp=STAMP)
        os.close(directory)
        assert done == Replayed(written=1)
        assert all(one.file(rewrap.key_id).read_bytes() == rewrap.old for rewrap in batch)


# --- readers --------------------------------------------------------------------------------------------------------


async def test_readers_see_the_old_or_the_new_content_while_a_key_is_overwritten(tmp_path: Path) -> None:
    """In the daemon through the store, in another process by `read_settled`; the overwrites have the same calls."""
    async with opened_vault(tmp_path / "d") as one:
        batch = await rewraps(one, await one.make(2))
        store = one.vault.store
        allowed = {rewrap.key_id: {rewrap.old, rewrap.new} for rewrap in batch}
        stop = threading.Event()
        wrong: list[str] = []

        def read() -> None:
            while not stop.is_set():
                for key_id, contents in allowed.items():
                    settled = settled_keys.read_settled(
                        deks.file_name(key_id), dir_fd=store.directory_fd, is_valid=contents.__contains__
                    )
                    if store.read(key_id) not in contents or settled not in contents:
                        wrong.append(key_id)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for number in range(60):
            changes = batch if number % 2 else [Change.summed(one.key_id, one.new, one.old) for one in batch]
            await write(one, changes)
        stop.set()
        for reader in readers:
            reader.join()
        assert wrong == []


async def test_after_a_crash_a_reader_beside_the_daemon_finds_whole_contents(tmp_path: Path) -> None:
    """As a backup of a stopped daemon's directory does. A key that the journal does not have is not mended."""
    async with opened_vault(tmp_path / "d") as one:
        torn, zeros, other, missing = batch = await rewraps(one, await one.make(4))
        put_journal(one, batch[:2])
        one.file(torn.key_id).write_bytes(mixture(torn))
        one.file(zeros.key_id).write_bytes(bytes(512) + zeros.new[512:])
        one.file(missing.key_id).write_bytes(bytes(FILE_BYTES))
        with SettledKeys(str(tmp_path / "d")) as settled:
            found = [settled.read(rewrap.key_id) for rewrap in batch]
            assert settled.recovered == 2
        assert found == [torn.new, zeros.new, other.old, bytes(FILE_BYTES)]


@pytest.mark.parametrize("newest_kek", [1, 2])
@pytest.mark.parametrize("made", [False, True])
async def test_a_backup_takes_what_the_replay_writes(tmp_path: Path, newest_kek: int, made: bool) -> None:
    """Whatever the file has, also if the keyring is older than the journal and lacks the KEK of its last content."""
    async with opened_vault(tmp_path / "d") as one:
        older = (one.directory / "keyring.json").read_bytes()
        [rewrap] = await rewraps(one, await one.make(1))
        file = one.file(rewrap.key_id)
        retired = dek.encode(dek.retired(dek.parse(rewrap.old, rewrap.key_id), at="2026-01-01T00:00:00Z"))
        if newest_kek == 1:
            (one.directory / "keyring.json").write_bytes(older)
        taken, left = [], []
        directory = open_directory(one.directory)
        for content in (None, b"", rewrap.old, rewrap.new, mixture(rewrap), retired):
            put_journal(one, [Change.summed(rewrap.key_id, b"", rewrap.old), rewrap] if made else [rewrap])
            file.unlink(missing_ok=True)
            if content is not None:
                file.write_bytes(content)
            with SettledKeys(str(one.directory)) as settled:
                taken.append(settled.read(rewrap.key_id))
            replay(
                directory,
                one.vault.store,
                one.vault.rotation_backups,
                destroyed=(),
                has_kek=lambda version: version <= newest_kek,
                stamp=STAMP,
            )
            left.append(file.read_bytes() if file.exists() else None)
        os.close(directory)
        newest = rewrap.new if newest_kek == 2 else rewrap.old
        assert left == [newest if made else None, newest, newest, newest, newest, retired]
        assert taken == left


@pytest.mark.parametrize("left", [5, len(MAGIC) + 2 * RECORD_BYTES + 700, len(MAGIC) + 2 * RECORD_BYTES + 9])
async def test_a_journal_that_was_cut_is_damaged_and_kept_with_whole_records(tmp_path: Path, left: int) -> None:
    """A kept one can be read when a key is destroyed. What is left of the cut record names its key."""
    async with opened_vault(tmp_path / "d") as one:
        key_ids = [(await one.make(1))[0] for _ in range(3)]
        copied_vault(one, tmp_path / "after")
    for key_id in key_ids:
        (tmp_path / "after" / "kms-deks" / f"{key_id}.json").unlink()
    os.truncate(tmp_path / "after" / NAME, left)
    whole = max(0, (left - len(MAGIC)) // RECORD_BYTES)
    async with opened_vault(tmp_path / "after") as after:
        assert after.replayed == Replayed(whole, damaged=1)
        assert len(after.keys(key_ids[:whole])) == whole
        [kept] = (after.directory / "kms-deks-backup").rglob("*.journal")
        assert kept.stat().st_size == len(MAGIC) + (whole + 1) * RECORD_BYTES
        with SettledKeys(str(after.directory)) as settled:
            assert list(settled.damaged()) == [{key_ids[2]} if (left - len(MAGIC)) % RECORD_BYTES == 700 else set()]
        for key_id in key_ids[:whole]:
            await after.vault.retire(key_id)
            await after.vault.destroy(key_id)
        assert after.vault.rotation_backups.unreadable == {}


def test_a_content_is_read_again_until_it_settles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not settle is returned as it is."""

    directory = open_directory(tmp_path)
    contents = iter([b"mixture", b"new", b"new"])
    monkeypatch.setattr(settled_keys, "read_file_bounded", lambda *_, **__: next(contents))
    monkeypatch.setattr(settled_keys, "SETTLE_SECONDS", 0)
    assert settled_keys.read_settled("f", dir_fd=directory, is_valid=lambda content: content == b"new") == b"new"
    reads = iter([b"bad"] * settled_keys.SETTLE_READS_MAX)
    monkeypatch.setattr(settled_keys, "read_file_bounded", lambda *_, **__: next(reads))
    assert settled_keys.read_settled("f", dir_fd=directory, is_valid=lambda content: False) == b"bad"
    assert list(reads) == []
    monkeypatch.undo()
    assert settled_keys.read_settled("absent", dir_fd=directory, is_valid=lambda content: True) is None
    os.close(directory)
