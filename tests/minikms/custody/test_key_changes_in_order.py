"""Concurrent changes: of the keyring and of key files, and creates beside them."""

import asyncio
import threading
from pathlib import Path

import pytest

from minikms.api.errors import StorageUnavailableError
from minikms.custody.deks import KeyLocks
from minikms.custody.journal_format import Change
from minikms.custody.keyring_file import KeyringFile
from minikms.keys import keyring
from minikms.keys.keyring import Body
from tests.harness.vaults import opened_vault

AT = "2026-11-24T15:00:00Z"


def begun(body: Body, name: str) -> Body:
    """A change that leaves a trace in the body."""
    return keyring.next_epoch(body, at=AT, retired_roots=(*body.retired_roots, keyring.RetiredRoot(name, AT)))


def names(body: Body) -> list[str]:
    return [root.fingerprint for root in body.retired_roots]


# --- the keyring --------------------------------------------------------------------------------------------------


async def test_each_change_of_the_keyring_is_made_from_the_one_before(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        keeper, before = one.vault.keyring, one.vault.keyring.body.epoch
        await asyncio.gather(
            *(
                keeper.change(lambda body, number=number: begun(body, str(number)))  # type: ignore[misc]  # a default binds the loop's value
                for number in range(20)
            )
        )
        assert keeper.body.epoch == before + 20
        assert set(names(keeper.body)) == {str(number) for number in range(20)}
    async with opened_vault(tmp_path / "d") as again:
        assert len(names(again.vault.keyring.body)) == 20


async def test_a_change_that_the_disk_refuses_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: KeyringFile, data: bytes) -> None:
        raise StorageUnavailableError("no space")

    async with opened_vault(tmp_path / "d") as one:
        keeper, before = one.vault.keyring, one.vault.keyring.body
        with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
            patched.setattr(KeyringFile, "store_now", refuse)
            await keeper.change(lambda body: begun(body, "1"))
        assert keeper.body is before
        await keeper.change(lambda body: begun(body, "2"))
        assert names(keeper.body) == ["2"]


async def test_a_change_with_a_cancelled_caller_is_kept_by_the_next_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write continues in its thread; a next body made from the older one would undo it."""
    writing, go_on = threading.Event(), threading.Event()
    store_now = KeyringFile.store_now

    def slow(self: KeyringFile, data: bytes) -> None:
        writing.set()
        go_on.wait(60)
        store_now(self, data)

    async with opened_vault(tmp_path / "d") as one:
        keeper = one.vault.keyring
        with monkeypatch.context() as patched:
            patched.setattr(KeyringFile, "store_now", slow)
            first = asyncio.create_task(keeper.change(lambda body: begun(body, "1")))
            await asyncio.to_thread(writing.wait)
            first.cancel()
            second = asyncio.create_task(keeper.change(lambda body: begun(body, "2")))
            await asyncio.sleep(0.01)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await first
            await second
        assert names(keeper.body) == ["1", "2"]


# --- locks --------------------------------------------------------------------------------------------------------


async def test_holders_with_a_common_key_wait_but_never_deadlock() -> None:
    locks, inside, most = KeyLocks(), [0], [0]

    async def hold(keys: list[str]) -> None:
        async with locks.hold(keys):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            await asyncio.sleep(0)
            inside[0] -= 1

    groups = [["a", "b"], ["b", "a"], ["a", "c", "b"], ["b", "b"]] * 5
    async with asyncio.timeout(60):
        await asyncio.gather(*(hold(keys) for keys in groups))
    assert most[0] == 1


async def test_holders_without_a_key_in_common_do_not_wait() -> None:
    locks = KeyLocks()
    async with asyncio.timeout(60), locks.hold(["a"]), locks.hold(["b"]):
        pass


async def test_a_holder_that_fails_or_is_cancelled_releases_its_keys() -> None:
    locks = KeyLocks()
    with pytest.raises(ZeroDivisionError):
        async with locks.hold(["a"]):
            raise ZeroDivisionError
    held = asyncio.Event()

    async def wait_inside() -> None:
        async with locks.hold(["a"]):
            held.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(wait_inside())
    await held.wait()
    waiter = asyncio.create_task(locks.hold(["a"]).__aenter__())
    await asyncio.sleep(0)
    waiter.cancel()
    task.cancel()
    async with asyncio.timeout(60), locks.hold(["a"]):
        pass


async def test_a_file_is_changed_only_with_the_held_lock_of_its_key(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        [key_id, other] = await one.make(2)
        before = one.file(key_id).read_bytes()
        async with one.vault.locks.hold((key_id,)) as held:
            with pytest.raises(ValueError, match="without its lock"):
                held.require(other)
        foreign = KeyLocks()
        async with foreign.hold((key_id,)) as elsewhere:
            assert elsewhere.require() == (key_id,)
        for no_lock in (held, elsewhere):
            with pytest.raises(ValueError, match="without its lock"):
                await one.vault.journal.replace(no_lock, [Change(key_id, before, before)])
        assert one.file(key_id).read_bytes() == before


async def test_a_watcher_sees_the_keys_of_other_holders_only() -> None:
    locks = KeyLocks()
    async with locks.hold(["before"]):
        with locks.watch() as changed, locks.watch() as other:
            async with locks.hold(["a"]):
                pass
            async with locks.hold(["own"], announced=False):
                pass
            assert changed == other == {"before", "a"}
    async with locks.hold(["after"]):
        pass
    assert changed == {"before", "a"}
