"""A verified archive can be restored, and the daemon refuses to start after an interrupted restore."""

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from minikms.api.errors import KmsRefusedError, StartError, StorageUnavailableError
from minikms.archives import create, restore
from minikms.archives.archive import ArchiveError, ArchiveManifest, ArchiveReader, ArchiveWriter, dek_entry_name
from minikms.archives.create import NewArchive, Task, remove_failed, remove_leftover, staging_path
from minikms.crypto.aead import NonceSource
from minikms.custody.archive_register import ArchiveRegister, RegisteredArchive
from minikms.custody.keyring_file import KeyringFile
from minikms.datadir import open_keyring, opened_keyring, opened_root
from minikms.keys import keyring
from minikms.memory.arena import SecretArena
from minikms.platform.directory_lock import LOCK_NAME, DataDirLock
from minikms.roots.providers import KeyFile
from tests.harness.vaults import key_file, opened_vault

ARCHIVE_ID = "a_0123456789abcdef"
AT = "2026-11-24T15:00:00Z"
NEW = NewArchive(ARCHIVE_ID, AT, lambda: None)
KEYS = 3


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    async def main() -> None:
        async with opened_vault(tmp_path / "d") as one:
            await one.make(KEYS)

    asyncio.run(main())
    return tmp_path / "d"


@contextmanager
def task_for(data_dir: Path) -> Iterator[Task]:
    with opened_root(KeyFile(key_file(data_dir))) as (arena, root):
        yield Task(arena, root, lambda data: opened_keyring(arena, root, data), lambda done, total: None)


def made(data_dir: Path, path: Path) -> ArchiveManifest:
    with task_for(data_dir) as task:
        manifest = create.create(str(data_dir), str(path), task, NEW).manifest
    assert remove_leftover(str(path), NEW.archive_id)
    return manifest


def restored(data_dir: Path, archive: Path, target: Path) -> None:
    with task_for(data_dir) as task:
        good = create.verify(str(archive), task)
        with DataDirLock(str(target)) as lock, task.open_keyring(good.keyring) as unlocked:
            restore.check_empty(lock.directory_fd, str(target))
            source = RegisteredArchive(ARCHIVE_ID, str(archive), 1, 2, KEYS, 3)
            place = restore.Target(str(target), lock.directory_fd, good.tombstones, source)
            log = target / "minikms-audit.log"
            restore.restore(str(archive), good, task, unlocked, place, begin_log=log.touch, at=AT)


def start(data_dir: Path, target: Path) -> str:
    """Open the keyring of `target` as the daemon does when it starts; its id."""
    with (
        DataDirLock(str(target)) as lock,
        SecretArena(32, force_fallback=True) as arena,
        ThreadPoolExecutor(1) as executor,
    ):
        file = KeyringFile(lock.directory_fd, executor)
        unlocked, _ = open_keyring(str(target), file, KeyFile(key_file(data_dir)), arena=arena, nonces=NonceSource())
        return unlocked.body.keyring_id


class PowerFailure(Exception):
    """Simulates a power failure: raised in place of a system call."""


