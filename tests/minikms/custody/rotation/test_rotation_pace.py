"""How a rotation shares the event loop and the disk with requests."""

import asyncio
from pathlib import Path

import pytest
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.audit import Event
from minikms.custody.deks import DekStore
from minikms.keys import dek
from minikms.keys.dek import DekRecord
from minikms_daemon import rotation
from minikms_daemon.rotation import ReadFile
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.keks import RotateToRoot
from tests.harness.vaults import SilentAudit, create, opened_vault

pytestmark = pytest.mark.usefixtures("quick_rotation")


@pytest.mark.parametrize("priority", rotation.PACES)
async def test_requests_get_a_turn_after_each_few_keys(
    tmp_path: Path, priority: api.Priority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batch: between two turns of a request, no more keys are rewrapped than the priority says."""
    monkeypatch.setattr(rotation, "BATCH_FILES", 150)
    real, since_turn, most = dek.Rewrapper.rewrap, [0], [0]

    def counted(self: dek.Rewrapper, record: DekRecord, nonce: bytes) -> DekRecord:
        since_turn[0] += 1
        most[0] = max(most[0], since_turn[0])
        return real(self, record, nonce)

    async with opened_vault(tmp_path / "d") as one:
        await asyncio.gather(*(create(one.vault, f"t{number}") for number in range(150)))
        await one.begin(None)
        one.rotation.priority = priority
        monkeypatch.setattr(dek.Rewrapper, "rewrap", counted)
        running = asyncio.create_task(one.rotation.run())
        while not running.done():
            since_turn[0] = 0
            await asyncio.sleep(0)
        assert one.rotation.rewrapped == 150
        assert most[0] == rotation.PACES[priority].keys


async def test_the_keys_of_a_rotation_are_counted_once_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/status` adds those that are rewrapped to those that the index has under another KEK."""
    monkeypatch.setattr(rotation, "INDEXED_SLICE", 3)

    async with opened_vault(tmp_path / "d") as one:
        await one.make(20)
        await one.begin(None)
        running = asyncio.create_task(one.rotation.run())
        while not running.done():
            assert one.rotation.rewrapped + one.vault.index.by_kek[1] == 20
            await asyncio.sleep(0)


async def test_a_rotation_begins_with_normal_priority(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        keks = one.kek_verbs(VerbTable(SilentAudit()))
        asked: tuple[api.Priority | UnsetType, ...] = (UNSET, "low", "high", UNSET)
        found: list[str] = []
        for priority in asked:
            waits = await keks.rotate_kek(one.vault, RotateToRoot(priority=priority), Event(type="t", actor="t"))
            found.append(one.rotation.priority)
            await waits.act()
        assert found == ["normal", "low", "high", "normal"]
        await keks.stop()


async def test_a_request_changes_the_priority_of_a_running_rotation(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.make(20)
        keks = one.kek_verbs(VerbTable(SilentAudit()))
        begun = await keks.rotate_kek(one.vault, RotateToRoot(priority="low"), Event(type="t", actor="t"))
        found: list[str] = []
        for again in (RotateToRoot(), RotateToRoot(priority="high")):
            await keks.rotate_kek(one.vault, again, Event(type="t", actor="t"))
            found.append(one.rotation.priority)
        assert found == ["low", "high"]
        await begun.act()
        assert one.kek_states() == {1: "retired", 2: "active"}
        await keks.stop()


async def test_a_pass_does_not_read_what_the_index_has_under_the_new_kek(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass reads each file once; the pass after it, which lists the directory, reads none."""
    read: list[str] = []
    real = DekStore.read_many

    def noting(self: DekStore, key_ids: list[str]) -> list[ReadFile]:
        read.extend(key_ids)
        return real(self, key_ids)

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(20)
        await one.begin(None)
        monkeypatch.setattr(DekStore, "read_many", noting)
        await one.rotation.run()
        assert sorted(read) == sorted(key_ids)
        assert one.keks_on_disk(key_ids) == {2}
