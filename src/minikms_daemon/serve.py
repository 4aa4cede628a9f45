"""The process of the daemon: start, background work, and stop.

Owns the order of the start, in which each step is a precondition of the next: read the policy file, raise the limit of
open files, block signals, lock the data directory, bind the socket, make the arena, harden the process (it has one
thread until here), open the data directory (`minikms.datadir`), write the `start` line of the audit log, serve. A
sealed start serves without the two steps before (`minikms_daemon.seal`). And the order of the stop: accept no more
connections, interrupt a rotation, finish the requests in flight, close the files, zero the keys, release the lock. It
must never serve a verb before the epoch of this start is durable, or after the audit log is closed.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import cryptography.hazmat.backends.openssl.backend  # noqa: F401  else loaded with the first key
import uvloop

from minikms.api.errors import (
    InvalidRequestError,
    KmsError,
    KmsRefusedError,
    StartError,
    StartLaterError,
    StorageUnavailableError,
)
from minikms.api.printable import clean
from minikms.audit.log import FSYNC_INTERVAL_MS
from minikms.custody import replica_file
from minikms.custody.archive_register import ArchiveRegister
from minikms.custody.vault import Vault
from minikms.datadir import SERVICE_SLOTS, lock_data_dir
from minikms.http.accepting import DESCRIPTORS_COUNT, Acceptor, bound_warning, connections_bound
from minikms.memory.arena import SecretArena
from minikms.memory.imports import end_imports
from minikms.memory.process import Measure, harden, library_paths
from minikms.memory.signals import SignalReader
from minikms.platform.accepting import raise_descriptor_limit
from minikms.platform.directory_lock import DataDirLock
from minikms.platform.files import remove_left_temps
from minikms.platform.logs import Log, service_logger
from minikms.platform.notify import Notifier
from minikms.platform.process_metrics import open_process_files
from minikms.policy.policy import Policy
from minikms.processes.flags import DATA_USER_ADVICE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISSING
from minikms.processes.running import Run, every
from minikms.processes.sockets import UnixListener, listen
from minikms.roots.providers import UNLOCK
from minikms_daemon.seal.seal import SealableServer
from minikms_daemon.server.parts import Parts
from minikms_daemon.server.policy_in_force import PolicyInForce
from minikms_daemon.server.run_context import RunContext, Workers
from minikms_daemon.server.settings import Settings, settings_of

DRAIN_SECONDS_MAX: Final = 10.0
HOUSEKEEPING_SECONDS: Final = 1.0
UPKEEP_SECONDS: Final = 2.0
CHORE_RETRY_SECONDS: Final = 1.0
SWEEP_SECONDS: Final = 60.0
"""Pause before temporary files that could not be removed, or that were too young, are looked for again."""
GC_THRESHOLDS: Final = (100_000, 20, 50)
"""The daemon makes almost no reference cycles; with Python's default, collections take a tenth of its time under load.
"""
SWITCH_SECONDS: Final = 0.001
"""How long a thread keeps the interpreter while another thread waits for it. Worker threads make many short calls, and
under load wait that long after each of them; Python's default is 5 ms.
"""

_WRONG: Final = (StartError, StorageUnavailableError, InvalidRequestError, OSError)
"""Errors of a start that systemd need not try again."""

T = TypeVar("T")


def main() -> None:
    """Serves with the flags behind the descriptor that the first word of the command line names. Ends the process: with
    status 1 after a start that may succeed later, with 2 if something has to be changed before.
    """
    try:
        serve(settings_of(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (KmsError, OSError) as error:
        if isinstance(error, OSError) and not error.strerror:
            raise
        causes = [error, *([error.__cause__] if isinstance(error, StorageUnavailableError) else [])]
        text = ": ".join(_system_text(each) if isinstance(each, OSError) else str(each) for each in causes if each)
        print(f"minikms: {clean(text)}", file=sys.stderr)
        may_succeed = not isinstance(error, _WRONG) or isinstance(error, StartLaterError)
        sys.exit(EXIT_FAILED if may_succeed else EXIT_MISSING)


def serve(settings: Settings) -> None:
    """Serves until SIGTERM, SIGINT, SIGQUIT, or the end of the parent. Raises StartError, saying why it can't start and
    what to do.
    """
    log = service_logger(settings.flags.log_format)
    notifier = Notifier(os.environ)
    policy = _policy(settings)
    connections_max = connections_bound(raise_descriptor_limit(DESCRIPTORS_COUNT))
    too_few = bound_warning(connections_max)
    if too_few is not None:
        log.warning("fewer connections than promised", why=too_few)
    with (
        SignalReader() as signals,
        lock_data_dir(settings.flags.data_dir, settings.opening.audit_dir) as lock,
        listen(
            settings.flags.socket,
            os.environ,
            mode=settings.socket_mode,
            group=settings.flags.socket_group,
            make_directory=settings.flags.make_socket_dir,
        ) as listener,
        SecretArena(settings.opening.cache_keys_max + SERVICE_SLOTS) as arena,
    ):
        load_configured(settings, lock)
        open_process_files(settings.build)
        measures = _harden(settings, policy, arena, listener)
        end_imports()
        run = Run(signals, notifier, log)
        workers = Workers.start()
        try:
            process = RunContext(
                settings=settings,
                policy=policy.in_force(directory_fd=lock.directory_fd, executor=workers.policy, log=log),
                lock=lock,
                arena=arena,
                measures=measures,
                connections_max=connections_max,
                workers=workers,
                notifier=notifier,
                log=log,
                on_internal_error=run.internal_error,
            )
            sys.setswitchinterval(SWITCH_SECONDS)
            uvloop.run(Daemon(process, listener, run).serve())
        finally:
            workers.shutdown()
        log.info("stopped", why=run.why)


def load_configured(settings: Settings, lock: DataDirLock) -> None:
    """Loads what only some configurations need, before imports end."""
    if replica_file.read(lock.directory_fd) is not None:
        for name in ("minikms.custody.member", "minikms_daemon.replica.member"):
            import_module(name)
    if settings.root.name == UNLOCK:
        import_module("minikms_daemon.seal.unlocking")
    if settings.opening.audit_dir is not None:
        import_module("minikms_daemon.service.auditor")
    if settings.flags.refuse_when_unshipped is not None:
        import_module("minikms_daemon.server.lagging")


class _Steps(Coroutine[Any, Any, T]):
    """The coroutine of a task; `ended` is called after each of its steps."""

    __slots__ = ("_ended", "_work")

    def __init__(self, work: Coroutine[Any, Any, T], ended: Callable[[], None]) -> None:
        self._work = work
        self._ended = ended

    def send(self, value: Any, /) -> Any:
        try:
            return self._work.send(value)
        finally:
            self._ended()

    def throw(self, *error: Any) -> Any:
        try:
            return self._work.throw(*error)
        finally:
            del error  # its traceback leads to this frame
            self._ended()

    def close(self) -> None:
        self._work.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._work.__await__()


def end_steps_with(end: Callable[[], None]) -> None:
    """Calls `end` once after the steps that new tasks make in a turn of the running loop.

    The call comes before the loop waits, and before the callbacks of a task that has ended, so before its answer is
    written. It is made less deep in the stack than the steps.
    """
    running = asyncio.get_running_loop()
    due = False

    def end_turn() -> None:
        nonlocal due
        due = False
        end()

    def ended() -> None:
        nonlocal due
        if not due:
            running.call_soon(end_turn)
            due = True

    def task(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(_Steps(work, ended), loop=loop, **options)

    running.set_task_factory(task)


class ChosenPolicy(NamedTuple):
    """What decides who may do what. `in_force` takes the keyword arguments of `FileInForce`. `read_paths`: what the
    hardened process must read for it.
    """

    in_force: Callable[..., PolicyInForce]
    read_paths: list[str]


@dataclass(eq=False, repr=False)
class Daemon:
    """One run of the service. Used in the loop's thread."""

    process: RunContext
    listener: UnixListener
    run: Run

    def __post_init__(self) -> None:
        self._flags = self.process.settings.flags
        self._running: list[asyncio.Task[None]] = []

    async def serve(self) -> None:
        sealable = SealableServer(self.process, self)
        end_steps_with(sealable.end_steps)
        await asyncio.create_task(self._serve_and_close(sealable))
        await self.process.policy.save()

    async def _serve_and_close(self, sealable: SealableServer) -> None:
        try:
            await sealable.start()
            await self._serve_until_stopped(sealable)
        finally:
            await self._close(sealable)

    async def _close(self, sealable: SealableServer) -> None:
        try:
            await sealable.close(self.run.why)
        except KmsRefusedError as error:
            self.run.log.error("audit log not signed at its end", why=str(error))  # noqa: TRY400  a refusal, no defect

    async def _serve_until_stopped(self, sealable: SealableServer) -> None:
        self.run.read_signals()
        if self._flags.parent_fd is not None:
            os.set_blocking(self._flags.parent_fd, False)
            asyncio.get_running_loop().add_reader(self._flags.parent_fd, self._on_parent)
        acceptor = Acceptor(self.listener.socket, sealable.server, on_failure=self.run.accept_failed)
        chores = self.process.policy.chores(self.run.hangup, sealable.audit)
        own = [
            asyncio.ensure_future(self._keep(lambda: self.run.watchdog(lambda: self.listener.reachable))),
            *(asyncio.ensure_future(self._keep(chore)) for chore in chores),
        ]
        if sealable.parts is not None:
            self.start(sealable.parts)
        gc.set_threshold(*GC_THRESHOLDS)
        self.run.log.info(
            sealable.summary.partition(" on ")[0], socket=self._flags.socket, data_dir=self._flags.data_dir
        )
        await self.run.until_stopped(sealable.summary)
        acceptor.close()
        self.listener.close()
        sealable.stop_waiting()
        if sealable.parts is not None:
            await sealable.parts.keks.stop()
        await sealable.server.drain(DRAIN_SECONDS_MAX)
        self.cancel()
        for task in own:
            task.cancel()
        await asyncio.wait([*own, *self._running])

    # --- background work ---------------------------------------------------------------------------------------------

    def start(self, parts: Parts) -> None:
        """Starts the background work of an unsealed daemon."""
        self._running = [asyncio.ensure_future(self._keep(chore)) for chore in self._chores(parts)]
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def cancel(self) -> None:
        """Nothing of the background work runs from now on."""
        for chore in self._running:
            chore.cancel()

    def _chores(self, parts: Parts) -> list[Callable[[], Awaitable[None]]]:
        """The background work; each coroutine returns when it has nothing more to do."""
        loop = asyncio.get_running_loop()
        workers = parts.workers

        async def work() -> None:
            while True:
                await asyncio.sleep(UPKEEP_SECONDS)
                await loop.run_in_executor(workers.upkeep, parts.upkeep.work)

        return [
            lambda: parts.audit.sync_every(FSYNC_INTERVAL_MS / 1000),
            lambda: parts.app.flush_refusals_every(HOUSEKEEPING_SECONDS),
            lambda: every(HOUSEKEEPING_SECONDS, parts.vault.expire),
            lambda: every(HOUSEKEEPING_SECONDS, parts.upkeep.tick),
            lambda: every(HOUSEKEEPING_SECONDS, parts.watch_disk),
            parts.watch_lag,
            parts.replica.watch,
            lambda: sweep_temps_again(
                parts.vault, self.process.lock.directory, self.run.log, reader=workers.reader, disk=workers.disk
            ),
            parts.indexing.run,
            parts.lifecycle.complete_destructions,
            work,
        ]

    async def _keep(self, chore: Callable[[], Awaitable[None]]) -> None:
        """Runs a chore to its end. A failure is a defect: it is reported, and the chore begins again."""
        while True:
            try:
                await chore()
                return
            except Exception as error:  # noqa: BLE001  after any defect keys must still expire and lines be synced
                self.run.internal_error(f"{type(error).__name__} in a chore")
                await asyncio.sleep(CHORE_RETRY_SECONDS)

    def _on_parent(self) -> None:
        descriptor = self._flags.parent_fd
        if descriptor is None:
            return
        try:
            ended = os.read(descriptor, 4096) == b""
        except BlockingIOError:
            return
        if ended:
            asyncio.get_running_loop().remove_reader(descriptor)
            self.run.stop("the parent has ended")


