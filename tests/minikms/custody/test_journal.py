"""The journal of creates and retirements: an answered one survives a power loss, a destroyed key is in no file."""

import asyncio
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.errors import KmsRefusedError, StartError, StorageUnavailableError
from minikms.custody import journal, settled_keys
from minikms.custody.deks import DekStore
from minikms.custody.journal import NAME, Journal, Replayed, replay
from minikms.custody.journal_format import BLANK, MAGIC, RECORD_BYTES, SECTOR_BYTES, Change, decode, encode
from minikms.custody.settled_keys import SettledKeys, newest_key_id
from minikms.keys.dek import FILE_BYTES, KEY_ID_BYTES, bytes_to_key_id, make_key_id
from minikms.platform import files, sync
from minikms.platform.files import open_directory
from tests.harness.disk_faults import failing_os, flip, refuse
from tests.harness.vaults import OpenedVault, copied_vault, create, opened_vault

VECTORS = Path(__file__).parents[2] / "vectors"


@pytest.fixture(autouse=True)
def has_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a file system whose `syncfs` is not known to report every failure."""
    monkeypatch.setattr(journal, "syncfs_reports", lambda _directory: True)


def new_key(number: int) -> Change:
    return Change.summed(bytes_to_key_id(number.to_bytes(16, "big")), b"", bytes([number + 1]) * FILE_BYTES)


# --- the format -----------------------------------------------------------------------------------------------------


def test_the_known_journal_is_read_and_written_in_the_same_bytes() -> None:
    known = json.loads((VECTORS / "formats.json").read_text())["dek"]
    content = bytes.fromhex(known["journal"])
    first, second = (file.encode() for file in known["files"])
    found = decode(content)
    assert found.damaged == []
    assert [each[:3] for each in found.intact] == [(known["key_id"], b"", first), (known["key_id"], first, second)]
    assert MAGIC + BLANK + encode(Change(*each[:3]) for each in found.intact)[len(MAGIC) :] == content


@settings(max_examples=30)
@given(st.integers(0, 4), st.data())
def test_a_torn_log_has_all_records_before_the_tear(count: int, data: st.DataObject) -> None:
    keys = [new_key(number) for number in range(count)]
    whole = encode(keys).ljust(len(MAGIC) + 5 * RECORD_BYTES, b"\0")
    cut = data.draw(st.integers(len(MAGIC), len(MAGIC) + count * RECORD_BYTES))
    for torn in (whole[:cut], whole[:cut].ljust(len(whole), b"\0")):
        assert decode(torn).intact == keys[: (cut - len(MAGIC)) // RECORD_BYTES]


@settings(max_examples=30)
@given(st.integers(0, len(MAGIC) + 3 * RECORD_BYTES - 1), st.integers(0, 7))
def test_a_damaged_record_is_left_out_and_no_other_one(at: int, bit: int) -> None:
    keys = [new_key(number) for number in range(3)]
    content = bytearray(encode(keys).ljust(len(MAGIC) + 4 * RECORD_BYTES, b"\0"))
    content[at] ^= 1 << bit
    hit = (at - len(MAGIC)) // RECORD_BYTES
    found = decode(bytes(content))
    assert found.intact == (keys if hit < 0 else keys[:hit] + keys[hit + 1 :])
    assert len(found.damaged) == (0 if hit < 0 else 1)


def test_a_log_of_another_version_is_refused() -> None:
    with pytest.raises(StartError, match="another version of miniKMS"):
        decode(MAGIC[:-1] + b"\x02" + bytes(5000))


# --- creating -------------------------------------------------------------------------------------------------------


def logged(one: OpenedVault) -> list[str]:
    return [key.key_id for key in decode((one.directory / NAME).read_bytes()).intact]


async def test_files_are_made_after_their_records_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    synced, made = os.fdatasync, files.make_file

    def synced_(descriptor: int) -> None:
        synced(descriptor)
        calls.append("sync")

    def make(directory: int, name: str, data: bytes, *, sync: bool) -> None:
        calls.append(name)
        made(directory, name, data, sync=sync)

    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)  # reserves wraps
        monkeypatch.setattr(os, "fdatasync", synced_)
        monkeypatch.setattr(journal, "make_file", make)
        records = await asyncio.gather(*(create(one.vault, f"t{number}") for number in range(5)))
        key_ids = [record.id for record in records]
        monkeypatch.undo()
        assert calls[0] == "sync"
        assert calls.count("sync") == 1
        assert sorted(calls[1:]) == [f"{key_id}.json" for key_id in sorted(key_ids)]
        assert sorted(logged(one)[1:]) == sorted(key_ids)


async def test_a_key_whose_file_the_disk_refuses_is_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is durable, so it is answered and opened. Further changes are refused until its file is written."""
    monkeypatch.setattr(journal, "RETRY_SECONDS_MIN", 60.0)

    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)  # reserves wraps
        with monkeypatch.context() as failing:
            failing.setattr(journal, "make_file", refuse_file)
            failing.setattr(journal, "write_files", refuse)
            first, second = await asyncio.gather(create(one.vault, "t1"), create(one.vault, "t2"))
            assert not one.file(first.id).exists()
            keys = one.keys([first.id, second.id])
            with pytest.raises(StorageUnavailableError):
                await one.vault.retire(second.id)
            with pytest.raises(StorageUnavailableError):
                await create(one.vault, "t3")
        copied_vault(one, tmp_path / "killed")
        await one.make(1)
        assert one.on_disk(first.id).state == "active"
        assert one.on_disk(second.id).state == "active"
        assert one.keys(keys) == keys
    async with opened_vault(tmp_path / "killed") as after:
        assert after.on_disk(first.id).state == "active"
        assert after.on_disk(second.id).state == "active"
        assert after.keys(keys) == keys


