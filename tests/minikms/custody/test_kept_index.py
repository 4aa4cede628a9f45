"""The key index of an orderly stop: the next start believes it, and nobody else."""

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.custody import kept_index
from minikms.custody.kept_index import NotKeptError
from minikms.keys import dek
from tests.harness.live_daemon import LiveDaemon
from tests.harness.logged import capture_logs
from tests.harness.vaults import OpenedVault, create, opened_vault
from tests.minikms.custody.test_indexing import in_index


async def stopped(one: OpenedVault) -> None:
    """What the daemon does at the end of an orderly stop."""
    await one.indexing.run()
    await one.vault.drain()
    one.data.keep_index()


def file_of(directory: Path) -> Path:
    return directory / kept_index.NAME


async def is_believed(directory: Path, threads: bool = False) -> tuple[bool, str]:
    async with opened_vault(directory, threads=threads) as one:
        return one.indexing.complete, one.data.why_no_index


@pytest.mark.parametrize("threads", [False, True])
async def test_a_start_has_every_key_of_the_stop_before_it_at_once(tmp_path: Path, threads: bool) -> None:
    async with opened_vault(tmp_path / "d", threads=threads) as one:
        key_ids = await one.make(5)
        await one.vault.retire(key_ids[0])
        await stopped(one)
        assert file_of(one.directory).stat().st_mode & 0o777 == 0o600
    async with opened_vault(tmp_path / "d", threads=threads) as again:
        assert (again.indexing.complete, again.data.why_no_index) == (True, "")
        assert in_index(again) == sorted(key_ids)
        assert again.vault.index.by_state == {"active": 4, "retired": 1}
        assert await again.vault.get_or_create("t", purpose="thread") == (max(key_ids[1:]), False)
        assert not threads or again.vault.index.thread_near(key_ids[0]) == ("t", True)
        with capture_logs() as logs:
            await again.indexing.run()
        assert logs == []
        await stopped(again)
    assert await is_believed(tmp_path / "d", threads) == (True, ""), "also one that was made from one"


async def test_an_altered_index_is_not_believed(tmp_path: Path) -> None:
    """Whatever byte is changed, missing, or too many."""

    async with opened_vault(tmp_path / "d") as one:
        await one.make(2)
        await stopped(one)
        whole = file_of(one.directory).read_bytes()
        directory = os.open(one.directory, os.O_RDONLY)

        def take(content: bytes) -> None:
            file_of(one.directory).write_bytes(content)
            epoch = one.vault.keyring.body.epoch
            kept_index.take(directory, one.vault.store, one.vault.unlocked, epoch=epoch, threads=False)

        take(whole)
        altered = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
        for content in (*altered, *(whole[:length] for length in range(len(whole))), whole + b"\0"):
            with pytest.raises(NotKeptError):
                take(content)
        os.close(directory)


def copied_back(directory: Path, kept: bytes) -> None:
    file_of(directory).write_bytes(kept)


def of_another_keyring(directory: Path, kept: bytes) -> None:
    shutil.copy(file_of(directory.with_name("other")), file_of(directory))


def key_file_removed(directory: Path, kept: bytes) -> None:
    next((directory / "kms-deks").iterdir()).unlink()


def key_file_added(directory: Path, kept: bytes) -> None:
    (directory / "kms-deks" / "new.json").touch()


def no_file(directory: Path, kept: bytes) -> None:
    file_of(directory).unlink()
    file_of(directory).mkdir()


@pytest.mark.parametrize("change", [copied_back, of_another_keyring, key_file_removed, key_file_added, no_file])
async def test_only_the_start_after_the_stop_believes_the_index(
    tmp_path: Path, change: Callable[[Path, bytes], None]
) -> None:
    directory = tmp_path / "d"
    for each in (directory, tmp_path / "other"):
        async with opened_vault(each) as one:
            await one.make(2)
            await stopped(one)
    kept = file_of(directory).read_bytes()
    if change is copied_back:
        assert await is_believed(directory) == (True, "")
    change(directory, kept)
    believed, why = await is_believed(directory)
    assert not believed
    assert why
    async with opened_vault(directory) as one:
        await one.indexing.run()
        assert len(one.vault.index) == 2 - (change is key_file_removed)


