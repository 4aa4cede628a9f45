"""One processor for threads that keep handing the interpreter to each other.

Owns: the affinity of a few threads while they do one long piece of work together. Why: a worker that makes many short
system calls beside a busy event loop asks for the interpreter after each of them, and on two processors the two threads
fight for it; a rewrapped key then costs more than twice the time that it takes on one. Invariants: each thread gets its
affinity back; where the system knows no affinity or refuses it (systemd's `@resources`), nothing changes. It must not
last longer than the work: the scheduler knows better in the long run.

What a running daemon consists of.

Owns: opening the files of a data directory, making each part and joining them. Order of the opening, each step a
precondition of the next: keyring (then the root key is gone), its epoch against the audit log's, audit log, use leases,
the epoch of this start. Invariants: one worker thread for each kind of disk work, so that none waits behind another's
sync, and each does one thing at a time; `close` gives back in the opposite order, keys zeroed. It must never serve:
that is `minikms.daemon.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from minikms import datadir
from minikms.audit import AuditLog, Event, ExpectedLog
from minikms.audit.maintenance import Maintenance
from minikms.audit.shipping import FileForwarder
from minikms.audit.turns import TurnAudit
from minikms.crypto.aead import NonceSource, scrub_stack
from minikms.custody.deks import DekStore
from minikms.custody.files import DataDirLock, now_ns
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.lease_store import LeaseStore
from minikms.custody.leases import Leases
from minikms.custody.rotation import KekRotation, Pruning
from minikms.custody.rotation_backups import RotationBackups, newest_key_id
from minikms.custody.vault import CACHE_KEYS_MAX, Indexing, Vault
from minikms.daemon.application import Application, Session
from minikms.daemon.settings import Settings
from minikms.daemon.status import StatusPage
from minikms.datadir import Opened, highest_epoch, keys_of, since
from minikms.errors import StartError
from minikms.http import HttpServer, Limits
from minikms.keys.dek import key_id_to_bytes
from minikms.memory import libc
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.memory.process import Measure, name_thread
from minikms.policy import Policy
from minikms.roots.key_file import KeyText, holds_key, remove_leftover, rewrite_key_file
from minikms.service.keks import KekVerbs
from minikms.service.keys import KeyIssuing
from minikms.service.lifecycle import KeyLifecycle
from minikms.service.records import KeyService


@contextlib.contextmanager
def on_one_cpu(thread_ids: Sequence[int]) -> Iterator[None]:
    """Keeps these threads (ids of the kernel) of this process on the processor that the caller runs on now."""
    before: dict[int, set[int]] = {}
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not Linux
        current = libc.library().sched_getcpu()
        for thread_id in thread_ids:
            before[thread_id] = os.sched_getaffinity(thread_id)
            os.sched_setaffinity(thread_id, {current})
    try:
        yield
    finally:
        for thread_id, affinity in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread_id, affinity)


class Workers(NamedTuple):
    """`disk` changes key files and keyring, `reader` reads key files, the others are named after what they serve."""

    disk: ThreadPoolExecutor
    reader: ThreadPoolExecutor
    journal: ThreadPoolExecutor
    audit: ThreadPoolExecutor
    upkeep: ThreadPoolExecutor

    @classmethod
    def start(cls) -> Workers:
        return cls(*(_worker(name) for name in cls._fields))

    def shutdown(self) -> None:
        """Returns when what was begun is done."""
        for worker in self:
            worker.shutdown()


class Files(NamedTuple):
    """The opened files of a data directory. `seen_epoch`: the highest that the audit log told of before this start."""

    opened: Opened
    keyring: KeyringFile
    log: AuditLog
    leases: LeaseStore
    nonces: NonceSource
    seen_epoch: int
    found_epoch: int


def open_files(settings: Settings, lock: DataDirLock, arena: SecretArena, workers: Workers) -> Files:
    """Opens them, and raises the epoch. Raises StartError, StorageUnavailableError, AuditUnavailableError, OSError."""
    nonces = NonceSource()
    keyring_file = KeyringFile(lock.directory_fd, workers.disk)
    source = _root_source(settings)
    for path in (source.file if settings.rewrite_master_key_file else None, source.dev_file):
        if path is not None:
            remove_leftover(path)
    opened = datadir.open_keyring(
        data_dir=settings.data_dir, file=keyring_file, source=source, arena=arena, nonces=nonces
    )
    unlocked = opened.unlocked
    found_epoch = unlocked.body.epoch
    seen_epoch = highest_epoch(settings.data_dir)
    if not settings.accept_restore:
        datadir.check_newest(unlocked, seen_epoch)
    log = _open_log(settings, opened)
    # Epoch 1 is the keyring's making: no start has come so far as to raise it.
    leases = LeaseStore.open(lock.directory_fd, create=found_epoch == 1)
    if seen_epoch > found_epoch:
        leases.add_restore_uses(key_id_to_bytes(newest_key_id(settings.data_dir)))
    datadir.raise_epoch(unlocked, keyring_file, restored_below=seen_epoch)
    return Files(opened, keyring_file, log, leases, nonces, seen_epoch, found_epoch)


class Assembly:
    """All parts of one run. Made and used in the loop's thread."""

    def __init__(
        self,
        *,
        settings: Settings,
        policy: Policy,
        files: Files,
        workers: Workers,
        arena: SecretArena,
        measures: tuple[Measure, ...],
        connections_max: int,
        on_internal_error: Callable[[str], None],
    ) -> None:
        self._files = files
        self._workers = workers
        self.log = files.log
        self.store = DekStore(settings.data_dir, workers.disk)
        self.rotation_backups = RotationBackups(settings.data_dir)
        self.leases = Leases(files.leases, workers.journal)
        self.vault = Vault(
            arena=arena,
            unlocked=files.opened.unlocked,
            keyring_file=files.keyring,
            store=self.store,
            rotation_backups=self.rotation_backups,
            leases=self.leases,
            executor=workers.disk,
            nonces=files.nonces,
            cache_keys_max=settings.cache_keys_max or CACHE_KEYS_MAX,
        )
        self.audit = TurnAudit(files.log, workers.audit)
        self.upkeep = Maintenance(
            files.log,
            keep=settings.audit_keep,
            forwarder=None if settings.audit_copy is None else FileForwarder(settings.audit_copy),
        )
        self.indexing = Indexing(self.vault, workers.reader)
        rotation = KekRotation(
            self.vault,
            reader=workers.reader,
            disk=workers.disk,
            around_passes=_one_cpu_for(workers.reader, workers.disk),
        )
        self.keks = KekVerbs(
            vault=self.vault,
            audit=self.audit,
            rotation=rotation,
            pruning=Pruning(self.vault, reader=workers.reader, disk=workers.disk),
            opened_slot_id=files.opened.slot.slot_id,
            rewrite_root=_root_rewriter(settings, arena, workers),
        )
        page = StatusPage(
            settings=settings,
            opened=files.opened,
            vault=self.vault,
            log=files.log,
            upkeep=self.upkeep,
            measures=measures,
            rotation=rotation,
            indexing=self.indexing,
            keks=self.keks,
        )
        self.app = Application(
            service=KeyService(self.vault, self.audit),
            issuing=KeyIssuing(self.vault, self.audit, page.build),
            lifecycle=KeyLifecycle(vault=self.vault, audit=self.audit, indexing=self.indexing, reader=workers.reader),
            keks=self.keks,
            policy=policy,
            audit=self.audit,
            vault=self.vault,
            connections_max=connections_max,
        )
        self.server: HttpServer[Session] = HttpServer(
            self.app,
            loop=asyncio.get_running_loop(),
            on_internal_error=on_internal_error,
            limits=Limits(connections_max=connections_max),
        )
        page.server = self.server

    async def begin(self) -> None:
        """The first line of this run, and what an earlier one left to do. Raises AuditUnavailableError."""
        body = self.vault.keyring.body
        facts: dict[str, str | int] = {"epoch": body.epoch, "kek_version": body.wrapping_kek.version}
        if self._files.seen_epoch > self._files.found_epoch:
            facts |= {"restore_accepted": self._files.found_epoch, "epoch_before": self._files.seen_epoch}
        await self.audit.add_written(Event(type="start", actor="minikms", pid=os.getpid(), facts=facts), durable=True)
        await self.keks.drop_older_roots()
        self.keks.ensure_running()

    async def end(self, why: str) -> None:
        """The last line of this run. Raises AuditUnavailableError."""
        facts: dict[str, str | int] = {"epoch": self.vault.keyring.body.epoch}
        await self.audit.add_written(
            Event(type="stop", actor="minikms", pid=os.getpid(), detail=why, facts=facts), durable=True
        )

    async def close(self) -> None:
        """Waits for what is on its way to disk, closes the files and zeroes the keys. Raises AuditUnavailableError."""
        await self.keks.stop()
        await self.store.drain()
        await self.leases.drain()
        loop = asyncio.get_running_loop()
        for worker in (self._workers.disk, self._workers.reader):
            await loop.run_in_executor(worker, int)  # after what was begun for somebody who stopped waiting
        await loop.run_in_executor(self._workers.upkeep, self.upkeep.close)  # after its last work
        try:
            self.log.close()
        finally:
            self.vault.close()
            self._files.leases.close()
            self.store.close()
            self.rotation_backups.close()
            scrub_stack()


