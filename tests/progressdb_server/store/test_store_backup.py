"""Backups: made beside running writes, verified, shared between each other, restored into an empty place."""

import asyncio
import errno
import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from progressdb_server.conversations.whole import Conversations
from progressdb_server.store import backup
from progressdb_server.store.check import Checker
from progressdb_server.store.model import (
    BackupBusyError,
    BackupError,
    BackupExistsError,
    BackupFile,
    BackupNotFoundError,
    BackupThereError,
    Manifest,
    NewMessage,
    RegisteredBackup,
)
from progressdb_server.store.offline import LocalView
from progressdb_server.store.rocks.engine import RocksEngine
from tests.harness.disk_faults import flip
from tests.progressdb_server.store.opened_store import disk, messages_of, opened
from tests.progressdb_server.store.sealing_provider import SealingProvider


async def write(store: Conversations, count: int) -> list[str]:
    made = [store.messages.create(NewMessage(author="ann", thread=f"t{n % 5}", body="x" * 200)) for n in range(count)]
    return [message.id for message in await asyncio.gather(*made)]


async def back_up(store: Conversations, path: Path) -> Manifest:
    return await store.backups.back_up(str(path))


async def test_a_backup_made_under_load_holds_what_was_acknowledged_before_it(tmp_path: Path) -> None:
    provider = SealingProvider()

    async with opened(RocksEngine(str(tmp_path / "db")), provider) as store:
        before = await write(store, 300)
        during = asyncio.create_task(write(store, 300))
        manifest = await back_up(store, tmp_path / "one")
        await during
        assert manifest.bytes > 300 * 200
    await asyncio.to_thread(backup.restore, str(tmp_path / "one"), str(tmp_path / "restored"))
    async with opened(RocksEngine(str(tmp_path / "restored")), provider) as store:
        for message in before:
            assert (await store.reading.message(message)).value == "x" * 200
        assert [finding async for finding in Checker(LocalView(disk(store)), provider).run()] == []
        assert (await store.stats())["messages"] >= 300
        await write(store, 5)
        assert len(await messages_of(store, "t0")) > 60


async def test_the_next_backup_needs_nothing_of_the_one_before(tmp_path: Path) -> None:
    provider = SealingProvider()

    async with opened(RocksEngine(str(tmp_path / "db")), provider) as store:
        await write(store, 200)
        first = await back_up(store, tmp_path / "one")
        await write(store, 10)
        await back_up(store, tmp_path / "two")
        begun = [known async for known in store.backups.registered()]
        assert [one.path for one in begun] == [str(tmp_path / "one"), str(tmp_path / "two")]
        assert begun[0].created_ns == first.created_ns
    shutil.rmtree(tmp_path / "one")
    backup.restore(str(tmp_path / "two"), str(tmp_path / "restored"))
    async with opened(RocksEngine(str(tmp_path / "restored")), provider) as store:
        assert (await store.stats())["messages"] == 210


async def made(tmp_path: Path) -> Path:
    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        await write(store, 20)
        await back_up(store, tmp_path / "one")
    return tmp_path / "one"


async def test_an_altered_missing_or_added_file_is_named(tmp_path: Path) -> None:
    path = await made(tmp_path)
    backup.verify(str(path))
    table = next(path.glob("store/*.sst"))
    content = table.read_bytes()
    table.write_bytes(content[:-1] + bytes((content[-1] ^ 1,)))
    with pytest.raises(BackupError, match=table.name):
        backup.restore(str(path), str(tmp_path / "restored"))
    assert not (tmp_path / "restored").exists()
    table.unlink()
    with pytest.raises(BackupError, match=table.name):
        backup.verify(str(path))
    table.write_bytes(content)
    (path / "store" / "extra").write_bytes(b"")
    with pytest.raises(BackupError, match="extra"):
        backup.verify(str(path))


async def test_a_backup_without_its_manifest_is_not_complete(tmp_path: Path) -> None:
    path = await made(tmp_path)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()
    with pytest.raises(BackupError, match="no complete backup"):
        backup.restore(str(path), str(tmp_path / "restored"))
    for damage, why in [
        (b"{", "damaged"),
        (content.replace(b'"format": 1', b'"format": 2'), "format 2"),
        (content.replace(b'"name": "CURRENT"', b'"name": "../../x"'), "outside"),
    ]:
        manifest.write_bytes(damage)
        with pytest.raises(BackupError, match=why):
            backup.verify(str(path))


async def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = await made(tmp_path)
    with pytest.raises(BackupError, match="not empty"):
        backup.restore(str(path), str(tmp_path / "db"))

    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        with pytest.raises(BackupError, match="exists"):
            await back_up(store, path)


async def test_the_files_of_backup_and_restore_are_their_owners_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        path = await made(tmp_path)
        backup.restore(str(path), str(tmp_path / "restored"))
    finally:
        os.umask(old)
    for directory in (path, path / "store", tmp_path / "restored"):
        assert directory.stat().st_mode & 0o077 == 0
    for file in [*path.glob("store/*"), path / "manifest.json", *(tmp_path / "restored").glob("*")]:
        assert file.stat().st_mode & 0o077 == 0


