"""The vault: every change of a key is complete or undone, and many callers do not exhaust the arena."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minikms.api.errors import (
    ArenaFullError,
    ConflictError,
    KeyDestroyedError,
    KeyNotFoundError,
    KeyRetiredError,
    StorageUnavailableError,
    WrongThreadError,
)
from minikms.custody.deks import HeldKeys
from minikms.custody.journal import Journal
from minikms.custody.journal_format import Change
from tests.harness.vaults import create, opened_vault


async def test_a_key_is_on_disk_before_its_id_is_answered(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        record = await create(one.vault, "thread")
        assert one.on_disk(record.id) == record
        key = one.keys([record.id])
    async with opened_vault(tmp_path / "d") as again:
        assert again.keys([record.id]) == key


async def test_creates_that_wait_for_the_disk_hold_no_slot_of_the_arena(tmp_path: Path) -> None:
    """Otherwise a few hundred of them would make every other request fail."""
    async with opened_vault(tmp_path / "d", slots=16, cache_keys_max=4) as one:
        await one.make(1)  # it leaves the key that is derived from the KEK
        used = one.arena.in_use
        key_ids = await one.make(200)
        assert one.arena.in_use == used
        assert len(one.keys(key_ids)) == 200
        assert one.arena.in_use == used + 4


async def test_making_many_keys_leaves_the_opened_ones_in_the_cache(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d", cache_keys_max=2) as one:
        [hot] = await one.make(1)
        opened = one.vault.opened(hot)
        await one.make(20)
        assert one.vault.opened(hot) is opened


async def test_an_error_among_the_files_read_keeps_no_frame(tmp_path: Path) -> None:
    """The frame that caught it has the list that it is in: a cycle that only the collector would free."""
    async with opened_vault(tmp_path / "d") as one:
        [(_, error)] = one.vault.store.read_many(["k_00000000000000000000000000"])
        assert isinstance(error, KeyNotFoundError)
        assert error.__traceback__ is None


async def test_a_full_arena_does_not_make_a_key_unreadable(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d", slots=12) as one:
        [key_id] = await one.make(1)
        slots = [one.arena.allocate() for _ in range(one.arena.slots - one.arena.in_use)]
        for attempt in (lambda: one.vault.opened(key_id), lambda: asyncio.create_task(create(one.vault, "t"))):
            with pytest.raises(ArenaFullError) as refused:
                result = attempt()
                if isinstance(result, asyncio.Task):
                    await result
            assert refused.value.status == 503
        assert one.vault.unreadable.count == 0
        for slot in slots:
            slot.release()
        assert len(one.keys([key_id])[key_id]) == 32
        await one.make(1)


async def test_replacing_retires_the_old_key_and_each_names_the_other(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        old = await create(one.vault, "t")
        opened = one.vault.opened(old.id)
        new = await create(one.vault, "t", replaces=old.id)
        assert (one.on_disk(old.id).state, one.on_disk(old.id).replaced_by) == ("retired", new.id)
        assert one.on_disk(new.id).replaces == old.id
        with pytest.raises(KeyRetiredError):
            opened.check_encrypts()


async def test_a_key_replaces_none_of_another_thread_or_purpose(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        old = await create(one.vault, "t")
        with pytest.raises(WrongThreadError):
            await create(one.vault, "other", replaces=old.id)
        with pytest.raises(ConflictError, match="purpose"):
            await create(one.vault, "t", purpose="data", replaces=old.id)
        with pytest.raises(KeyNotFoundError):
            await create(one.vault, "t", replaces="k_" + "0" * 26)
        assert one.on_disk(old.id).state == "active"
        assert len(one.vault.index) == 1


async def test_if_the_old_key_cannot_be_retired_the_new_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller was told that nothing happened, so no start may retire the old key on the new one's word later."""

    async def refuse(self: Journal, held: HeldKeys, changes: Sequence[Change], stamp: str = "") -> None:
        raise StorageUnavailableError("no space")

    async with opened_vault(tmp_path / "d") as one:
        old = await create(one.vault, "t")
        with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
            patched.setattr(Journal, "replace", refuse)
            await create(one.vault, "t", replaces=old.id)
        assert [path.stem for path in (one.directory / "kms-deks").iterdir()] == [old.id]
        assert len(one.vault.index) == 1
        new = await create(one.vault, "t", replaces=old.id)
        assert one.on_disk(old.id).replaced_by == new.id


async def test_a_numbered_key_stays_if_the_old_one_cannot_be_retired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever lists the thread's keys meanwhile encrypts under the highest number. A start retires the old key."""

    async def refuse(self: Journal, held: HeldKeys, changes: Sequence[Change], stamp: str = "") -> None:
        listed.extend(key_id for key_id in one.vault.index.newest_of("t") if key_id != first.id)
        raise StorageUnavailableError("no space")

    listed: list[str] = []
    async with opened_vault(tmp_path / "d") as one:
        first = await one.vault.create_in_log("t", numbered=True)
        with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
            patched.setattr(Journal, "replace", refuse)
            await one.vault.create_in_log("t", replaces=first.id, numbered=True)
        [second] = listed
        assert len(one.keys([second])[second]) == 32
        third = await one.vault.create_in_log("t", replaces=second, numbered=True)
        assert (one.vault.record(second).number, third.number) == (2, 3)
    async with opened_vault(tmp_path / "d") as again:
        await again.indexing.run()
        assert again.vault.record(first.id).state == "retired"


async def test_changes_of_one_key_at_once_leave_it_as_one_of_them_would(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        outcomes = await asyncio.gather(
            *(one.vault.retire(key_id) for _ in range(5)),
            *(one.vault.destroy(key_id) for _ in range(5)),
            one.rotate(),
            return_exceptions=True,
        )
        unexpected = [
            outcome
            for outcome in outcomes
            if isinstance(outcome, BaseException) and not isinstance(outcome, ConflictError | KeyDestroyedError)
        ]
        assert unexpected == []
        await one.vault.destroy(key_id)
        assert not one.file(key_id).exists()
        assert one.backups(key_id) == []


async def test_after_an_unconfirmed_retirement_the_file_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is in place, only its directory could not be synced: from here on it would be retired after a start,
    so it must not encrypt until then.
    """
    async with opened_vault(tmp_path / "d") as one:
        [key_id] = await one.make(1)
        assert one.vault.opened(key_id).state == "active"
        replace = one.vault.journal.replace

        async def unconfirmed(*arguments: Any) -> None:
            await replace(*arguments)
            raise StorageUnavailableError("a directory cannot be synced")

        monkeypatch.setattr(one.vault.journal, "replace", unconfirmed)
        with pytest.raises(StorageUnavailableError):
            await one.vault.retire(key_id)
        assert one.vault.opened(key_id).state == "retired"