def _one_cpu_for(*workers: ThreadPoolExecutor) -> Callable[[], AbstractContextManager[None]]:
    """For this thread and those of the workers."""
    thread_ids = [threading.get_native_id(), *(worker.submit(threading.get_native_id).result() for worker in workers)]
    return lambda: on_one_cpu(thread_ids)


def _open_log(settings: Settings, opened: Opened) -> AuditLog:
    unlocked = opened.unlocked
    audit_key = unlocked.body.audit_key
    mac_key, seed = unlocked.audit_key(audit_key.version)
    return AuditLog.open(
        settings.data_dir,
        audit_key=mac_key,
        seed=seed,
        now_ns=now_ns,
        fsync=settings.audit_fsync,
        key_version=audit_key.version,
        former=keys_of(unlocked).former,
        since=since(audit_key),
        expected=ExpectedLog(exists=unlocked.body.epoch > 1, head=settings.expect_audit_head),
        accept_loss=settings.accept_audit_loss,
        hash_thread_ids=settings.audit_hash_thread_ids,
        limits=settings.audit_limits,
    )


def _root_source(settings: Settings) -> datadir.RootSource:
    given = settings.master_key_file is not None or settings.master_key_fd is not None
    return datadir.RootSource(
        file=settings.master_key_file,
        descriptor=settings.master_key_fd,
        dev_file=settings.dev_key_file if settings.dev and not given else None,
    )


def _root_rewriter(
    settings: Settings, arena: SecretArena, workers: Workers
) -> Callable[[SecretSlot], asyncio.Future[None]] | None:
    path = settings.master_key_file
    if not settings.rewrite_master_key_file or path is None:
        return None
    return lambda root: asyncio.ensure_future(_rewrite(path, root, arena, workers))


async def _rewrite(path: Path, root: SecretSlot, arena: SecretArena, workers: Workers) -> None:
    """The wait for the disk in a worker; all that touches the arena's book in the loop's thread.

    Raises OSError, and StartError when what is read back is another key.
    """
    with KeyText(root, arena) as text:
        text.encode()
        writing = asyncio.get_running_loop().run_in_executor(workers.disk, rewrite_key_file, path, text)
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # The worker goes on: zeroed under it, the text would put a key of zeros into the file.
            await asyncio.wait([writing])
            raise
    if not holds_key(path, root, arena):
        raise StartError(f"the master key file {path} does not hold the key that was written")


def _worker(name: str) -> ThreadPoolExecutor:
    """One thread, there from now on: a process short of threads refuses to start and not to serve."""
    executor = ThreadPoolExecutor(1, initializer=name_thread, initargs=(name,))
    executor.submit(int).result()
    return executor