async def sweep_temps_again(vault: Vault, data_dir: str, log: Log, *, reader: Executor, disk: Executor) -> None:
    """Removes the temporary files that a kill or a failed removal left, where there may be many files: now and every
    SWEEP_SECONDS, until it is cancelled. A large directory is read once, unless something in it can't be removed.
    """
    loop = asyncio.get_running_loop()
    owners = (vault.store, vault.rotation_backups, ArchiveRegister(data_dir))
    sweeps: list[tuple[Executor, Callable[[], object]]] = [(reader, owner.sweep_temps) for owner in owners]
    # In the thread that made the files: it syncs descriptors that are in use there, and an error is reported once.
    sweeps.append((disk, remove_left_temps))
    while True:
        for executor, sweep in sweeps:
            try:
                await loop.run_in_executor(executor, sweep)
            except KmsRefusedError as error:
                log.warning("temporary files stay", why=str(error))
        await asyncio.sleep(SWEEP_SECONDS)


def _policy(settings: Settings) -> ChosenPolicy:
    """Reads the policy file, if there is one. Raises StartError."""
    if not settings.flags.policy:
        policy = Policy(settings.allowed_uids or (), settings.admin_uids)
        return ChosenPolicy(lambda **_: PolicyInForce(policy), [])
    if settings.admin_uids:
        raise StartError(
            "--policy and --admin-uids can't be given together: grant the roles rotate, destroy, audit and unseal in "
            "the policy file"
        )
    from minikms_daemon.server.policy_file import FileInForce, PolicyFile  # in a daemon only if it has one

    file = PolicyFile(Path(settings.flags.policy))
    file.check_apart(written=_write_paths(settings, activated=False), of_root_key=settings.root.read_paths)
    return ChosenPolicy(partial(FileInForce, file.policy(settings.allowed_uids), file=file), [file.directory])


def _harden(
    settings: Settings, policy: ChosenPolicy, arena: SecretArena, listener: UnixListener
) -> tuple[Measure, ...]:
    pin = settings.opening.pin
    read = [*library_paths(), *settings.root.read_paths]
    read += [*([] if pin is None else [str(pin.path)]), *policy.read_paths]
    write = _write_paths(settings, activated=listener.activated)
    return harden(arena, read=read, write=write, require=settings.flags.require_hardening)


def _write_paths(settings: Settings, *, activated: bool) -> list[str]:
    """The paths that the hardened process may write. `activated`: the service manager has made the socket."""
    log_dir = settings.opening.audit_dir
    paths = [settings.flags.data_dir, *([] if log_dir is None else [log_dir]), *settings.root.write_paths]
    if not activated:
        paths.append(os.path.dirname(os.path.abspath(settings.flags.socket)))
    return paths


def _system_text(error: OSError) -> str:
    advice = f". {DATA_USER_ADVICE}." if isinstance(error, PermissionError) else ""
    return (f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)) + advice