async def registered(store: Conversations) -> list[str]:
    return [known.name async for known in store.backups.registered()]


async def test_a_backup_that_fails_leaves_neither_files_nor_an_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a full disk would keep every old key for good, and the name taken."""
    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        await write(store, 20)
        with monkeypatch.context() as patch:
            patch.setattr(backup, "sync_directory", _no_space)
            with pytest.raises(BackupError, match="No space left"):
                await back_up(store, tmp_path / "one")
        assert not (tmp_path / "one").exists()
        assert await registered(store) == []
        await back_up(store, tmp_path / "one")
        assert await registered(store) == ["one"]


async def test_a_cancelled_backup_ends_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C cancels `progressdb backup create`. The engine is closed after it, so nothing may use it any more."""
    copying, released = threading.Event(), threading.Event()
    copied: list[str] = []
    copy = shutil.copyfileobj

    def slowly(source: Any, target: Any, length: int) -> None:
        copying.set()
        assert released.wait(60)
        copied.append(target.name)
        copy(source, target, length)

    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        await write(store, 20)
        monkeypatch.setattr(shutil, "copyfileobj", slowly)
        making = asyncio.create_task(back_up(store, tmp_path / "one"))
        assert await asyncio.to_thread(copying.wait, 60)
        making.cancel()
        await asyncio.sleep(0.05)
        assert not making.done()  # one file is still being copied
        released.set()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert len(copied) == 1
        assert not (tmp_path / "one").exists()
        assert await registered(store) == []
        await back_up(store, tmp_path / "one")


def _no_space(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def test_one_backup_at_a_time_and_none_in_the_place_of_another(tmp_path: Path) -> None:
    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        await write(store, 20)
        both = await asyncio.gather(
            back_up(store, tmp_path / "one"), back_up(store, tmp_path / "one"), return_exceptions=True
        )
        assert [type(outcome) for outcome in both] == [Manifest, BackupBusyError]
        with pytest.raises(BackupExistsError):
            await back_up(store, tmp_path / "one")
        assert await registered(store) == ["one"]
        backup.verify(str(tmp_path / "one"))


async def test_a_deleted_backup_is_registered_until_it_is_forgotten(tmp_path: Path) -> None:
    """A present one stays registered."""
    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        for name in ("one", "two"):
            await back_up(store, tmp_path / name)
        shutil.rmtree(tmp_path / "one")
        assert await registered(store) == ["one", "two"]
        with pytest.raises(BackupThereError):
            await store.backups.forget("two")
        for unknown in ("three", "", "..", str(tmp_path / "one")):
            with pytest.raises(BackupNotFoundError):
                await store.backups.forget(unknown)
        assert [known.name for known in await store.backups.forget("one")] == ["one"]
        assert await registered(store) == ["two"]


def test_a_place_that_can_not_be_looked_at_counts_as_there(tmp_path: Path) -> None:
    """Such as one whose file system does not answer: only what is surely not found can be forgotten."""
    assert RegisteredBackup(str(tmp_path / "none"), 1).gone
    assert RegisteredBackup(str(tmp_path / "none" / "deeper"), 1).gone
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not RegisteredBackup(str(tmp_path / "loop" / "one"), 1).gone
    assert not RegisteredBackup(str(tmp_path / "loop"), 1).gone


def damaged_table(directory: Path) -> Path:
    table = max(directory.glob("*.sst"), key=lambda file: file.stat().st_size)
    flip(table, table.stat().st_size // 2)
    return table


async def test_no_backup_is_made_of_a_store_with_a_damaged_block(tmp_path: Path) -> None:
    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        await write(store, 200)
    async with opened(RocksEngine(str(tmp_path / "db"))) as store:
        good = await back_up(store, tmp_path / "good")
        table = damaged_table(tmp_path / "db")
        with pytest.raises(BackupError, match=table.name):
            await back_up(store, tmp_path / "bad")
        assert not (tmp_path / "bad").exists()
        assert [known.name async for known in store.backups.registered()] == ["good"]
    assert backup.verify(str(tmp_path / "good")) == good


async def test_a_damaged_block_that_was_backed_up_is_found(tmp_path: Path) -> None:
    """As by a version that compared files only."""
    path = await made(tmp_path)
    table = damaged_table(path / "store")
    manifest = path / "manifest.json"
    known = backup.read_manifest(str(path))
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    files = [BackupFile(file.name, file.bytes, digest) if file.name == table.name else file for file in known.files]
    manifest.write_bytes(msgspec.json.encode(msgspec.structs.replace(known, files=files)))
    with pytest.raises(BackupError, match=f"the file {table.name}"):
        backup.verify(str(path))
    with pytest.raises(BackupError, match=f"the file {table.name}"):
        backup.restore(str(path), str(tmp_path / "restored"))
    assert not (tmp_path / "restored").exists()
