"""Backups of the store: a checkpoint beside running writes, copied, hashed and read back; restored into an empty place.

Owns: the layout of a backup directory (`manifest.json`, `store/`) and the register of backups (`keyspace.BACKUPS`).
Invariants:
- A backup holds nothing that the store's directory does not: sealed records, ids and stamps. It is of use only
  together with one of the key service that was made after it: the store first, the key service second.
- A backup is registered before its checkpoint is taken, so that whoever destroys keys knows of it; a backup is complete
  when its manifest exists, which is written last: after each file and each block of RocksDB was read back.
- A backup that fails or is cancelled leaves nothing behind and is then removed from the register. Otherwise an entry is
  removed only when an operator says so: a directory that is not found may be on a disk that is not mounted, or may have
  been moved. A cancelled call returns when nothing uses the engine any more.
- Restoring reads every file and block first and never writes into a directory that holds something.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.platform.sync import sync_directory, sync_file
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import keyspace, places
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Commits, Engine, pages
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import (
    BackupBusyError,
    BackupError,
    BackupExistsError,
    BackupFile,
    BackupNotFoundError,
    BackupOfDatabaseError,
    BackupThereError,
    ConditionFailedError,
    FormatError,
    Manifest,
    RegisteredBackup,
    StoreUnavailableError,
)
from progressdb_server.store.offline import WALK_BYTES_MAX

MANIFEST: Final = "manifest.json"
STORE: Final = "store"
COPY_BYTES: Final = 1024 * 1024
FORMAT: Final = 1
_CURRENT: Final = "CURRENT"
"""RocksDB looks for this file first."""


class Backups:
    """Backups of the store. Every method may raise StoreUnavailableError."""

    def __init__(self, engine: Engine, writer: Commits, clock: Clock) -> None:
        self._engine = engine
        self._reads = engine.reads
        self._writer = writer
        self._clock = clock
        self._backing_up = False
        self.newest_ns: float = math.nan
        """When the newest registered backup was begun, in Unix ns, as it was last looked at; 0 without one, NaN while
        that can't be read."""

    async def back_up(self, path: str) -> Manifest:
        """Make a verified backup in the new directory `path`, beside running writes. The key service is backed up after
        this. Raises BackupError."""
        if not self._engine.makes_backups:
            raise BackupOfDatabaseError
        path = os.path.abspath(path)  # noqa: ASYNC240  no lookup
        if self._backing_up:
            raise BackupBusyError
        if os.path.lexists(path):  # noqa: ASYNC240  one lookup, as short as the engine's own reads
            raise BackupExistsError(f"{path} exists already; a backup never overwrites one")
        self._backing_up = True
        try:
            known = RegisteredBackup(path, self._clock.now_ns())
            await self._writer.commit(Write(((keyspace.backup(known.created_ns), msgspec.json.encode(known)),)))
            self.newest_ns = known.created_ns
            stop = threading.Event()
            copy = asyncio.ensure_future(asyncio.to_thread(_create, self._engine, path, known.created_ns, stop))
            try:
                return await asyncio.shield(copy)
            except (BackupError, StoreUnavailableError, asyncio.CancelledError):
                stop.set()
                await asyncio.gather(copy, return_exceptions=True)
                if known.gone:
                    await self._forget([known])
                raise
            finally:
                del copy  # the traceback of its error leads to this frame
        finally:
            self._backing_up = False

    async def register(self, label: str, begun_ns: int | None = None) -> RegisteredBackup:
        """Add a backup of the database, which is made by another program: it is begun after this, or was at `begun_ns`.
        Raises BackupExistsError; BackupError for a store in files."""
        if self._engine.makes_backups:
            raise BackupError("only backups of a database are registered: progressdb backup create makes this one")
        if label in [backup.name async for backup in self.registered()]:
            raise BackupExistsError(f"a backup {label} is registered already")
        known = RegisteredBackup(label, await self._engine.now_ns() if begun_ns is None else begun_ns, of_database=True)
        entry = keyspace.backup(known.created_ns)
        try:
            await self._writer.commit(Write(((entry, msgspec.json.encode(known)),), ((entry, None),)))
        except ConditionFailedError:
            raise BackupExistsError("another backup was begun at that time") from None
        return known

    async def registered(self) -> AsyncIterator[RegisteredBackup]:
        """The backups that were begun and not removed from the register, oldest first."""
        async for entries in pages(self._reads, keyspace.BACKUPS, keyspace.after(keyspace.BACKUPS)):
            for _, value in entries:
                yield msgspec.json.decode(value, type=RegisteredBackup)

    async def look_at_newest(self) -> None:
        """For `newest_ns`. Raises StoreUnavailableError."""
        try:
            (newest,) = await self._reads.newest([keyspace.BACKUPS])
        except Exception:
            self.newest_ns = math.nan
            raise
        self.newest_ns = int(newest[len(keyspace.BACKUPS) :]) if newest else 0

    async def damage_of_newest(self) -> str:
        """Why the newest backup can't be restored, as far as its manifest and the lengths of its files show; empty if
        nothing is wrong, and where this server makes no backups. Raises StoreUnavailableError."""
        if self._backing_up or not self._engine.makes_backups or not self.newest_ns > 0:
            return ""
        raw = await self._reads.get(keyspace.backup(int(self.newest_ns)))
        if raw is None:
            return "the newest is not registered any more"
        known = msgspec.json.decode(raw, type=RegisteredBackup)
        try:
            await asyncio.to_thread(check_lengths, known.path)
        except BackupError as error:
            return str(error)
        return ""

    async def forget(self, name: str) -> list[RegisteredBackup]:
        """Remove the backup from the register: keys that only it needed may be destroyed. Returns the entries that it
        had. Raises BackupNotFoundError, BackupThereError."""
        backups = [backup async for backup in self.registered() if backup.name == name]
        if not backups:
            raise BackupNotFoundError(f"no backup {name} is registered")
        if there := [known.path for known in backups if not known.gone]:
            raise BackupThereError(f"{there[0]} still exists: delete it and all its copies first")
        await self._forget(backups)
        return backups

    async def _forget(self, backups: Sequence[RegisteredBackup]) -> None:
        await self._writer.commit(Write([(keyspace.backup(known.created_ns), None) for known in backups]))
        await self.look_at_newest()


