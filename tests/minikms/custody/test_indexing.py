"""The scan after a start: it finds every readable key, and completes what an earlier process left."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from minikms import api
from minikms.api.errors import StorageUnavailableError
from minikms.audit import Event
from minikms.custody import deks, vault
from minikms.custody.deks import DekStore, HeldKeys
from minikms.keys import dek
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.lifecycle import LifecycleVerbs
from tests.harness.vaults import OpenedVault, SilentAudit, create, opened_vault


def in_index(one: OpenedVault) -> list[str]:
    return one.vault.index.page(after="", limit=1000, thread_id=None, state=None).key_ids


async def test_every_key_is_in_the_index_after_the_scan_in_order_of_creation(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(300)
    async with opened_vault(tmp_path / "d") as again:
        before = again.indexing.complete
        meanwhile = await again.make(3)
        await again.indexing.run()
        assert (before, again.indexing.complete) == (False, True)
        assert in_index(again) == sorted(key_ids + meanwhile)
        assert again.vault.index.by_kek == {1: 303}


async def test_changes_during_the_scan_are_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vault, "SCAN_FILES", 5)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(100)
        for key_id in key_ids[:20]:
            await one.vault.retire(key_id)
    async with opened_vault(tmp_path / "d") as again:
        await asyncio.gather(
            again.indexing.run(),
            *(again.vault.destroy(key_id) for key_id in key_ids[:20]),
            *(again.vault.retire(key_id) for key_id in key_ids[20:50]),
        )
        assert +again.vault.index.by_state == {"active": 50, "retired": 30}


async def test_an_unreadable_file_is_listed_with_its_reason(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(10)
        bad = {
            key_ids[0]: b"",
            key_ids[1]: b"{}",
            key_ids[2]: one.file(key_ids[3]).read_bytes(),
            key_ids[4]: one.file(key_ids[4]).read_bytes().replace(b'"format":1', b'"format":9'),
        }
        for key_id, content in bad.items():
            one.file(key_id).write_bytes(content)
        one.file(key_ids[5]).unlink()
        one.file(key_ids[5]).mkdir()
        (one.directory / "kms-deks" / "notes.txt").write_text("not ours")
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert set(again.vault.unreadable.listed()) == {*bad, key_ids[5]}
        assert "format version 9" in again.vault.unreadable.listed()[key_ids[4]]
        assert len(again.vault.index) == 5
        again.file(key_ids[0]).write_bytes(b"")
        assert again.vault.unreadable.count == 5


async def test_a_repaired_file_leaves_the_list_when_it_is_opened(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        content = one.file(key_id).read_bytes()
        one.file(key_id).write_bytes(content[:10])
        await one.indexing.run()
        assert one.vault.unreadable.count == 1
        one.file(key_id).write_bytes(content)
        one.vault.opened(key_id)
        assert one.vault.unreadable.count == 0


async def test_a_replacement_that_a_crash_cut_in_two_is_finished(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        old = await create(one.vault, "t")
        new = await create(one.vault, "t", replaces=old.id)
        one.file(old.id).write_bytes(dek.encode(old))  # as it was before the second half
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert again.on_disk(old.id).state == "retired"
        assert again.on_disk(old.id).replaced_by == new.id
        assert again.on_disk(new.id).state == "active"


async def test_a_record_cannot_replace_a_key_of_another_thread(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        victim = await create(one.vault, "victim")
        other = await create(one.vault, "other")
        replaces = msgspec.structs.replace(one.on_disk(other.id), replaces=victim.id)
        one.file(other.id).write_bytes(dek.encode(replaces))
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert again.on_disk(other.id).replaces == victim.id
        assert again.on_disk(victim.id).state == "active"


async def test_a_failing_disk_delays_the_scan_and_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault, "SCAN_RETRY_SECONDS", 0.01)
    failing = [3]
    read = DekStore.read

    def refusing(self: DekStore, key_id: str) -> bytes:
        if failing[0]:
            failing[0] -= 1
            raise StorageUnavailableError("out of descriptors")
        return read(self, key_id)

    async with opened_vault(tmp_path / "d") as one:
        await one.make(4)
    async with opened_vault(tmp_path / "d") as again:
        monkeypatch.setattr(DekStore, "read", refusing)
        monkeypatch.setattr(deks, "read_files_of", lambda names, *_, **__: [None for _ in names])
        await again.indexing.run()
        assert (len(again.vault.index), again.vault.unreadable.count) == (4, 0)


async def test_a_resumed_rotation_does_not_bring_back_a_destroyed_keys_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash left the file. The rotation has read it, and the scan removes it before the rotation replaces it."""
    async with opened_vault(tmp_path / "d") as one:
        gone, other = await one.make(2)
        content = one.file(gone).read_bytes()
        await one.vault.retire(gone)
        await one.begin(None)
        await one.vault.destroy(gone)
        one.file(gone).write_bytes(content)
    async with opened_vault(tmp_path / "d") as again:
        hold = again.vault.locks.hold
        scanned = False

        @contextlib.asynccontextmanager
        async def after_the_scan(key_ids: list[str], **named: Any) -> AsyncIterator[HeldKeys]:
            nonlocal scanned
            if key_ids and not scanned:
                scanned = True
                await again.indexing.run()
            async with hold(key_ids, **named) as held:
                yield held

        monkeypatch.setattr(again.vault.locks, "hold", after_the_scan)
        await again.rotation.run()
        assert scanned
        assert again.on_disk(other).kek_version == 2
        assert not again.file(gone).exists()
        assert again.backups(gone) == []
        assert len(again.vault.index) == 1


async def test_a_file_replaced_during_the_listing_is_in_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(2)
        await one.begin(None)
    async with opened_vault(tmp_path / "d") as again:
        real = deks.list_names
        missed = [deks.file_name(key_ids[0])]

        def list_names(directory: str) -> Iterator[str]:
            yield from (name for name in list(real(directory)) if name not in missed)
            missed.clear()

        monkeypatch.setattr(deks, "list_names", list_names)
        await again.indexing.run()
        assert len(again.vault.index) == 2


async def test_a_page_of_an_incomplete_index_says_so_also_if_it_is_complete_then(tmp_path: Path) -> None:
    """The page was taken before, so it may lack keys."""
    async with opened_vault(tmp_path / "d") as one:
        await one.make(3)
    async with opened_vault(tmp_path / "d") as one:
        go_on = threading.Event()
        with ThreadPoolExecutor(1) as reader:
            reader.submit(go_on.wait, 60)
            verbs = LifecycleVerbs(
                vault=one.vault, table=VerbTable(SilentAudit()), indexing=one.indexing, reader=reader
            )
            listing = asyncio.ensure_future(
                verbs.list_keys(one.vault, api.ListKeysRequest(), Event(type="t", actor="t"))
            )
            await asyncio.sleep(0)
            await one.indexing.run()
            assert one.indexing.complete
            go_on.set()
            answer = await listing
        assert (answer.keys, answer.indexing) == ([], True)
        later = await LifecycleVerbs(
            vault=one.vault, table=VerbTable(SilentAudit()), indexing=one.indexing, reader=one.reader
        ).list_keys(one.vault, api.ListKeysRequest(), Event(type="t", actor="t"))
        assert (len(later.keys), later.indexing) == (3, False)