async def test_the_index_of_no_key_keeps_the_threads_of_later_ones(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d", threads=True) as one:
        await stopped(one)
    async with opened_vault(tmp_path / "d", threads=True) as one:
        assert one.indexing.complete
        [key_id] = await one.make(1, "later")
        assert one.vault.index.thread_near(key_id) == ("later", True)


async def test_an_index_without_threads_serves_no_start_with_a_policy(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.make(1)
        await stopped(one)
    assert (await is_believed(tmp_path / "d", threads=True))[0] is False


async def test_files_that_changed_behind_a_stopped_daemon_are_noticed(tmp_path: Path) -> None:
    """Also if the time of the directory was set back. The index is corrected while the daemon serves."""

    directory = tmp_path / "d"
    async with opened_vault(directory) as one:
        same, gone, other, damaged = await one.make(4)
        retired = await create(one.vault, "r")
        active = one.file(retired.id).read_bytes()
        await one.vault.retire(retired.id)
        added = await create(one.vault, "r")
        content = one.file(added.id).read_bytes()
        one.file(added.id).unlink()
        one.vault.index.remove(added.id)
        await stopped(one)
        folder = one.file(same).parent
        before = folder.stat()
        one.file(added.id).write_bytes(content)
        one.file(gone).unlink()
        one.file(other).write_bytes(dek.encode(dek.retired(one.on_disk(other), at="2026-12-01T00:00:00Z")))
        one.file(damaged).write_bytes(b"")
        one.file(retired.id).write_bytes(active)
        os.utime(folder, ns=(before.st_atime_ns, before.st_mtime_ns))
    async with opened_vault(directory) as again:
        assert again.indexing.complete
        with capture_logs() as logs:
            await again.indexing.run()
        [line] = logs
        assert (line["event"], line["keys"]) == ("key files have changed since the last stop", 5)
        assert set(line["first"]) == {gone, other, damaged, added.id, retired.id}
        assert in_index(again) == sorted([same, other, added.id, retired.id])
        assert +again.vault.index.by_state == {"active": 3, "retired": 1}
        assert set(again.vault.unreadable.key_ids()) == {damaged}


async def test_changes_while_the_files_are_compared_are_no_differences(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(300)
        for key_id in key_ids[:100]:
            await one.vault.retire(key_id)
        await stopped(one)
    async with opened_vault(tmp_path / "d") as again:
        await again.begin(None)
        with capture_logs() as logs:
            await asyncio.gather(
                again.indexing.run(),
                again.rotation.run(),
                again.make(50),
                *(again.vault.destroy(key_id) for key_id in key_ids[:100]),
                *(again.vault.retire(key_id) for key_id in key_ids[100:200]),
            )
        assert logs == []
        assert +again.vault.index.by_state == {"active": 150, "retired": 100}
        assert +again.vault.index.by_kek == {2: 250}


def test_a_daemon_keeps_its_index_over_a_stop_and_not_over_a_kill(public: Path) -> None:
    with LiveDaemon(public, "file") as daemon:

        def key_id() -> str:
            with daemon.client() as client:
                return client.get_or_create_dek_for_thread("t").key_id

        made = key_id()
        daemon.stop()
        kept = file_of(daemon.data_dir)
        content = kept.read_bytes()
        daemon.start()
        assert not kept.exists()
        assert "key index" not in daemon.log.read_text()
        assert key_id() == made
        daemon.kill()
        kept.write_bytes(content)
        daemon.start()
        assert "key index not used" in daemon.log.read_text()
        assert key_id() == made
        kept.mkdir()
        daemon.stop()
        assert "key index not kept" in daemon.log.read_text()
        daemon.start()
        assert key_id() == made