@asynccontextmanager
async def open_register(place: str, *, single_node: bool) -> AsyncIterator[Backups]:
    """The backups of a store in a database, beside its servers, or of one in files that no server has open. Raises
    StoreLockedError, StoreUnavailableError, BackupError."""
    try:
        engine = await places.open_engine(place, single_node=single_node, make=False)
        try:
            clock = Clock(time.time_ns)
            writer = engine.writer(clock, StoreMetrics(), lambda: None)
            try:
                yield Backups(engine, writer, clock)
            finally:
                await writer.close()
        finally:
            await engine.end()
    except FormatError as error:
        raise BackupError(str(error)) from error


def _create(engine: Engine, path: str, created_ns: int, stop: threading.Event) -> Manifest:
    """Make the backup directory `path`, which must not exist.

    Blocks for as long as the copying takes: call it in a worker thread. When it fails, or `stop` is set before the next
    file, the directory is removed again. Raises BackupError, StoreUnavailableError.
    """
    try:
        os.makedirs(path, mode=0o700)
        try:
            return _make(engine, path, created_ns, stop)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    except OSError as error:
        raise BackupError(f"the backup {path} failed: {error.strerror} ({error.filename})") from error


def _make(engine: Engine, path: str, created_ns: int, stop: threading.Event) -> Manifest:
    """Fills the directory. Raises OSError."""
    staging = os.path.join(path, "checkpoint")
    engine.checkpoint(staging)
    os.mkdir(os.path.join(path, STORE), mode=0o700)
    files: list[BackupFile] = []
    for name in sorted(os.listdir(staging)):
        _go_on(path, stop)
        source = os.path.join(staging, name)
        files.append(BackupFile(name, *_digest(source)))
        _copy(source, os.path.join(path, STORE, name))
    shutil.rmtree(staging)
    manifest = Manifest(FORMAT, created_ns, files)
    sync_directory(os.path.join(path, STORE))
    _read_back(path, manifest, stop)
    _write(os.path.join(path, MANIFEST), msgspec.json.format(msgspec.json.encode(manifest)))
    sync_directory(path)
    return manifest