def refuse_file(_directory: int, _name: str, _data: bytes, **_sync: bool) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_a_key_is_durable_before_its_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Vault.create_in_log` returns then, so that the audit line is synced meanwhile. A change waits for the file."""
    going_on = threading.Event()

    def slowly(directory: int, name: str, data: bytes, *, sync: bool) -> None:
        going_on.wait(20)
        files.make_file(directory, name, data, sync=sync)

    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)
        monkeypatch.setattr(journal, "make_file", slowly)
        record = await one.vault.create_in_log("t")
        assert not one.file(record.id).exists()
        assert record.id in logged(one)
        assert len(one.keys([record.id])) == 1
        retiring = asyncio.create_task(one.vault.retire(record.id))
        made = asyncio.create_task(one.vault.journal.file_written(record.id))
        await asyncio.sleep(0)
        going_on.set()
        await made
        assert one.file(record.id).exists()
        await retiring
        assert one.on_disk(record.id).state == one.vault.record(record.id).state == "retired"


async def test_a_stop_a_rotation_and_a_full_log_settle_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RECORDS_MAX", 5)

    async with opened_vault(tmp_path / "d") as one:
        await one.make(3)
        await one.make(2)
        assert len(logged(one)) == 5
        key_ids = await one.make(1)
        assert logged(one) == key_ids
        await one.rotate()
        assert not (one.directory / NAME).exists()
        await one.make(1)
    assert not (tmp_path / "d" / NAME).exists()


async def test_where_syncfs_is_not_strict_each_file_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "syncfs_reports", lambda _directory: False)
    monkeypatch.setattr(journal, "syncfs", refuse_sync)
    synced: list[str] = []
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    async with opened_vault(tmp_path / "d") as one:
        monkeypatch.setattr(os, "fsync", sync)
        [key_id] = await one.make(1)
        await one.vault.retire(key_id)
        assert synced.count(f"{key_id}.json") == 2
        one.vault.journal.flush()
        assert synced[-2:] == ["kms-deks", "d"], "the directory before the journal is removed"
        assert one.on_disk(key_id).state == "retired"


@pytest.mark.parametrize("call", ["open", "write", "pwrite", "fdatasync", "fsync", "rename", "unlink"])
async def test_a_create_on_a_failing_disk_is_refused_or_durable(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call of this kind in turn. A refused create leaves no file behind that can't be read."""
    keys: dict[str, bytes] = {}
    async with opened_vault(tmp_path / "d", slots=128) as one:
        for at in range(1, 100):
            with failing_os(monkeypatch, call, at=at):
                outcomes = await asyncio.gather(
                    *(create(one.vault, f"t{number}") for number in range(3)), return_exceptions=True
                )
            made = [outcome.id for outcome in outcomes if not isinstance(outcome, BaseException)]
            assert all(isinstance(each, KmsRefusedError) for each in outcomes if isinstance(each, BaseException))
            keys |= one.keys(made)
            again = await one.make(1)
            keys |= one.keys(again)
            if len(made) == 3:
                break
        content = (one.directory / NAME).read_bytes()
    # A power loss after the last answer: of the files that the log has, nothing reached the disk.
    (tmp_path / "d" / NAME).write_bytes(content)
    for key in decode(content).intact:
        (tmp_path / "d" / "kms-deks" / f"{key.key_id}.json").write_bytes(b"")
    async with opened_vault(tmp_path / "d", slots=128) as after:
        assert after.keys(keys) == keys
        await after.indexing.run()
        assert after.vault.unreadable.count == 0


async def test_after_a_failed_sync_the_files_of_the_log_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has marked the failed pages clean, so a second sync would prove nothing."""
    real = sync.syncfs

    def failing(directory: int) -> None:
        real(directory)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(4)
        await one.vault.retire(key_ids[0])
        keys = one.keys(key_ids)
        inodes = [one.file(key_id).stat().st_ino for key_id in key_ids]
        monkeypatch.setattr(journal, "syncfs", failing)
        one.vault.journal.flush()
        assert not (one.directory / NAME).exists()
        after = [one.file(key_id).stat().st_ino for key_id in key_ids]
        assert [new != old for new, old in zip(after, inodes, strict=True)] == [True, True, True, True]
        assert one.on_disk(key_ids[0]).state == "retired"
        assert one.keys(key_ids) == keys


# --- the replay -----------------------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "nothing": lambda content: content,
    "an empty file": lambda _: b"",
    "a torn file": lambda content: content[:700],
    "a block of zeros": lambda content: bytes(512) + content[512:],
    "zeros of the length": lambda content: bytes(len(content)),
}


async def crashed(directory: Path, count: int) -> tuple[dict[str, bytes], bytes]:
    """A stopped directory with keys; the keys and the log of before the stop."""
    async with opened_vault(directory) as one:
        keys = one.keys(await one.make(count))
        return keys, (directory / NAME).read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_replay_completes_files_that_a_power_loss_damaged(tmp_path: Path, damage: str) -> None:
    keys, log = await crashed(tmp_path / "d", 4)
    (tmp_path / "d" / NAME).write_bytes(log)
    absent, *others = keys
    paths = {key_id: tmp_path / "d" / "kms-deks" / f"{key_id}.json" for key_id in keys}
    paths[absent].unlink()
    for key_id in others:
        paths[key_id].write_bytes(DAMAGES[damage](paths[key_id].read_bytes()))
    inodes = {path.stat().st_ino for path in paths.values() if path.exists()}
    with SettledKeys(str(tmp_path / "d")) as settled:
        assert settled.key_ids() == sorted(keys)
        assert None not in [settled.read(key_id) for key_id in keys]
        assert settled.recovered == (1 if damage == "nothing" else 4)
    async with opened_vault(tmp_path / "d") as one:
        assert one.replayed == Replayed(1 if damage == "nothing" else 4)
        assert one.keys(keys) == keys
        assert not inodes & {path.stat().st_ino for path in paths.values()}, "each is written to a fresh file"
        assert not (one.directory / NAME).exists()


async def test_a_replay_leaves_newer_contents_and_destroyed_keys(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        retired, destroyed, usual = await one.make(3)
        log = (one.directory / NAME).read_bytes()
        await one.vault.retire(retired)
        await one.vault.retire(destroyed)
        await one.vault.destroy(destroyed)
    (tmp_path / "d" / NAME).write_bytes(log)
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert again.on_disk(retired).state == "retired"
        assert sorted(path.stem for path in (again.directory / "kms-deks").iterdir()) == sorted([retired, usual])
        assert_in_no_file(again.directory, destroyed)


async def test_a_key_under_a_kek_that_was_withdrawn_is_not_made(tmp_path: Path) -> None:
    """The keyring was restored from a backup that is older than the key."""
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        one.file(key_id).unlink()
        directory = open_directory(one.directory)
        done = replay(
            directory,
            one.vault.store,
            one.vault.rotation_backups,
            destroyed=(),
            has_kek=lambda version: version > 1,
            stamp="20260101T000000",
        )
        os.close(directory)
        assert done == Replayed()
        assert not one.file(key_id).exists()


def test_the_log_counts_among_the_keys_that_may_exist(tmp_path: Path) -> None:
    """An archive may hold such a key, so the receipt of its destruction must name the archive."""
    latest = make_key_id((1 << 48) - 1, bytes(10))
    (tmp_path / NAME).write_bytes(encode([Change(latest, b"", bytes([1]) * FILE_BYTES)]))
    assert newest_key_id(str(tmp_path)) == latest


# --- destruction ----------------------------------------------------------------------------------------------------


def assert_in_no_file(directory: Path, key_id: str) -> None:
    needle = b'"id":"%s"' % key_id.encode()
    paths = [path for path in directory.rglob("*") if path.is_file()]
    assert not [path for path in paths if needle in path.read_bytes()]


async def test_destroying_a_key_blanks_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the receipt leaves: while the disk refuses it, the destruction is not answered."""
    async with opened_vault(tmp_path / "d") as one:
        victim, other = await one.make(2)
        await one.vault.retire(victim)
        with failing_os(monkeypatch, "pwrite"), pytest.raises(StorageUnavailableError):
            await one.vault.destroy(victim)
        await one.vault.destroy(victim)
        assert_in_no_file(one.directory, victim)
        victim, other = other, (await one.make(1))[0]
        await one.vault.retire(victim)
        await one.vault.destroy(victim)
        assert logged(one) == [other]
        assert_in_no_file(one.directory, victim)


async def test_a_journal_that_a_replay_kept_gives_up_every_key(tmp_path: Path) -> None:
    """It is a backup of the retired key, and has the creates of others, outside the range of its old contents. They
    keep no KEK.
    """
    async with opened_vault(tmp_path / "d") as one:
        first, retired, last = [(await one.make(1))[0] for _ in range(3)]
        await one.vault.retire(retired)
        copied_vault(one, tmp_path / "killed")
    async with opened_vault(tmp_path / "killed") as after:
        await after.rotate()
        [kept] = (await after.pruning.prune(backups=False)).kept
        assert "a rotation backup of a key is wrapped under it" in kept.why
        for key_id in (first, last):
            await after.vault.retire(key_id)
            await after.vault.destroy(key_id)
            assert_in_no_file(after.directory, key_id)
        assert len(after.backups(retired)) == 2
        assert (await after.pruning.prune(backups=True)).destroyed == [1]


async def test_after_a_log_whose_removal_failed_a_create_begins_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be removed already: what were written to it would be lost."""
    for call in ("unlink", "fsync"):
        async with opened_vault(tmp_path / call) as one:
            await one.make(2)
            with failing_os(monkeypatch, call), pytest.raises(StorageUnavailableError):
                one.vault.journal.flush()
            key_ids = await one.make(1)
            assert logged(one) == key_ids


# --- after a kill or a failing disk -----------------------------------------------------------------------------------


async def test_the_directory_is_synced_before_the_log_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process was killed in a retire, after the rename and before the sync of the directory. The replay leaves the
    newer file, and without this sync a power loss would take the file's only name after the log is gone.
    """
    calls: list[str] = []
    synced, unlinked, renamed = os.fsync, os.unlink, os.rename

    def sync(descriptor: int) -> None:
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        synced(descriptor)

    def unlink(name: str, *, dir_fd: int | None = None) -> None:
        calls.append(name)
        unlinked(name, dir_fd=dir_fd)

    def rename(name: str, to: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        calls.append(name)
        renamed(name, to, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        await one.vault.retire(key_id)
        copied_vault(one, tmp_path / "killed")
        monkeypatch.setattr(os, "fsync", sync)
        monkeypatch.setattr(os, "unlink", unlink)
        monkeypatch.setattr(os, "rename", rename)
        async with opened_vault(tmp_path / "killed") as after:
            assert after.on_disk(key_id).state == "retired"
        assert "kms-deks" in calls[: calls.index(NAME)]
        calls.clear()
        monkeypatch.setattr(journal, "syncfs", refuse_sync)
        one.vault.journal.flush()
        assert "kms-deks" in calls[: calls.index(NAME)], "after a failed sync too"


def refuse_sync(_directory: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("healed", [False, True])
async def test_a_refused_create_does_not_come_back_after_a_kill(
    tmp_path: Path, healed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would retire the key that it was to replace, which the client still uses. `healed`: the disk accepts nothing
    at first, so the log is settled in the background.
    """
    monkeypatch.setattr(journal, "RETRY_SECONDS_MIN", 0.001)

    async with opened_vault(tmp_path / "d") as one:
        [old] = await one.make(1)
        with monkeypatch.context() as failing:
            failing.setattr(journal, "sync_data", refuse_sync)
            if healed:
                failing.setattr(journal, "remove_file", refuse)
            with pytest.raises(StorageUnavailableError):
                await create(one.vault, "t", replaces=old)
            if healed:
                await asyncio.sleep(0.02)
                assert (one.directory / NAME).exists()
        async with asyncio.timeout(60):
            while one.vault.journal.refusal:
                await asyncio.sleep(0.001)
        copied_vault(one, tmp_path / "killed")
    async with opened_vault(tmp_path / "killed") as after:
        await after.indexing.run()
        assert [path.stem for path in (after.directory / "kms-deks").iterdir()] == [old]
        assert after.on_disk(old).state == "active"


async def test_a_group_that_ends_before_its_files_are_made_is_made_anew(tmp_path: Path) -> None:
    def fails() -> None:
        raise RuntimeError("the event loop is closed")

    async with opened_vault(tmp_path / "d") as one:
        key = new_key(1)
        with pytest.raises(RuntimeError):
            one.vault.journal.write([key], fails)
        one.vault.journal.flush()
        assert one.file(key.key_id).read_bytes() == key.new


async def test_after_a_failed_sync_a_key_whose_file_is_gone_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has the only copy of a create that was answered. A destroyed key is not made again."""
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(2)
        victim, gone = key_ids
        keys = one.keys([gone])
        await one.vault.retire(victim)
        with failing_os(monkeypatch, "pwrite"), pytest.raises(StorageUnavailableError):
            await one.vault.destroy(victim)
        one.file(victim).unlink()
        one.file(gone).unlink()
        monkeypatch.setattr(journal, "syncfs", refuse_sync)
        one.vault.journal.flush()
        assert one.keys([gone]) == keys
        assert not one.file(victim).exists()


async def test_a_close_that_fails_closes_no_number_a_second_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel frees the number, and another file may have it soon."""
    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)
        with failing_os(monkeypatch, "close"):
            log: Journal = one.vault.journal
            log.close()
        closed: list[int] = []
        monkeypatch.setattr(os, "close", closed.append)
        log.close()
        monkeypatch.undo()
        assert closed == []


@pytest.mark.parametrize("damaged", ["the head", "an id", "a content", "a checksum"])
def test_bit_rot_in_the_log_is_counted_and_stops_no_start(tmp_path: Path, damaged: str) -> None:
    """The journal is kept as a rotation backup, until the keys of damaged records are destroyed."""
    at = {
        "the head": 3,
        "an id": len(MAGIC) + 9,
        "a content": len(MAGIC) + KEY_ID_BYTES + 100,
        "a checksum": len(MAGIC) + RECORD_BYTES - 2,
    }[damaged]

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = [(await one.make(1))[0] for _ in range(3)]
            copied_vault(one, tmp_path / "after")
        first, *others = key_ids
        flip(tmp_path / "after" / NAME, at)
        for key_id in key_ids[:2]:
            (tmp_path / "after" / "kms-deks" / f"{key_id}.json").unlink()
        async with opened_vault(tmp_path / "after") as after:
            await after.indexing.run()
            head = damaged == "the head"
            assert after.replayed == Replayed(2) if head else Replayed(1, damaged=1)
            assert len(after.keys(others)) == 2
            kept = list((after.directory / "kms-deks-backup").rglob("*.journal"))
            assert len(kept) == (0 if head else 1)
            if head:
                return
            content = kept[0].read_bytes()
            begin = content.index(b'{"id":"%s"' % first.encode())
            after.file(first).write_bytes(content[begin : begin + FILE_BYTES])  # as an operator would
            if damaged != "a content":
                assert len(after.keys([first])) == 1
                await after.vault.retire(first)
                await after.vault.destroy(first)
                assert_in_no_file(after.directory, first)

    asyncio.run(main())


@settings(max_examples=30)
@given(st.integers(1, 3), st.data())
def test_sectors_that_a_power_loss_took_are_no_damage(count: int, data: st.DataObject) -> None:
    """Also in front of intact records: a group is written in any order."""
    content = encode([new_key(number) for number in range(count)]).ljust(len(MAGIC) + 5 * RECORD_BYTES, b"\0")
    begin = data.draw(st.integers(0, len(content) // SECTOR_BYTES)) * SECTOR_BYTES
    end = min(begin + SECTOR_BYTES, len(content))
    assert decode(content[:begin] + bytes(end - begin) + content[end:]).damaged == []


# --- readers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [None, b""])
async def test_a_file_that_is_made_while_another_process_looks_for_it_is_found(
    tmp_path: Path, made: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is full and removed between the look at the file and the look into the log."""
    monkeypatch.setattr(settled_keys, "SETTLE_SECONDS", 0.0)

    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        content = one.file(key_id).read_bytes()
        one.file(key_id).unlink()
        if made is not None:
            one.file(key_id).write_bytes(made)

        def late(name: str, bytes_max: int, *, dir_fd: int) -> bytes | None:
            one.file(key_id).write_bytes(content)
            one.vault.journal.flush()
            return files.read_file_bounded(name, bytes_max, dir_fd=dir_fd)

        monkeypatch.setattr(settled_keys, "read_file_bounded", late)
        with SettledKeys(str(one.directory)) as settled:
            assert settled.read(key_id) == content


async def test_no_reader_gets_a_part_of_a_file_that_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the daemon through the store, in another process by `SettledKeys`. The file is empty until both have read
    it.
    """
    wrong: list[str] = []

    def slowly(directory: int, name: str, data: bytes, *, sync: bool) -> None:
        files.make_file(directory, name, b"", sync=sync)
        key_id = name.removesuffix(".json")
        with SettledKeys(str(tmp_path / "d")) as settled:
            if (store[0].read(key_id), settled.read(key_id)) != (data, data):
                wrong.append(key_id)
        (tmp_path / "d" / "kms-deks" / name).write_bytes(data)

    store: list[DekStore] = []

    async with opened_vault(tmp_path / "d") as one:
        store.append(one.vault.store)
        monkeypatch.setattr(journal, "make_file", slowly)
        monkeypatch.setattr(settled_keys, "SETTLE_SECONDS", 0.0)
        key_ids = await one.make(3)
        assert wrong == []
        assert len(one.keys(key_ids)) == 3
