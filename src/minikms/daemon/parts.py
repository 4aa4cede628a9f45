"""What a running daemon consists of.

Owns: making each part over an opened data directory (`minikms.datadir`), joining them, and closing them. Invariants:
one worker thread for each kind of disk work, so that none waits behind another's sync, and each does one job at a time;
`close` waits for the jobs that have begun, then closes files and zeroes keys. It must never serve: that is
`minikms.daemon.process`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import NamedTuple

from minikms.audit import Event
from minikms.audit.maintenance import Maintenance
from minikms.audit.reader import LOG_NAME
from minikms.audit.turns import TurnAudit
from minikms.custody.rotation import KekRotation, Pruning
from minikms.custody.vault import Indexing
from minikms.daemon.application import Application, Session
from minikms.daemon.settings import Settings
from minikms.daemon.status import StatusPage
from minikms.datadir import DataDir, written_at_start
from minikms.http import HttpServer, Limits
from minikms.memory import libc
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.memory.process import Measure, name_thread
from minikms.policy import Policy
from minikms.roots.providers import KeyFile
from minikms.service.base import VerbTable
from minikms.service.keks import KekVerbs
from minikms.service.keys import KeyVerbs
from minikms.service.lifecycle import LifecycleVerbs
from minikms.service.records import RecordVerbs


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


class Parts:
    """All parts of one run. Made and used in the loop's thread. `data` stays open until `close`."""

    def __init__(
        self,
        *,
        settings: Settings,
        policy: Policy,
        data: DataDir,
        workers: Workers,
        arena: SecretArena,
        measures: tuple[Measure, ...],
        connections_max: int,
        on_internal_error: Callable[[str], None],
    ) -> None:
        self._data = data
        self._workers = workers
        self.vault = data.vault
        self.audit = TurnAudit(data.log, workers.audit)
        self.upkeep = Maintenance(data.log, keep=settings.audit_keep, forwarder=settings.forwarder)
        self.indexing = Indexing(self.vault, workers.reader)
        rotation = KekRotation(
            self.vault,
            reader=workers.reader,
            disk=workers.disk,
            around_passes=_one_cpu_for(workers.reader, workers.disk),
        )
        table = VerbTable(self.audit)
        RecordVerbs(self.vault, table)
        KeyVerbs(self.vault, table)
        LifecycleVerbs(vault=self.vault, table=table, indexing=self.indexing, reader=workers.reader)
        self.keks = KekVerbs(
            vault=self.vault,
            table=table,
            rotation=rotation,
            pruning=Pruning(self.vault, reader=workers.reader, disk=workers.disk),
            opened_slot_id=data.slot.slot_id,
            rewrite_root=_root_rewriter(settings, arena, workers),
        )
        page = StatusPage(
            settings=settings,
            data=data,
            upkeep=self.upkeep,
            measures=measures,
            rotation=rotation,
            indexing=self.indexing,
            keks=self.keks,
        )
        self.app = Application(
            table=table,
            status=page.build,
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
        """The first line of this run, and what an earlier one left to do.

        Raises StartError when the line can't be written.
        """
        body = self.vault.keyring.body
        facts: dict[str, str | int] = {"epoch": body.epoch, "kek_version": body.wrapping_kek.version}
        if self._data.seen_epoch > self._data.found_epoch:
            facts |= {"restore_accepted": self._data.found_epoch, "epoch_before": self._data.seen_epoch}
        event = Event(type="start", actor="minikms", pid=os.getpid(), facts=facts)
        with written_at_start(os.path.join(self._data.log.directory, LOG_NAME)):
            await self.audit.add_written(event, durable=True)
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
        await self._data.drain()
        loop = asyncio.get_running_loop()
        for worker in (self._workers.disk, self._workers.reader):
            await loop.run_in_executor(worker, int)  # after the jobs of requests that were cancelled
        await loop.run_in_executor(self._workers.upkeep, self.upkeep.close)  # after its last job
        self._data.close()


@contextlib.contextmanager
def on_one_cpu(thread_ids: Sequence[int]) -> Iterator[None]:
    """Keeps these threads (kernel thread ids) of this process on the processor that the caller runs on now.

    Why: a worker that makes many short system calls beside a busy event loop asks for the interpreter after each of
    them. On two processors the two threads compete for it, and rewrapping a key takes more than twice as long as on
    one. Each thread gets its affinity back at the end, which must come soon: the scheduler knows better in the long
    run. Where the system has no affinity or refuses it (systemd's `@resources`), nothing changes.
    """
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


def _one_cpu_for(*workers: ThreadPoolExecutor) -> Callable[[], AbstractContextManager[None]]:
    """`on_one_cpu` for this thread and those of the workers."""
    thread_ids = [threading.get_native_id(), *(worker.submit(threading.get_native_id).result() for worker in workers)]
    return lambda: on_one_cpu(thread_ids)


def _root_rewriter(
    settings: Settings, arena: SecretArena, workers: Workers
) -> Callable[[SecretSlot], asyncio.Future[None]] | None:
    file = settings.root
    if not isinstance(file, KeyFile) or not file.rewritable:
        return None
    return lambda root: asyncio.ensure_future(file.replace(root, arena, workers.disk))


def _worker(name: str) -> ThreadPoolExecutor:
    """A worker whose thread runs from now on: where no thread can be made, the daemon does not start."""
    executor = ThreadPoolExecutor(1, initializer=name_thread, initargs=(name,))
    executor.submit(int).result()
    return executor
