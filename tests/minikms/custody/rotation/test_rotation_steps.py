"""The steps of a KEK rotation, and their interruptions: no key is lost, and the next attempt completes it."""

import asyncio
import gc
import json
import threading
from pathlib import Path

import pytest

from minikms import api
from minikms.api.errors import (
    ArenaFullError,
    AuditUnavailableError,
    ConflictError,
    SealedError,
    StartError,
    StorageUnavailableError,
    StorageUncertainError,
    WrongSlotError,
)
from minikms.audit import Event
from minikms.custody.keyring_file import KeyringFile
from minikms.keys import keyring, root_slots
from minikms.platform.clock import now_rfc3339
from minikms_daemon.audit import turns
from minikms_daemon.service import root_removal
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.keks import RotateToRoot
from tests.harness.disk_faults import refuse, stored_but_refused, stored_once
from tests.harness.vaults import OpenedVault, SilentAudit, key_file, opened_vault

pytestmark = pytest.mark.usefixtures("quick_rotation")


NEW_ROOT = bytes(range(100, 132))
OTHER_ROOT = bytes(range(50, 82))


# --- a rotation that nothing disturbs -----------------------------------------------------------------------------


async def test_every_key_is_rewrapped_keeps_its_value_and_leaves_a_backup(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(20)
        before, files = one.keys(key_ids), {key_id: one.file(key_id).read_bytes() for key_id in key_ids}
        await one.rotate()
        assert one.keks_on_disk(key_ids) == {2}
        assert {one.on_disk(key_id).version for key_id in key_ids} == {2}
        assert one.keys(key_ids) == before
        assert one.kek_states() == {1: "retired", 2: "active"}
        assert one.rotation.rewrapped == 20
        assert one.vault.index.by_kek[2] == 20
        for key_id in key_ids:
            [backup] = one.backups(key_id)
            assert backup == files[key_id]


async def test_two_rotations_in_one_second_leave_two_backups_of_each_key(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        await one.rotate()
        await one.rotate()
        for key_id in key_ids:
            contents = one.backups(key_id)
            assert len(contents) == len(set(contents)) == 2


async def test_keys_made_meanwhile_are_wrapped_under_the_new_version_at_once(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        old = await one.make(30)
        creating = asyncio.create_task(one.make(30))
        await asyncio.sleep(0)
        await one.begin(None)
        new = await one.make(10)
        await one.rotation.run()
        assert one.keks_on_disk(new) == {2}
        assert one.keks_on_disk([*old, *await creating]) == {2}


async def test_keys_retired_or_destroyed_during_a_rotation_stay_so(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(40)
        gone, retired = key_ids[:10], key_ids[10:20]
        for key_id in gone:
            await one.vault.retire(key_id)
        await asyncio.gather(
            one.rotate(),
            *(one.vault.destroy(key_id) for key_id in gone),
            *(one.vault.retire(key_id) for key_id in retired),
        )
        assert one.keks_on_disk(key_ids[10:]) == {2}
        assert {one.on_disk(key_id).state for key_id in retired} == {"retired"}
        assert {one.on_disk(key_id).state for key_id in key_ids[20:]} == {"active"}
        assert not any(one.file(key_id).exists() or one.backups(key_id) for key_id in gone)


# --- who may begin what -------------------------------------------------------------------------------------------


async def test_a_root_that_is_being_added_is_not_rotated_to(tmp_path: Path) -> None:
    """The second request is refused, even if both began before either was on disk."""
    async with opened_vault(tmp_path / "d") as one:
        root, epoch = one.slot_of(NEW_ROOT), one.vault.keyring.body.epoch
        async with one.vault.keyring.held():
            adding = asyncio.ensure_future(one.vault.keyring.change(lambda body: with_root(one, body)))
            await asyncio.sleep(0)
            rotating = asyncio.ensure_future(one.begin(root))
            await asyncio.sleep(0)
        await adding
        with pytest.raises(ConflictError, match="in another slot"):
            await rotating
        assert one.vault.keyring.body.epoch == epoch + 1
        assert one.rotation.running is None


def with_root(one: OpenedVault, body: keyring.Body) -> keyring.Body:
    """With NEW_ROOT beside the others."""
    slot_id = root_slots.next_slot_id(body)
    slot = one.vault.unlocked.make_slot(memoryview(NEW_ROOT), "file", slot_id=slot_id, at=now_rfc3339())
    return root_slots.add_slot(body, slot, at=now_rfc3339())


async def test_a_repeated_request_joins_the_running_rotation(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        new, other = one.slot_of(NEW_ROOT), one.slot_of(OTHER_ROOT)
        assert (await one.begin(None)).newly
        assert not (await one.begin(None)).newly
        with pytest.raises(ConflictError, match="another rotation is running"):
            await one.begin(new)
        await one.rotation.run()
        begun = await one.begin(new)
        assert begun.newly
        assert await one.begin(new) == (False, begun.slot_id)
        for root in (other, None):
            with pytest.raises(ConflictError, match="is running"):
                await one.begin(root)
        await one.rotation.run()
        assert await one.begin(new) == (False, begun.slot_id)
        assert one.rotation.running is None
        assert one.kek_states() == {1: "retired", 2: "retired", 3: "active"}


async def test_a_root_key_is_never_used_twice(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        first = one.slot_of(bytes.fromhex(key_file(tmp_path / "d").read_text()))
        assert not (await one.begin(first)).newly  # it is the one of this start: nothing to do
        new = one.slot_of(NEW_ROOT)
        await one.rotate(new)
        with pytest.raises(ConflictError, match="in another slot"):
            await one.begin(first)
        await remove(one, "s1")
        with pytest.raises(ConflictError, match="was rotated away before"):
            await one.begin(first)


async def test_a_full_keyring_refuses_a_rotation_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "KEKS_OPEN_COUNT_MAX", 2)

    async with opened_vault(tmp_path / "d") as one:
        await one.rotate()
        used = one.arena.in_use
        with pytest.raises(ConflictError, match="/kek/prune"):
            await one.begin(None)
        assert one.arena.in_use == used
        assert (await one.pruning.prune(backups=True)).destroyed == [1]
        await one.rotate()


async def test_no_rotation_begins_while_it_is_excluded(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        async with one.rotation.excluded():
            beginning = asyncio.create_task(one.begin(None))
            await asyncio.sleep(0.02)
            assert one.rotation.running is None
        assert (await beginning).newly
        with pytest.raises(ConflictError, match="a rotation is running"):
            async with one.rotation.excluded():
                pass


# --- beginnings that fail -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", [None, NEW_ROOT])
async def test_a_begin_that_the_disk_refuses_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: bytes | None
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        given = None if root is None else one.slot_of(root)
        used, body, keys = one.arena.in_use, one.vault.keyring.body, one.keys(key_ids)
        used += len(key_ids)
        with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
            patched.setattr(KeyringFile, "store_now", refuse)
            await one.begin(given)
        assert one.vault.keyring.body is body
        assert one.arena.in_use == used
        await one.make(1)
        await one.rotate(given)
        assert one.keys(key_ids) == keys
        assert one.kek_states() == {1: "retired", 2: "active"}


async def test_a_begin_that_failed_after_it_reached_the_disk_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only the last sync fails, the new file may be there until a power loss: both files must work."""
    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        keys = one.keys(key_ids)
        with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
            patched.setattr(KeyringFile, "store_now", stored_but_refused)
            await one.begin(one.slot_of(NEW_ROOT))
    async with opened_vault(tmp_path / "d") as again:  # under the old root; the file has both
        assert again.rotation.running is not None
        await again.rotation.run()
        assert again.keys(key_ids) == keys
    async with opened_vault(tmp_path / "d") as one:
        with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
            patched.setattr(KeyringFile, "store_now", stored_but_refused)
            await one.begin(None)
        later = await one.make(1)
        [destroyed] = await one.make(1)
        await one.vault.retire(destroyed)
        await one.vault.destroy(destroyed)  # writes the keyring
    async with opened_vault(tmp_path / "d") as again:
        assert again.rotation.running is None
        assert len(again.keys([*key_ids, *later])) == 4


async def test_an_arena_without_room_for_new_keys_refuses_and_keeps_none(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d", slots=12) as one:
        root = one.slot_of(NEW_ROOT)
        taken = [one.arena.allocate() for _ in range(one.arena.slots - one.arena.in_use - 1)]
        used = one.arena.in_use
        with pytest.raises(ArenaFullError):
            await one.begin(root)
        assert one.arena.in_use == used
        for slot in taken:
            slot.release()
        await one.rotate(root)


# --- root keys ----------------------------------------------------------------------------------------------------


async def remove(one: OpenedVault, *slot_ids: str, proved: str = "") -> None:
    await one.removal.remove(lambda body: slot_ids, proved=proved)


async def test_both_roots_open_until_the_replaced_one_is_removed(tmp_path: Path) -> None:
    old, new = key_file(tmp_path / "d"), tmp_path / "new.key"
    new.touch(0o600)
    new.write_text(NEW_ROOT.hex())

    async with opened_vault(tmp_path / "d") as one:
        key_ids = await one.make(3)
        keys = one.keys(key_ids)
        await one.rotate(one.slot_of(NEW_ROOT))
    for key in (old, new):
        async with opened_vault(tmp_path / "d", key=key) as one:
            assert one.keys(key_ids) == keys
    async with opened_vault(tmp_path / "d", key=new) as one:
        body = one.vault.keyring.body
        gone = root_slots.replaced_by(body, one.slot.slot_id)
        assert gone == {"s1"}
        await remove(one, *gone, proved=one.slot.slot_id)
        await remove(one, *gone)  # nothing to do
        assert one.vault.keyring.body.epoch == body.epoch + 1
    with pytest.raises(StartError, match="rotated away on"):
        async with opened_vault(tmp_path / "d", key=old):
            pass
    async with opened_vault(tmp_path / "d", key=new) as one:
        assert one.keys(key_ids) == keys
        assert one.vault.keyring.body.revocation_due
        await one.rotate()
        assert not one.vault.keyring.body.revoking


async def test_a_root_that_is_being_removed_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rotation decides once the removal has reached the disk."""
    async with opened_vault(tmp_path / "d") as one:
        await one.vault.keyring.change(lambda body: with_root(one, body))
        keks, root = one.kek_verbs(VerbTable(SilentAudit())), one.slot_of(OTHER_ROOT)
        with monkeypatch.context() as patched:
            disk = SlowDisk(patched)
            removing = await begun_removal(one, disk)
            rotating = asyncio.ensure_future(
                keks.rotate_kek(one.vault, RotateToRoot(root=root), Event(type="t", actor="t"))
            )
            await asyncio.sleep(0)
            disk.go_on.set()
            await removing
            with pytest.raises(WrongSlotError, match="was removed"):
                await rotating
        assert [slot.replaces for slot in one.vault.keyring.body.slots] == [""]
        await keks.stop()


class SlowDisk:
    """Stores a keyring only after `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()
        store_now = KeyringFile.store_now

        def store(file: KeyringFile, data: bytes) -> None:
            assert threading.current_thread() is not threading.main_thread(), "the event loop would wait for the disk"
            self.asked.set()
            assert self.go_on.wait(60)
            store_now(file, data)

        monkeypatch.setattr(KeyringFile, "store_now", store)


async def begun_removal(one: OpenedVault, disk: SlowDisk) -> asyncio.Task[None]:
    """A removal that waits for the disk."""
    removing = asyncio.ensure_future(remove(one, "s1"))
    while not disk.asked.is_set():
        await asyncio.sleep(0.001)
    return removing


async def test_the_event_loop_goes_on_while_a_removal_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines wait, and so do the answers of a turn; afterwards each line is in the log, under the new key."""
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        with monkeypatch.context() as patched:
            disk = SlowDisk(patched)
            removing = await begun_removal(one, disk)
            head = one.log.head
            one.audit.add(Event(type="encrypt", actor="t"))
            assert one.audit.commit_turn() is None
            one.log.tick()
            later = asyncio.ensure_future(one.audit.add_written(Event(type="create_dek", actor="t"), durable=True))
            await asyncio.sleep(0.01)
            assert (one.log.head, later.done()) == (head, False)
            removing.cancel()  # the caller goes, and the change goes on
            disk.go_on.set()
            await later
            await one.removal.stop()
        assert one.audit.commit_turn() is True
        assert one.vault.unlocked.audit.current.version == 2
        assert one.log.events_dropped == 0
    lines = (tmp_path / "d" / "minikms-audit.log").read_text().splitlines()
    types = [json.loads(line)["event"]["type"] for line in lines]
    assert types[types.index("audit_key") :][:3] == ["audit_key", "encrypt", "create_dek"]
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)):
        pass


async def test_answers_are_refused_when_the_removal_waits_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "HELD_SECONDS_MAX", 0.0)

    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        with monkeypatch.context() as patched:
            disk = SlowDisk(patched)
            removing = await begun_removal(one, disk)
            one.audit.add(Event(type="encrypt", actor="t"))
            assert one.audit.commit_turn() is False
            disk.go_on.set()
            await removing
        one.audit.add(Event(type="encrypt", actor="t"))
        assert one.audit.commit_turn() is True
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)):
        pass


async def test_a_seal_while_a_removal_waits_for_the_disk_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys are zeroed at once. The next start completes the removal, which has reached the disk."""
    with monkeypatch.context() as patched:
        async with opened_vault(tmp_path / "d") as one:
            await one.rotate(one.slot_of(NEW_ROOT))
            disk = SlowDisk(patched)
            removing = await begun_removal(one, disk)
            one.audit.seal()
            one.vault.seal()
            one.log.abandon()
            assert not removing.done()
            disk.go_on.set()
            await one.removal.stop()
            with pytest.raises(SealedError):
                await removing
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)) as again:
        assert again.log.status()["audit_key_version"] == 2
        assert [slot.slot_id for slot in again.vault.keyring.body.slots] != ["s1"]


class KeptAudit(SilentAudit):
    """Keeps the type and the fingerprints of each line."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, object]] = []

    async def add_written(self, event: Event, *, durable: bool) -> None:
        await asyncio.sleep(0)
        self.lines.append((event.type, event.facts.get("fingerprints")))


class HeldAudit(KeptAudit):
    """Writes the line of a rotation that is done when `released` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()
        self.released = asyncio.Event()

    async def add_written(self, event: Event, *, durable: bool) -> None:
        if event.type == "rotate_kek_done":
            self.reached.set()
            await self.released.wait()
        await super().add_written(event, durable=durable)


async def test_a_rotation_is_finished_when_the_replaced_root_is_removed(tmp_path: Path) -> None:
    """Whoever polls `/status`, or waits for the answer, finds only the root keys that stay."""
    async with opened_vault(tmp_path / "d") as one:
        audit = HeldAudit()
        keks = one.kek_verbs(VerbTable(audit))
        waits = await keks.rotate_kek(one.vault, RotateToRoot(root=one.slot_of(NEW_ROOT)), Event(type="t", actor="t"))
        (keks.proved_slot_id,) = [slot.slot_id for slot in one.vault.keyring.body.slots if slot.replaces]
        answer = asyncio.ensure_future(waits.act())
        await audit.reached.wait()
        assert (one.rotation.running, answer.done(), bool(keks.finishing)) == (None, False, True)
        audit.released.set()
        await answer
        assert one.vault.keyring.body.slot(one.slot.slot_id) is None
        while keks.finishing is not None:
            await asyncio.sleep(0.001)
        assert one.kek_states()[3] == "active"
        await keks.stop()


async def lines_of_a_start(tmp_path: Path) -> list[tuple[str, object]]:
    """About root keys, until the daemon has nothing left to do."""
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)) as one:
        audit = KeptAudit()
        keks = one.kek_verbs(VerbTable(audit))
        await asyncio.gather(keks.drop_replaced_roots(), keks.drop_replaced_roots())
        keks.ensure_running()
        while (body := one.vault.keyring.body).revoking or any(root_slots.OwedLines.of(body)):
            await asyncio.sleep(0.001)
        await keks.stop()
        return [line for line in audit.lines if line[0] in ("root_keys_dropped", "root_removed")]


async def test_a_crash_loses_no_line_about_a_root_that_was_replaced(tmp_path: Path) -> None:
    """The process ends between a change of the keyring and the line about it, once at each of the two changes."""
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        old = one.slot.fingerprint
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)) as one:
        await remove(one, "s1", proved=one.slot.slot_id)
    assert await lines_of_a_start(tmp_path) == [("root_keys_dropped", old), ("root_removed", old)]
    assert await lines_of_a_start(tmp_path) == []


async def test_a_crash_loses_no_line_about_the_end_of_a_revocation(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        await remove(one, "s1")
        await one.rotate()
        old = one.slot.fingerprint
    assert await lines_of_a_start(tmp_path) == [("root_removed", old)]
    assert await lines_of_a_start(tmp_path) == []


async def test_a_repeated_rotation_names_the_kek_that_it_made(tmp_path: Path) -> None:
    """Not the one of the rotation that the removal of the replaced root key asks for."""
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)) as one:
        keks = one.kek_verbs(VerbTable(KeptAudit()))
        waits = await keks.rotate_kek(one.vault, RotateToRoot(root=one.slot_of(NEW_ROOT)), Event(type="t", actor="t"))
        await keks.drop_replaced_roots()
        while one.kek_states().get(3) != "active":
            await asyncio.sleep(0.001)
        answer = await waits.act()
        assert isinstance(answer, api.RotateKekAnswer)
        assert (answer.status, answer.kek_version) == ("ok", 2)
        await keks.stop()


async def test_a_root_that_was_replaced_leaves_one_line(tmp_path: Path) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        old = one.slot.fingerprint
    assert await lines_of_a_start(tmp_path) == [("root_keys_dropped", old), ("root_removed", old)]


async def test_a_removal_whose_keyring_is_uncertain_holds_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only the last sync fails, a crash may find the new keyring: the log must end where that one says."""
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        body, used = one.vault.keyring.body, one.arena.in_use
        with monkeypatch.context() as patched, pytest.raises(StorageUncertainError):
            patched.setattr(KeyringFile, "store_now", stored_but_refused)
            await remove(one, "s1")
        assert one.log.status()["writable"] is False
        assert (one.vault.keyring.body, one.arena.in_use) == (body, used)
        while not one.log.writable:
            await asyncio.sleep(0.01)
            one.log.tick()
        assert keyring.parse_file((one.directory / "keyring.json").read_bytes())[0] == body
        await remove(one, "s1")
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)) as again:
        assert len(again.vault.keyring.body.audit_keys) == 2