@contextmanager
def power_failure_after(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let `number` calls that change directories or files succeed; later ones raise PowerFailure. Yields the calls."""
    calls: list[str] = []

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **options: object) -> object:
            if len(calls) >= number:
                raise PowerFailure
            calls.append(name)
            return real(*arguments, **options)

        patch.setattr(os, name, call)

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "link", "unlink", "write"):
            counted(name)
        yield calls


def test_the_daemon_refuses_to_start_after_any_interrupted_restore(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "archive"
    made(data_dir, archive)
    refused = 0
    for number in range(100):
        target = tmp_path / f"restored-{number}"
        target.mkdir(0o700)
        with power_failure_after(number, monkeypatch), contextlib.suppress(PowerFailure):
            restored(data_dir, archive, target)
            break
        found = {path.name for path in target.rglob("*") if not path.name.startswith(".tmp-")}
        if found <= {LOCK_NAME}:
            continue  # nothing was restored yet: the directory counts as empty
        with pytest.raises(StartError, match=r"keyring\.json is missing.* restore (that )?was interrupted"):
            start(data_dir, target)
        refused += 1
    assert refused > 5
    assert (target / "minikms-audit.log").exists(), "a directory that starts has the line about its restore"
    assert start(data_dir, target) == keyring.parse_file((data_dir / "keyring.json").read_bytes())[0].keyring_id


def test_a_restored_directory_names_the_archive_that_still_holds_its_keys(data_dir: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    made(data_dir, archive)
    newest = max(path.stem for path in (data_dir / "kms-deks").iterdir())
    restored(data_dir, archive, tmp_path / "restored")
    source = RegisteredArchive(ARCHIVE_ID, str(archive), 1, 2, KEYS, 3, newest)
    register = ArchiveRegister(str(tmp_path / "restored"))
    assert [entry.path for entry in register.listed()] == [str(archive)]
    register.put(source)
    assert register.may_hold([newest]) == [[str(archive)]]


# --- verification -------------------------------------------------------------------------------------------------


def test_the_newest_key_of_an_archive_may_have_an_unreadable_file(data_dir: Path, tmp_path: Path) -> None:
    """The register says of each key whether the archive may hold it."""
    files = sorted((data_dir / "kms-deks").iterdir())
    files[-1].write_text("damaged")
    manifest = made(data_dir, tmp_path / "archive")
    assert manifest.unreadable == (files[-1].stem,)
    assert manifest.newest_key_id >= files[-1].stem


def test_keys_are_parsed_only_after_the_archive_is_authenticated(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "archive"
    made(data_dir, archive)
    data = bytearray(archive.read_bytes())
    data[-1] ^= 1
    archive.write_bytes(data)

    def fail(*_: object) -> None:
        raise AssertionError("parsed before the tag was checked")

    monkeypatch.setattr(create, "parsed_dek", fail)
    with task_for(data_dir) as task, pytest.raises(ArchiveError, match="altered"):
        create.verify(str(archive), task)


def test_an_archive_replaced_between_its_two_readings_is_not_good(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, other = tmp_path / "archive", tmp_path / "other"
    made(data_dir, archive)
    min((data_dir / "kms-deks").iterdir()).unlink()
    with task_for(data_dir) as task:
        create.create(str(data_dir), str(other), task, NewArchive("a_ffffffffffffffff", AT, lambda: None))
    check_tag = ArchiveReader.check_tag

    def exchanged(self: ArchiveReader, root: memoryview, arena: SecretArena) -> ArchiveManifest:
        other.replace(archive)
        return check_tag(self, root, arena)

    monkeypatch.setattr(ArchiveReader, "check_tag", exchanged)
    with task_for(data_dir) as task, pytest.raises(ArchiveError, match="changed while it was being read"):
        create.verify(str(archive), task)


def test_destroyed_keys_stay_destroyed_after_a_restore(data_dir: Path, tmp_path: Path) -> None:
    """Their files are put back into the archived directory."""
    victims = sorted(path.stem for path in (data_dir / "kms-deks").iterdir())[:2]
    kept = {key_id: (data_dir / "kms-deks" / f"{key_id}.json").read_bytes() for key_id in victims}

    async def destroy() -> None:
        async with opened_vault(data_dir) as one:
            for key_id in victims:
                await one.vault.retire(key_id)
                await one.vault.destroy(key_id)

    asyncio.run(destroy())
    for key_id, content in kept.items():
        (data_dir / "kms-deks" / f"{key_id}.json").write_bytes(content)
    made(data_dir, tmp_path / "archive")
    restored(data_dir, tmp_path / "archive", tmp_path / "restored")

    async def judge() -> None:
        async with opened_vault(tmp_path / "restored", key=key_file(data_dir)) as one:
            assert all(key_id in one.vault.destroyed for key_id in victims)
            assert [path.stem for path in (tmp_path / "restored" / "kms-deks").iterdir()] != victims
            assert len(list((tmp_path / "restored" / "kms-deks").iterdir())) == KEYS - 2

    (tmp_path / "restored" / "minikms-audit.log").write_bytes((data_dir / "minikms-audit.log").read_bytes())
    asyncio.run(judge())


async def test_an_archive_that_lacks_its_tombstones_is_not_good(data_dir: Path, tmp_path: Path) -> None:
    async with opened_vault(data_dir) as one:
        [key_id] = await one.make(1)
        await one.vault.retire(key_id)
        await one.vault.destroy(key_id)
    (data_dir / "kms-tombstones").unlink()
    with pytest.raises(ArchiveError, match="kms-tombstones is missing"):
        made(data_dir, tmp_path / "archive")


# --- creating an archive ---------------------------------------------------------------------------------------------


def test_an_archive_is_never_written_into_an_existing_file(data_dir: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.link(victim, staging_path(str(tmp_path / "archive"), ARCHIVE_ID))
    with pytest.raises(FileExistsError):
        made(data_dir, tmp_path / "archive")
    assert victim.read_text() == "precious"


def test_an_archive_without_a_durable_name_is_removed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_for_directories(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(create, "sync_file", fails_for_directories)
    path = str(tmp_path / "archive")
    with pytest.raises(StorageUnavailableError):
        made(data_dir, tmp_path / "archive")
    for _ in range(2):  # the names are gone, but not durably
        with pytest.raises(StorageUnavailableError):
            remove_failed(path, ARCHIVE_ID)
    monkeypatch.undo()
    assert remove_failed(path, ARCHIVE_ID)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "d.key"]


def test_a_leftover_archive_is_removed_but_not_one_in_progress(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "archive")
    leftover = Path(staging_path(path, ARCHIVE_ID))
    found: list[bool] = []
    verify = create.verify

    def verified(staging: str, task: Task) -> create.VerifiedArchive:
        found.append(remove_leftover(path, ARCHIVE_ID))
        return verify(staging, task)

    monkeypatch.setattr(create, "verify", verified)
    made(data_dir, tmp_path / "archive")
    assert found == [False]
    leftover.write_bytes(b"minikms-backup")
    assert remove_leftover(path, ARCHIVE_ID)
    assert not leftover.exists()
    assert remove_leftover(path, ARCHIVE_ID)


def test_an_archive_that_does_not_verify_is_not_restored(data_dir: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    made(data_dir, archive)
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(KmsRefusedError, match="cut short"):
        restored(data_dir, archive, tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_longer_archive_in_the_same_place_does_not_fill_the_disk(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive, longer = tmp_path / "archive", tmp_path / "longer"
    made(data_dir, archive)
    key_id = next(iter((data_dir / "kms-deks").iterdir())).stem
    with longer.open("wb") as file:
        writer = ArchiveWriter(file)
        for number in range(KEYS + 1):
            writer.add(dek_entry_name(f"{key_id[:-1]}{number}"), b"{}")
    verify = create.verify

    def exchanged(path: str, task: Task) -> create.VerifiedArchive:
        good = verify(path, task)
        longer.replace(archive)
        return good

    monkeypatch.setattr(create, "verify", exchanged)
    with pytest.raises(ArchiveError, match="changed while it was being read"):
        restored(data_dir, archive, tmp_path / "restored")
    assert len(list((tmp_path / "restored" / "kms-deks").iterdir())) <= KEYS
