"""The journal of a rotation: each batch is written whole, and a replay completes what a crash interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import StartError, StorageUnavailableError
from minikms.custody import create_log, deks, rewrap_journal
from minikms.custody.files import open_directory
from minikms.custody.rewrap_journal import (
    MAGIC,
    NAME,
    RECORD_BYTES,
    Record,
    Replayed,
    Rewrap,
    RewrapJournal,
    replay,
)
from minikms.custody.settled_keys import SettledKeys
from minikms.keys import dek
from minikms.keys.dek import FILE_BYTES, bytes_to_key_id
from tests.harness.vaults import OpenedVault, opened_vault
from tests.minikms.custody.disk_faults import failing_os

VECTORS = Path(__file__).parents[2] / "vectors"
STAMP = "20260101T000000"


def record(number: int) -> Record:
    old, new = (bytes([number, side]) * (FILE_BYTES // 2) for side in (1, 2))
    return Record(bytes_to_key_id(number.to_bytes(16, "big")), old, new)


# --- the format -----------------------------------------------------------------------------------------------------


def test_the_known_journal_is_read_and_written_in_the_same_bytes() -> None:
    known = json.loads((VECTORS / "formats.json").read_text())["dek"]
    content = bytes.fromhex(known["rewrap_journal"])
    [found], damaged = rewrap_journal.decode(content)
    assert damaged == 0
    assert (found.key_id, found.old.decode(), found.new.decode()) == (known["key_id"], *known["files"])
    assert rewrap_journal.encode([found]) == content


@given(st.integers(0, 4), st.data())
def test_a_torn_journal_has_all_records_before_the_tear(count: int, data: st.DataObject) -> None:
    records = [record(number) for number in range(count)]
    whole = rewrap_journal.encode(records)
    cut = data.draw(st.integers(0, len(whole)))
    for torn in (whole[:cut], whole[:cut] + bytes(len(whole) - cut)):
        found, damaged = rewrap_journal.decode(torn)
        intact = max(0, cut - len(MAGIC)) // RECORD_BYTES
        assert found == records[:intact]
        assert damaged <= count - intact


@given(st.data())
def test_a_damaged_record_is_left_out_and_no_other_one(data: st.DataObject) -> None:
    records = [record(number) for number in range(3)]
    content = bytearray(rewrap_journal.encode(records))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    found, damaged = rewrap_journal.decode(bytes(content))
    if at < len(MAGIC):
        assert (found, damaged) == (records, 0)
    else:
        hit = (at - len(MAGIC)) // RECORD_BYTES
        assert (found, damaged) == (records[:hit] + records[hit + 1 :], 1)


def test_a_journal_of_another_version_is_refused() -> None:
    with pytest.raises(StartError, match="another version of miniKMS"):
        rewrap_journal.decode(MAGIC[:-1] + b"\x02" + bytes(5000))


# --- a batch --------------------------------------------------------------------------------------------------------


async def rewraps(one: OpenedVault, key_ids: list[str]) -> list[Rewrap]:
    """What a rotation would write: the old contents are on disk again afterwards."""
    olds = {key_id: one.file(key_id).read_bytes() for key_id in key_ids}
    await one.rotate()
    batch = [
        Rewrap.make(key_id, old=olds[key_id], kept=olds[key_id], new=one.file(key_id).read_bytes())
        for key_id in key_ids
    ]
    for rewrap in batch:
        one.file(rewrap.key_id).write_bytes(rewrap.old)
    return batch


def journal_of(one: OpenedVault) -> RewrapJournal:
    return one.vault.rewraps


async def write(one: OpenedVault, batch: list[Rewrap], stamp: str = STAMP) -> None:
    async with one.vault.locks.hold(rewrap.key_id for rewrap in batch) as held:
        journal_of(one).write(held, batch, stamp)


def test_a_batch_keeps_inodes_leaves_a_backup_and_no_journal(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            batch = await rewraps(one, await one.make(5))
            inodes = [one.file(rewrap.key_id).stat().st_ino for rewrap in batch]
            await write(one, batch)
            assert [one.file(rewrap.key_id).stat().st_ino for rewrap in batch] == inodes
            assert all(one.file(rewrap.key_id).read_bytes() == rewrap.new for rewrap in batch)
            [path] = (one.directory / "kms-deks-backup" / STAMP).iterdir()
            assert path.read_bytes() == b"".join(rewrap.old for rewrap in sorted(batch))
            assert not (one.directory / NAME).exists()
            assert not journal_of(one).live

    asyncio.run(main())


def test_a_file_with_two_links_is_replaced_by_rename(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            linked, _ = batch = await rewraps(one, await one.make(2))
            copy = tmp_path / "copy"
            os.link(one.file(linked.key_id), copy)
            await write(one, batch)
            assert copy.read_bytes() == linked.old
            assert all(one.file(rewrap.key_id).read_bytes() == rewrap.new for rewrap in batch)

    asyncio.run(main())


def test_a_file_that_vanished_is_not_made_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            gone, usual = batch = await rewraps(one, await one.make(2))
            one.file(gone.key_id).unlink()
            await write(one, batch)
            assert not one.file(gone.key_id).exists()
            assert one.file(usual.key_id).read_bytes() == usual.new

    asyncio.run(main())


@pytest.mark.parametrize("call", ["mkdir", "write", "rename", "fsync", "pwrite", "unlink", "open"])
def test_a_batch_on_a_failing_disk_is_whole_or_withdrawn(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each call of this kind in turn: then `settle` completes the batch, or no file has changed."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            batch = await rewraps(one, await one.make(2))
            for at in range(1, 100):
                for rewrap in batch:
                    one.file(rewrap.key_id).write_bytes(rewrap.old)
                with failing_os(monkeypatch, call, at=at):
                    try:
                        await write(one, batch, f"20260101T{at:06}")
                    except StorageUnavailableError:
                        if journal_of(one).live:
                            with contextlib.suppress(StorageUnavailableError):
                                journal_of(one).settle()
                    else:
                        break
                changed = journal_of(one).settle() if journal_of(one).live else None
                found = {one.file(rewrap.key_id).read_bytes() for rewrap in batch}
                assert found in ({rewrap.old for rewrap in batch}, {rewrap.new for rewrap in batch})
                assert changed is None or (found == {rewrap.new for rewrap in batch}) == changed
                assert not (one.directory / NAME).exists()
            assert 1 < at < 99

    asyncio.run(main())


def test_no_second_batch_begins_while_a_journal_is_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            batch = await rewraps(one, await one.make(2))
            with failing_os(monkeypatch, "pwrite"), pytest.raises(StorageUnavailableError):
                await write(one, batch)
            assert journal_of(one).live
            with pytest.raises(StorageUnavailableError, match="not settled"):
                await write(one, batch)
            [victim] = await one.make(1)
            await one.vault.retire(victim)
            with pytest.raises(StorageUnavailableError, match="journal of a KEK rotation may hold the key"):
                await one.vault.destroy(victim)
            assert journal_of(one).settle()
            await one.vault.destroy(victim)

    asyncio.run(main())


# --- the replay -----------------------------------------------------------------------------------------------------


def mixture(rewrap: Rewrap) -> bytes:
    """Valid JSON, in which only half of the wrapped key is new."""
    at = rewrap.old.index(b'"wrapped":"') + 40
    return rewrap.new[:at] + rewrap.old[at:]


Damage = Callable[[Rewrap], bytes]
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


def put_journal(one: OpenedVault, batch: list[Rewrap]) -> None:
    (one.directory / NAME).write_bytes(rewrap_journal.encode(Record(each.key_id, each.old, each.new) for each in batch))


@pytest.mark.parametrize("state", STATES)
def test_a_replay_completes_the_batch_and_leaves_other_contents(tmp_path: Path, state: str) -> None:
    before, after = STATES[state]

    async def main() -> None:
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
            aside = list((again.directory / "kms-deks-backup").glob("k_*"))
            assert len(aside) == (4 if state in ("a block of zeros", "a cut file", "an empty file") else 0)
            assert set(again.replayed.set_aside) == {path.name[:28] for path in aside}

    asyncio.run(main())


def test_a_replay_syncs_the_directory_although_it_writes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process was killed in a retire, after the rename and before the sync of the directory."""
    synced = os.fsync
    calls: list[str] = []

    def sync(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(name if (tmp_path / "d" / NAME).exists() else "")
        synced(descriptor)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            batch = await rewraps(one, await one.make(1))
            await one.vault.retire(batch[0].key_id)
            put_journal(one, batch)
        monkeypatch.setattr(os, "fsync", sync)
        async with opened_vault(tmp_path / "d") as again:
            assert again.replayed == Replayed()
            assert "kms-deks" in calls

    asyncio.run(main())


def test_a_directory_of_a_key_files_name_costs_no_content(tmp_path: Path) -> None:
    """The replay keeps the content as a rotation backup before it removes the journal, and the start reports it."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            obstructed, usual = batch = await rewraps(one, await one.make(2))
            put_journal(one, batch)
            one.file(obstructed.key_id).unlink()
            one.file(obstructed.key_id).mkdir()
        async with opened_vault(tmp_path / "d") as again:
            assert again.replayed == Replayed(written=1, obstructed=(obstructed.key_id,))
            assert obstructed.new in again.backups(obstructed.key_id)
            assert again.file(usual.key_id).read_bytes() == usual.new

    asyncio.run(main())


def test_where_no_second_link_can_be_made_the_new_content_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The damaged bytes are lost, and not the key."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [rewrap] = batch = await rewraps(one, await one.make(1))
            put_journal(one, batch)
            one.file(rewrap.key_id).write_bytes(b"")
        with failing_os(monkeypatch, "link", number=errno.EPERM):
            async with opened_vault(tmp_path / "d") as again:
                assert again.replayed == Replayed(written=1)
                assert again.file(rewrap.key_id).read_bytes() == rewrap.new

    asyncio.run(main())


def test_a_reader_beside_the_daemon_parses_journal_and_log_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each key: a backup of many keys beside a journal would take hours."""
    parsed: list[str] = []
    decode_log, decode_journal = create_log.decode, rewrap_journal.decode

    def of_log(content: bytes) -> create_log.Decoded:
        parsed.append(create_log.NAME)
        return decode_log(content)

    def of_journal(content: bytes) -> tuple[list[Record], int]:
        parsed.append(NAME)
        return decode_journal(content)

    monkeypatch.setattr(create_log, "decode", of_log)
    monkeypatch.setattr(rewrap_journal, "decode", of_journal)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(6)
            batch = await rewraps(one, key_ids)
            put_journal(one, batch[:2])
            for key_id in key_ids[4:]:
                one.file(key_id).unlink()
            log = create_log.encode([create_log.NewKey(rewrap.key_id, rewrap.old) for rewrap in batch])
            (one.directory / create_log.NAME).write_bytes(log)
            os.utime(one.directory / create_log.NAME, ns=(1, 1))
            with SettledKeys(str(one.directory)) as settled:
                assert settled.key_ids() == sorted(key_ids)
                contents = [settled.read(key_id) for key_id in key_ids]
                assert contents == [rewrap.old for rewrap in batch]
                assert sorted(parsed) == [create_log.NAME, NAME]
                put_journal(one, batch)
                one.file(key_ids[2]).write_bytes(b"")
                assert settled.read(key_ids[2]) == batch[2].new, "a new journal is noticed"

    asyncio.run(main())


def test_a_replay_makes_no_file_of_an_absent_or_destroyed_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            key_ids = await one.make(3)
            absent, destroyed, usual = batch = await rewraps(one, key_ids)
            await one.vault.retire(destroyed.key_id)
            await one.vault.destroy(destroyed.key_id)
            one.file(absent.key_id).unlink()
            put_journal(one, batch)
        async with opened_vault(tmp_path / "d") as again:
            assert again.replayed == Replayed(written=1)
            assert [path.stem for path in (again.directory / "kms-deks").iterdir()] == [usual.key_id]
            needle = b'"id":"%s"' % destroyed.key_id.encode()
            paths = [path for path in again.directory.rglob("*") if path.is_file()]
            assert not any(needle in path.read_bytes() for path in paths)

    asyncio.run(main())


def test_a_destroyed_key_with_a_file_of_before_stays_destroyed(tmp_path: Path) -> None:
    """The crash came between the tombstone and the removal of the file."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [gone, _] = batch = await rewraps(one, await one.make(2))
            await one.vault.retire(gone.key_id)
            await one.vault.destroy(gone.key_id)
            put_journal(one, batch)
            one.file(gone.key_id).write_bytes(gone.old)
        async with opened_vault(tmp_path / "d") as again:
            await again.indexing.run()
            assert not again.file(gone.key_id).exists()

    asyncio.run(main())


def test_under_a_restored_keyring_a_replay_writes_the_old_contents(tmp_path: Path) -> None:
    """The keyring lacks the KEK of the new contents."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            batch = await rewraps(one, await one.make(2))
            put_journal(one, batch)
            one.file(batch[0].key_id).write_bytes(batch[0].new[:512] + batch[0].old[512:])
            backups, store = one.vault.rotation_backups, one.vault.store
            directory = open_directory(one.directory)
            done = replay(directory, store, backups, destroyed=(), has_kek=lambda version: version == 1, stamp=STAMP)
            os.close(directory)
            assert done == Replayed(written=2)
            assert all(one.file(rewrap.key_id).read_bytes() == rewrap.old for rewrap in batch)

    asyncio.run(main())


# --- readers --------------------------------------------------------------------------------------------------------


def test_readers_see_the_old_or_the_new_content_while_a_key_is_overwritten(tmp_path: Path) -> None:
    """In the daemon through the store, in another process by `read_settled`; the overwrites have the same calls."""

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            batch = await rewraps(one, await one.make(2))
            store = one.vault.store
            allowed = {rewrap.key_id: {rewrap.old, rewrap.new} for rewrap in batch}
            stop = threading.Event()
            wrong: list[str] = []

            def read() -> None:
                while not stop.is_set():
                    for key_id, contents in allowed.items():
                        settled = deks.read_settled(
                            deks.file_name(key_id), dir_fd=store.directory_fd, is_valid=contents.__contains__
                        )
                        if store.read(key_id) not in contents or settled not in contents:
                            wrong.append(key_id)

            readers = [threading.Thread(target=read) for _ in range(3)]
            for reader in readers:
                reader.start()
            for number in range(60):
                changes = (
                    batch
                    if number % 2
                    else [Rewrap.make(one.key_id, old=one.new, kept=one.new, new=one.old) for one in batch]
                )
                store.answer_with({change.key_id: change.new for change in changes})
                await write(one, changes)
                store.answer_with({})
            stop.set()
            for reader in readers:
                reader.join()
            assert wrong == []

    asyncio.run(main())


def test_after_a_crash_a_reader_beside_the_daemon_finds_whole_contents(tmp_path: Path) -> None:
    """As a backup of a stopped daemon's directory does. A key that the journal does not have is not mended."""

    async def main() -> None:
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

    asyncio.run(main())


def test_a_content_is_read_again_until_it_settles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not settle is returned as it is."""

    directory = open_directory(tmp_path)
    contents = iter([b"mixture", b"new", b"new"])
    monkeypatch.setattr(deks, "read_file_bounded", lambda *_, **__: next(contents))
    monkeypatch.setattr(deks, "SETTLE_SECONDS", 0)
    assert deks.read_settled("f", dir_fd=directory, is_valid=lambda content: content == b"new") == b"new"
    reads = iter([b"bad"] * deks.SETTLE_READS_MAX)
    monkeypatch.setattr(deks, "read_file_bounded", lambda *_, **__: next(reads))
    assert deks.read_settled("f", dir_fd=directory, is_valid=lambda content: False) == b"bad"
    assert list(reads) == []
    monkeypatch.undo()
    assert deks.read_settled("absent", dir_fd=directory, is_valid=lambda content: True) is None
    os.close(directory)
