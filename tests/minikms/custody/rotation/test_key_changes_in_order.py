"""Concurrent changes: of the keyring, of key files, and of the wraps of a KEK."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from minikms.custody.deks import KeyLocks
from minikms.custody.keyring_file import KeyringFile, ReservedWraps, WrapReservation
from minikms.errors import AuditUnavailableError, KeyExhaustedError, StorageUnavailableError
from minikms.keys import keyring
from minikms.keys.keyring import Body
from tests.harness.vaults import OpenedVault, opened_vault

AT = "2026-11-24T15:00:00Z"


def begun(body: Body, name: str) -> Body:
    """A change that leaves a trace in the body."""
    return keyring.next_epoch(body, at=AT, retired_roots=(*body.retired_roots, keyring.RetiredRoot(name, AT)))


def names(body: Body) -> list[str]:
    return [root.fingerprint for root in body.retired_roots]


# --- the keyring --------------------------------------------------------------------------------------------------


def test_each_change_of_the_keyring_is_made_from_the_one_before(tmp_path: Path) -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_a_change_that_the_disk_refuses_is_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: KeyringFile, data: bytes) -> None:
        raise StorageUnavailableError("no space")

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            keeper, before = one.vault.keyring, one.vault.keyring.body
            with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
                patched.setattr(KeyringFile, "store_now", refuse)
                await keeper.change(lambda body: begun(body, "1"))
            assert keeper.body is before
            await keeper.change(lambda body: begun(body, "2"))
            assert names(keeper.body) == ["2"]

    asyncio.run(main())


def test_a_change_with_a_cancelled_caller_is_kept_by_the_next_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write continues in its thread; a next body made from the older one would undo it."""
    writing, go_on = threading.Event(), threading.Event()
    store_now = KeyringFile.store_now

    def slow(self: KeyringFile, data: bytes) -> None:
        writing.set()
        go_on.wait(60)
        store_now(self, data)

    async def main() -> None:
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

    asyncio.run(main())


# --- locks --------------------------------------------------------------------------------------------------------


def test_holders_with_a_common_key_wait_but_never_deadlock() -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_holders_without_a_key_in_common_do_not_wait() -> None:
    async def main() -> None:
        locks = KeyLocks()
        async with asyncio.timeout(60), locks.hold(["a"]), locks.hold(["b"]):
            pass

    asyncio.run(main())


def test_a_holder_that_fails_or_is_cancelled_releases_its_keys() -> None:
    async def main() -> None:
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

    asyncio.run(main())


def test_a_file_is_changed_only_with_the_held_lock_of_its_key(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            [key_id, other] = await one.make(2)
            before, store = one.file(key_id).read_bytes(), one.vault.store
            async with one.vault.locks.hold((key_id,)) as held:
                with pytest.raises(ValueError, match="without its lock"):
                    held.require(other)
            foreign = KeyLocks()
            async with foreign.hold((key_id,)) as elsewhere:
                assert elsewhere.require() == (key_id,)
            for no_lock in (held, elsewhere):
                with pytest.raises(ValueError, match="without its lock"):
                    await store.replace(no_lock, b"")
            assert one.file(key_id).read_bytes() == before

    asyncio.run(main())


def test_a_watcher_sees_the_keys_of_other_holders_only() -> None:
    async def main() -> None:
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

    asyncio.run(main())


# --- wraps --------------------------------------------------------------------------------------------------------


def _leases(body: Body, version: int) -> int:
    kek = body.kek(version)
    assert kek is not None
    return kek.wraps_reserved // keyring.KEK_WRAPS_LEASE


def test_wraps_are_reserved_on_disk_before_the_first_is_made(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            assert _leases(one.vault.keyring.body, 1) == 0
            await one.make(1)
            assert _leases(one.vault.keyring.body, 1) == 1
        async with opened_vault(tmp_path / "d") as again:
            await again.make(3)
            assert _leases(again.vault.keyring.body, 1) == 2

    asyncio.run(main())


def test_a_batch_larger_than_the_rest_reserves_more_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "KEK_WRAPS_LEASE", 10)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            wraps = one.vault.wrap_reservation
            async with asyncio.timeout(60):
                await wraps.take(1, 8)
                await wraps.take(1, 8)  # two are left of the first lease
                assert _leases(one.vault.keyring.body, 1) == 2
                await wraps.take(1, 4)
                assert _leases(one.vault.keyring.body, 1) == 2
                await asyncio.gather(*(wraps.take(1, 3) for _ in range(7)))
            assert _leases(one.vault.keyring.body, 1) >= 5

    asyncio.run(main())


def test_a_kek_at_its_limit_of_wraps_wraps_no_more_until_a_rotation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "KEK_WRAPS_LEASE", 2)
    monkeypatch.setattr(keyring, "KEK_WRAPS_MAX", 2)

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            for _ in range(4):
                await one.make(1)
            with pytest.raises(KeyExhaustedError, match="rotate the KEK"):
                await one.make(1)
            monkeypatch.undo()
            await one.rotate()
            await one.make(1)

    asyncio.run(main())


def test_creates_done_waits_for_every_create_of_the_version(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            wraps: WrapReservation = one.vault.wrap_reservation
            taken = [await wraps.begin_create() for _ in range(3)]
            drained = asyncio.create_task(wraps.creates_done(1))
            other = asyncio.create_task(wraps.creates_done(2))
            await other
            for version in taken:
                await asyncio.sleep(0)
                assert not drained.done()
                wraps.end_create(version)
            async with asyncio.timeout(60):
                await drained
                await wraps.creates_done(1)

    asyncio.run(main())


def test_no_wrap_is_made_before_its_reservation_was_reported(tmp_path: Path) -> None:
    """After a failed report the same reservation is reported again, and no other one is made."""
    opened: list[OpenedVault] = []
    reported: list[ReservedWraps] = []

    async def report(reserved: ReservedWraps) -> None:
        assert reserved.epoch == opened[0].vault.keyring.body.epoch, "the keyring is durable first"
        reported.append(reserved)
        if len(reported) < 3:
            raise AuditUnavailableError("the audit log can't be written")

    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            opened.append(one)
            one.vault.wrap_reservation.report = report
            for _ in range(2):
                with pytest.raises(AuditUnavailableError):
                    await one.make(1)
            await one.make(2)
            assert reported == [ReservedWraps(1, keyring.KEK_WRAPS_LEASE, reported[0].epoch)] * 3
            assert _leases(one.vault.keyring.body, 1) == 1

    asyncio.run(main())
