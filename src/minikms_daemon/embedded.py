"""The key service inside another process: for the development and the tests of a program that uses one.

Owns: a data directory opened without a daemon, and a client with the methods of `AsyncClient` on it. Invariants: the
files, the audit log and the epoch are the daemon's own, under the same lock, so that a directory may
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
from typing import Any, Final, TypeVar, cast

import msgspec

from minikms import api
from minikms.api.errors import AuditUnavailableError, KmsClosedError, NotFoundError, StartError
from minikms.audit import AuditLog, Event
from minikms.client.calls import Call
from minikms.client.verbs import AsyncRunner, ClientOperation, Many, One, Verbs
from minikms.client.wire import Answer
from minikms.conditions import state
from minikms.custody import replica_file
from minikms.custody.vault import Indexing, Vault
from minikms.datadir import SERVICE_SLOTS, Options, lock_data_dir, open_for_service
from minikms.http import Response
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from minikms.policy.policy import Policy
from minikms.policy.principal import Principal
from minikms.roots.providers import DevelopmentKey, KeyFile, RootProvider
from minikms_daemon.service.base import VerbTable
from minikms_daemon.service.encoding import json_answer
from minikms_daemon.service.keys import KeyVerbs
from minikms_daemon.service.lifecycle import LifecycleVerbs
from minikms_daemon.service.records import RecordVerbs

T = TypeVar("T")

CACHE_KEYS_MAX: Final = 256


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
            await asyncio.to_thread(self._log.sync.fdatasync)


class EmbeddedClient(Verbs, AsyncRunner):
    """The methods of AsyncClient without a socket. Belongs to one event loop of one process: in a forked child each
    call is refused, since the arena may show zeros there in the place of keys.

    No call fails because a daemon is away.
    """

    def __init__(self, vault: Vault, table: VerbTable, who: Principal) -> None:
        self._vault = vault
        self._table = table
        self._who = who
        self._open = AsyncExitStack()
        self._pid = os.getpid()
        self._closed = False
        self._calls_count = 0
        self._no_calls = asyncio.Event()
        self._no_calls.set()

    @classmethod
    async def open(
        cls, data_dir: str | os.PathLike[str], *, master_key_file: str | os.PathLike[str] | None = None
    ) -> EmbeddedClient:
        """Opens or makes the data directory; without a key file, with a development key beside it.

        Raises EmbeddedError.
        """
        async with AsyncExitStack() as cleaning:
            try:
                client = await _compose(cls, os.fspath(data_dir), _root(data_dir, master_key_file), cleaning)
            except StartError as error:
                raise EmbeddedError(str(error)) from None
            client._open = cleaning.pop_all()
            return client

    async def close(self) -> None:
        """Waits for the calls in progress, then zeroes the keys and closes the directory. May be repeated.

        From the first moment on, new calls raise KmsClosedError.
        """
        self._closed = True
        await self._no_calls.wait()
        await self._open.aclose()

    async def _run(self, operation: ClientOperation[T]) -> T:
        if isinstance(operation, Many):
            return cast("T", [outcome for one in operation.split() for outcome in await self._run_one(one)])
        return await self._run_one(cast("One[T]", operation))

    async def _run_one(self, one: One[T]) -> T:
        call = one.call(msgpack=False)
        if self._closed:
            call.wipe()
            raise KmsClosedError("the client is closed")
        if os.getpid() != self._pid:
            call.wipe()
            raise KmsClosedError("a forked child can't use the embedded key service of its parent")
        self._calls_count += 1
        self._no_calls.clear()
        try:
            body = await self._perform(call, one.request)
        finally:
            self._vault.record_keys.end_turn()
            call.wipe()
            self._calls_count -= 1
            if self._calls_count == 0:
                self._no_calls.set()
        return one.value(call.read(Answer(200, body, reusable=True)))

    async def _perform(self, call: Call[Any], request: object) -> bytes:
        verb = call.verb
        if verb is api.HEALTH:
            return b"ok"
        if verb is api.READY:
            self._table.audit.require_writable()
            return b"ready"
        if verb not in self._table:
            raise NotFoundError(f"the embedded key service has no {verb.name}; use the daemon")
        if not isinstance(request, verb.request):  # it holds bytes: decoded from JSON, as in the daemon
            request = msgspec.json.decode(call.body or b"", type=verb.request)
        answer = self._table[verb](self._who, request, call.request_id or "")
        reply = await answer if inspect.isawaitable(answer) else answer
        return reply.body if isinstance(reply, Response) else reply


async def _compose(
    kind: type[EmbeddedClient], directory: str, root: RootProvider, cleaning: AsyncExitStack
) -> EmbeddedClient:
    sync = cleaning.enter_context(ExitStack())
    lock = sync.enter_context(lock_data_dir(directory))
    if replica_file.member_id(lock.directory):
        raise StartError(f"{directory} is that of a host of several, of which one serves: use its daemon")
    arena = sync.enter_context(SecretArena(CACHE_KEYS_MAX + SERVICE_SLOTS))
    executor = sync.enter_context(ThreadPoolExecutor(1, thread_name_prefix="minikms"))
    options = Options(audit_fsync="never", cache_keys_max=CACHE_KEYS_MAX)
    data = open_for_service(lock, root, arena=arena, disk=executor, options=options)
    sync.callback(data.close)
    cleaning.push_async_callback(data.vault.drain)
    if data.member is not None:
        raise StartError(f"{directory} is that of one of several hosts: only a daemon with a lease uses its keys")
    vault, log = data.vault, data.log
    audit = _DirectAudit(log)
    table = VerbTable(audit)
    RecordVerbs(vault, table)
    indexing = Indexing(vault, executor)
    KeyVerbs(vault, table, indexing)
    lifecycle = LifecycleVerbs(vault=vault, table=table, indexing=indexing, reader=executor)
    table.now(api.STATUS, lambda request, event: json_answer(_status(vault.unlocked, log, indexing)))
    facts: dict[str, str | int] = {"epoch": vault.keyring.body.epoch}
    await audit.add_written(
        Event(type="start", actor="minikms", pid=os.getpid(), detail="embedded", facts=facts), durable=True
    )
    for chore in (indexing.run, lifecycle.complete_destructions):
        cleaning.push_async_callback(_stop, asyncio.create_task(chore()))
    return kind(vault, table, _own_principal())


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _root(data_dir: str | os.PathLike[str], master_key_file: str | os.PathLike[str] | None) -> RootProvider:
    return DevelopmentKey(os.fspath(data_dir)) if master_key_file is None else KeyFile(Path(master_key_file))


def _status(unlocked: UnlockedKeyring, log: AuditLog, indexing: Indexing) -> dict[str, object]:
    """The members of the daemon's status that a message server reads."""
    body, embedded = unlocked.body, state("keys_in_server")
    return {
        **log.service_status(),
        "pid": os.getpid(),
        "uid": os.geteuid(),
        "epoch": body.epoch,
        "keyring_id": body.keyring_id,
        "keys": indexing.status(),
        "audit": log.status(),
        "warnings": [embedded.text],
        "conditions": [embedded],
    }


def _own_principal() -> Principal:
    principal = Policy({os.geteuid()}).principal(os.geteuid(), os.getpid())
    if principal is None:
        raise StartError("this process's own user may not use the key service")
    return principal