def read_manifest(path: str) -> Manifest:
    try:
        with open(os.path.join(path, MANIFEST), "rb") as file:
            manifest = msgspec.json.decode(file.read(), type=Manifest)
    except OSError as error:
        raise BackupError(f"{path} is no complete backup: {error.strerror} ({MANIFEST})") from error
    except UNDECODABLE as error:
        raise BackupError(f"{path}: the manifest is damaged") from error
    if manifest.format != FORMAT:
        raise BackupError(f"{path} has backup format {manifest.format}, this version reads {FORMAT}")
    if any(os.path.basename(file.name) != file.name or file.name in ("", ".", "..") for file in manifest.files):
        raise BackupError(f"{path}: the manifest names a file outside the backup")
    return manifest


def check_lengths(path: str) -> None:
    """Checks that every file of the manifest is there, with its length. Raises BackupError."""
    for file in read_manifest(path).files:
        try:
            length = os.stat(os.path.join(path, STORE, file.name)).st_size
        except OSError as error:
            raise BackupError(f"{path} is not whole: {error.strerror} ({file.name})") from error
        if length != file.bytes:
            raise BackupError(f"{path}: {file.name} is not what was backed up")


def verify(path: str) -> Manifest:
    """Every file against the manifest, then the store itself: it opens, has a format that this version reads, and each
    block of it can be read. No record is opened. Raises BackupError."""
    manifest = read_manifest(path)
    _read_back(path, manifest, threading.Event())
    return manifest


def _read_back(path: str, manifest: Manifest, stop: threading.Event) -> None:
    """Reads the backup back and compares it. Raises BackupError, also when `stop` is set."""
    store = os.path.join(path, STORE)
    try:
        extra = set(os.listdir(store)) - {file.name for file in manifest.files}
        for file in manifest.files:
            if _digest(os.path.join(store, file.name)) != (file.bytes, file.sha256):
                raise BackupError(f"{path}: {file.name} is not what was backed up")
    except OSError as error:
        raise BackupError(f"{path} is not whole: {error.strerror} ({error.filename})") from error
    if extra:
        raise BackupError(f"{path} holds files that the manifest does not name: {', '.join(sorted(extra))}")
    try:
        with places.open_reader(store) as reader:
            lower = b""
            while page := reader.scan(lower, keyspace.END, limit=SCAN_ENTRIES_MAX, bytes_max=WALK_BYTES_MAX):
                lower = keyspace.next_key(page[-1][0])
                _go_on(path, stop)
    except StoreUnavailableError as error:
        raise BackupError(f"{path}: {error.explained}") from error
    except FormatError as error:
        raise BackupError(f"{path}: {error}") from error


def _go_on(path: str, stop: threading.Event) -> None:
    if stop.is_set():
        raise BackupError(f"the backup {path} was cancelled")


def restore(path: str, target: str) -> Manifest:
    """Put the backup's store into the directory `target`, which must be missing or empty. Raises BackupError."""
    manifest = verify(path)
    try:
        os.makedirs(target, mode=0o700, exist_ok=True)
        if os.listdir(target):
            raise BackupError(f"{target} is not empty: move what is there away first")
        for file in manifest.files:
            if file.name != _CURRENT:
                _copy(os.path.join(path, STORE, file.name), os.path.join(target, file.name))
        # last, so that a restore that was interrupted is no store
        _copy(os.path.join(path, STORE, _CURRENT), os.path.join(target, _CURRENT))
        sync_directory(target)
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})"
        if isinstance(error, PermissionError):
            reason += ": the directory must belong to the server's user, who runs this"
        raise BackupError(f"restoring to {target} failed: {reason}") from error
    return manifest


def _copy(source: str, target: str) -> None:
    with open(source, "rb") as reading, open(target, "xb", opener=_private) as writing:
        shutil.copyfileobj(reading, writing, COPY_BYTES)
        writing.flush()
        sync_file(writing.fileno())


def _write(path: str, content: bytes) -> None:
    with open(path, "xb", opener=_private) as file:
        file.write(content)
        file.flush()
        sync_file(file.fileno())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _digest(path: str) -> tuple[int, str]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest
