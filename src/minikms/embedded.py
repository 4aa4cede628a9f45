"""The key service inside another process: for the development and the tests of a program that uses one.

Owns: a data directory opened without a daemon, and a client with the methods of `AsyncClient` on it. Invariants: the
files, the audit log, the use leases and the epoch are the daemon's own, under the same lock, so that a directory may
pass from one to the other; every audit line is written before its answer is given. It lacks the protection of a
separate process: no hardening, no peer credentials, and the arena is in the memory of the host process. It does not
batch, rotate or prune. It must never be used where the data is real.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from minikms import api, datadir
from minikms.api import Verb
from minikms.audit import AuditLog, Event
from minikms.audit.recovery import ExpectedLog
from minikms.client.asynchronous import AsyncVerbs
from minikms.client.calls import Call, make_call
from minikms.client.errors import refusal
from minikms.client.items import Sent
from minikms.client.wire import Answer
from minikms.crypto.aead import NonceSource
from minikms.custody import deks, files, rotation_backups
from minikms.custody.files import DataDirLock, make_private_directory
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.lease_store import LeaseStore
from minikms.custody.leases import Leases
from minikms.custody.vault import Indexing, Vault
from minikms.datadir import highest_epoch, keys_of, since
from minikms.errors import AuditUnavailableError, MiniKmsError, NotFoundError, StartError
from minikms.http import Response
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from minikms.policy import Policy, Principal
from minikms.service.base import VerbTable
from minikms.service.keys import KeyVerbs
from minikms.service.lifecycle import LifecycleVerbs
from minikms.service.records import RecordVerbs

R = TypeVar("R", bound=api.Request)
A = TypeVar("A")

CACHE_KEYS_MAX: Final = 256
ARENA_SLOTS: Final = 512


class EmbeddedError(Exception):
    """The data directory can't be opened; the text says why and what to do."""