async def test_a_seal_ends_the_repair_of_a_keyring_that_is_uncertain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file is written without keys; the next start completes the removal."""
    monkeypatch.setattr(root_removal, "STORE_RETRY_SECONDS", 0.001)

    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        with monkeypatch.context() as patched:
            patched.setattr(KeyringFile, "store_now", stored_once())
            with pytest.raises(StorageUncertainError):
                await remove(one, "s1")
            await asyncio.sleep(0.01)
            left = (one.directory / "keyring.json").read_bytes()
            one.audit.seal()
            one.vault.seal()
            one.log.abandon()
            await asyncio.sleep(0.05)
            await one.removal.stop()
        assert (one.directory / "keyring.json").read_bytes() == left
    gc.collect()
    assert faults == []
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)) as again:
        assert again.log.status()["audit_key_version"] == 2


async def test_a_start_completes_a_removal_that_was_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends while the log is held, with the new keyring on disk."""
    with monkeypatch.context() as patched:
        async with opened_vault(tmp_path / "d") as one:
            await one.rotate(one.slot_of(NEW_ROOT))
            patched.setattr(KeyringFile, "store_now", stored_once())
            with pytest.raises(StorageUncertainError):
                await remove(one, "s1")
            left = (one.directory / "keyring.json").read_bytes()
            await one.removal.stop()
            with pytest.raises(AuditUnavailableError):
                one.log.close()
    (tmp_path / "d" / "keyring.json").write_bytes(left)
    async with opened_vault(tmp_path / "d", key=key_of(tmp_path, NEW_ROOT)) as again:
        assert again.log.status()["audit_key_version"] == 2
        assert again.vault.keyring.body.revocation_due


async def test_a_removal_that_the_disk_refuses_at_once_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened_vault(tmp_path / "d") as one:
        await one.rotate(one.slot_of(NEW_ROOT))
        body, used = one.vault.keyring.body, one.arena.in_use
        with monkeypatch.context() as patched, pytest.raises(StorageUnavailableError):
            patched.setattr(KeyringFile, "store_now", refuse)
            await remove(one, "s1")
        assert one.log.writable
        assert (one.vault.keyring.body, one.arena.in_use) == (body, used)
        await remove(one, "s1")
        assert [slot.slot_id for slot in one.vault.keyring.body.slots] != ["s1"]


def key_of(tmp_path: Path, root: bytes) -> Path:
    path = tmp_path / "other.key"
    path.touch(0o600)
    path.write_text(root.hex())
    return path