class _DirectAudit:
    """Writes each line at once: there are no turns of a daemon to gather them in."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log

    def add(self, event: Event) -> None:
        self._log.add(event)
        self._log.commit()

    def require_writable(self) -> None:
        if not self._log.writable:
            raise AuditUnavailableError("the audit log can't be written, so no key is changed")

    async def add_written(self, event: Event, *, durable: bool) -> None:
        self._log.add(event)
        self._log.commit()
        if durable:
            await asyncio.to_thread(self._log.fdatasync)


class EmbeddedClient(AsyncVerbs):
    """The methods of AsyncClient without a socket. Belongs to one event loop.

    Refusals are those of `minikms.client.errors`; no call fails because a daemon is away.
    """

    def __init__(self, vault: Vault, table: VerbTable, who: Principal) -> None:
        self._vault = vault
        self._table = table
        self._who = who
        self._open = AsyncExitStack()

    @classmethod
    async def open(
        cls, data_dir: str | os.PathLike[str], *, master_key_file: str | os.PathLike[str] | None = None
    ) -> EmbeddedClient:
        """Opens or makes the data directory; without a key file, with a development key beside it.

        Raises EmbeddedError.
        """
        async with AsyncExitStack() as cleaning:
            try:
                client = await _compose(cls, *_place(data_dir, master_key_file), cleaning)
            except StartError as error:
                raise EmbeddedError(str(error)) from None
            client._open = cleaning.pop_all()
            return client

    async def close(self) -> None:
        """Zeroes the keys and closes the directory. May be repeated."""
        await self._open.aclose()

    async def _call(
        self,
        verb: Verb[R, A],
        request: R | Sent | bytearray,
        request_id: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> A:
        call = make_call(verb, request, request_id)
        try:
            body = await self._perform(call, request)
        except MiniKmsError as error:
            raise refusal(error.code, str(error), error.status) from None
        finally:
            self._vault.end_turn()
            call.wipe()
        return call.read(Answer(200, body, reusable=True))

    async def _perform(self, call: Call[Any], request: object) -> bytes:
        verb = call.verb
        if verb is api.HEALTH:
            return b"ok"
        if verb not in self._table:
            raise NotFoundError(f"the embedded key service has no {verb.name}; use the daemon")
        if not isinstance(request, verb.request):  # it holds bytes: decoded from JSON, as in the daemon
            request = msgspec.json.decode(call.body or b"", type=verb.request)
        answer = self._table[verb](self._who, request, call.request_id or "")
        reply = await answer if inspect.isawaitable(answer) else answer
        return reply.body if isinstance(reply, Response) else reply


async def _compose(
    kind: type[EmbeddedClient], directory: str, key: datadir.RootSource, cleaning: AsyncExitStack
) -> EmbeddedClient:
    """The daemon's order of a start: lock, arena, keyring, audit log, epoch, then the rest."""
    sync = cleaning.enter_context(ExitStack())
    lock = sync.enter_context(DataDirLock(directory))
    for name in (deks.DIRECTORY, rotation_backups.DIRECTORY):
        make_private_directory(os.path.join(directory, name))
    arena = sync.enter_context(SecretArena(ARENA_SLOTS))
    executor = sync.enter_context(ThreadPoolExecutor(1, thread_name_prefix="minikms"))
    nonces = NonceSource()
    keyring_file = KeyringFile(lock.directory_fd, executor)
    opened = datadir.open_keyring(data_dir=directory, file=keyring_file, source=key, arena=arena, nonces=nonces)
    unlocked = opened.unlocked
    sync.callback(unlocked.release)  # after the log is closed, which signs its last line
    datadir.check_newest(unlocked, highest_epoch(directory))
    log = _open_log(directory, unlocked)
    sync.callback(log.close)
    lease_store = LeaseStore.open(lock.directory_fd, create=unlocked.body.epoch == 1)
    sync.callback(lease_store.close)
    datadir.raise_epoch(unlocked, keyring_file)
    store = deks.DekStore(directory, executor)
    sync.callback(store.close)
    leases = Leases(lease_store, executor)
    backups = rotation_backups.RotationBackups(directory)
    sync.callback(backups.close)
    vault = Vault(
        arena=arena,
        unlocked=unlocked,
        keyring_file=keyring_file,
        store=store,
        rotation_backups=backups,
        leases=leases,
        executor=executor,
        nonces=nonces,
        cache_keys_max=CACHE_KEYS_MAX,
    )
    sync.callback(vault.cache.clear)
    cleaning.push_async_callback(leases.drain)
    cleaning.push_async_callback(store.drain)
    audit = _DirectAudit(log)
    indexing = Indexing(vault, executor)
    table = VerbTable(audit)
    RecordVerbs(vault, table)
    KeyVerbs(vault, table)
    LifecycleVerbs(vault=vault, table=table, indexing=indexing, reader=executor)
    table.now(api.STATUS, lambda request, event: _status(unlocked, log))
    facts: dict[str, str | int] = {"epoch": unlocked.body.epoch}
    await audit.add_written(
        Event(type="start", actor="minikms", pid=os.getpid(), detail="embedded", facts=facts), durable=True
    )
    return kind(vault, table, _ourselves())


def _place(
    data_dir: str | os.PathLike[str], master_key_file: str | os.PathLike[str] | None
) -> tuple[str, datadir.RootSource]:
    directory = os.path.abspath(os.fspath(data_dir))
    if master_key_file is not None:
        return directory, datadir.RootSource(file=Path(master_key_file))
    return directory, datadir.RootSource(dev_file=Path(directory + ".master-key"))


def _open_log(directory: str, unlocked: UnlockedKeyring) -> AuditLog:
    audit_key = unlocked.body.audit_key
    mac_key, seed = unlocked.audit_key(audit_key.version)
    return AuditLog.open(
        directory,
        audit_key=mac_key,
        seed=seed,
        now_ns=files.now_ns,
        fsync="never",
        key_version=audit_key.version,
        former=keys_of(unlocked).former,
        since=since(audit_key),
        expected=ExpectedLog(exists=unlocked.body.epoch > 1),
    )


def _status(unlocked: UnlockedKeyring, log: AuditLog) -> dict[str, object]:
    """What the daemon's status says too, as far as a message server reads it."""
    body = unlocked.body
    return {
        "status": "ok",
        "pid": os.getpid(),
        "epoch": body.epoch,
        "keyring_id": body.keyring_id,
        "audit": log.status(),
        "warnings": ["embedded: the keys are in the memory of the program that uses them; for development only"],
    }


def _ourselves() -> Principal:
    principal = Policy({os.geteuid()}).principal(os.geteuid(), os.getpid())
    if principal is None:
        raise StartError("this process's own user may not use the key service")
    return principal
