"""The key service inside another process: for the development and the tests of a program that uses one.

Owns: a data directory opened without a daemon, and a client with the methods of `AsyncClient` on it. Invariants: the
files, the audit log, the use leases and the epoch are the daemon's own, under the same lock, so that a directory may
pass from one to the other; every audit line is written before its answer is given. It has none of what a process of
its own gives: no hardening, no peer credentials, no batching, and the host's memory holds the arena. It must never be
used where the data is real.
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from minikms import api, datadir
from minikms.audit import AuditLog, Event
from minikms.audit.recovery import ExpectedLog
from minikms.client import verbs
from minikms.client.errors import refusal
from minikms.client.verbs import (
    Call,
    DecryptItem,
    EncryptItem,
    Outcome,
    ReencryptItem,
    Verdict,
    checked_cost_bytes,
    chunks,
)
from minikms.crypto.aead import NonceSource
from minikms.custody import deks, files, rotation_backups
from minikms.custody.files import DataDirLock, make_private_directory
from minikms.custody.keyring_file import KeyringFile
from minikms.custody.lease_store import LeaseStore
from minikms.custody.leases import Leases
from minikms.custody.vault import Indexing, Vault
from minikms.datadir import highest_epoch, keys_of, since
from minikms.errors import AuditUnavailableError, MiniKmsError, StartError
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena
from minikms.policy import Policy, Principal
from minikms.service.keys import KeyIssuing
from minikms.service.lifecycle import KeyLifecycle
from minikms.service.records import KeyService

T = TypeVar("T")
R = TypeVar("R")

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


class EmbeddedClient:
    """The methods of AsyncClient that a message server needs, without a socket. Belongs to one event loop.

    Refusals are those of `minikms.client.errors`; that a daemon is away can't happen.
    """

    def __init__(
        self, vault: Vault, service: KeyService, issuing: KeyIssuing, lifecycle: KeyLifecycle, who: Principal
    ) -> None:
        self._vault = vault
        self._service = service
        self._issuing = issuing
        self._lifecycle = lifecycle
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
        """Zeroes the keys and gives the directory up. May be repeated."""
        await self._open.aclose()

    async def create_dek_for_thread(
        self,
        thread_id: str,
        *,
        replaces: str | None = None,
        purpose: api.Purpose | None = None,
        request_id: str | None = None,
    ) -> api.CreateDekAnswer:
        call = verbs.create_dek_for_thread(thread_id, replaces, purpose).named(request_id)
        return await self._perform(call, api.CreateDekRequest, self._issuing.create_dek_for_thread)

    async def encrypt(
        self,
        key_id: str,
        plaintext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> bytes:
        item = EncryptItem(key_id=key_id, plaintext=plaintext, aad=aad, thread_id=thread_id, request_id=request_id)
        checked_cost_bytes(item)
        return await self._perform(verbs.encrypt(item), api.EncryptItem, self._service.encrypt)

    async def decrypt(
        self,
        key_id: str,
        ciphertext: bytes,
        *,
        aad: bytes = b"",
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> bytes:
        item = DecryptItem(key_id=key_id, ciphertext=ciphertext, aad=aad, thread_id=thread_id, request_id=request_id)
        checked_cost_bytes(item)
        return await self._perform(verbs.decrypt(item), api.DecryptItem, self._service.decrypt)

    async def encrypt_batch(self, items: Sequence[EncryptItem]) -> list[Outcome]:
        calls = [verbs.encrypt_batch(chunk) for chunk in chunks(items)]
        return [
            outcome
            for call in calls
            for outcome in await self._perform(call, api.EncryptBatchRequest, self._service.encrypt_batch)
        ]

    async def decrypt_batch(self, items: Sequence[DecryptItem]) -> list[Outcome]:
        calls = [verbs.decrypt_batch(chunk) for chunk in chunks(items)]
        return [
            outcome
            for call in calls
            for outcome in await self._perform(call, api.DecryptBatchRequest, self._service.decrypt_batch)
        ]

    async def reencrypt_batch(
        self, from_key_id: str, to_key_id: str, items: Sequence[ReencryptItem], *, request_id: str | None = None
    ) -> list[Outcome]:
        calls = [verbs.reencrypt_batch(from_key_id, to_key_id, chunk).named(request_id) for chunk in chunks(items)]
        return [
            outcome
            for call in calls
            for outcome in await self._perform(call, api.ReencryptBatchRequest, self._service.reencrypt_batch)
        ]

    async def check_batch(
        self,
        key_id: str,
        items: Sequence[ReencryptItem],
        *,
        thread_id: str | None = None,
        request_id: str | None = None,
    ) -> list[Verdict]:
        calls = [verbs.check_batch(key_id, chunk, thread_id).named(request_id) for chunk in chunks(items)]
        return [
            verdict
            for call in calls
            for verdict in await self._perform(call, api.CheckBatchRequest, self._service.check_batch)
        ]

    async def retire_key(self, key_id: str, *, request_id: str | None = None) -> api.KeyAnswer:
        call = verbs.retire_key(key_id).named(request_id)
        return await self._perform(call, api.Request, lambda who, _, name: self._lifecycle.retire(who, key_id, name))

    async def list_keys(
        self,
        *,
        thread_id: str | None = None,
        state: api.State | None = None,
        cursor: str | None = None,
        limit: int | None = None,
    ) -> api.KeyListAnswer:
        call = verbs.list_keys(thread_id, state, cursor, limit)._replace(body=b"{}")

        def listed(who: Principal, _: api.Request, name: str) -> Awaitable[bytes]:
            return self._lifecycle.list_keys(
                who,
                thread_id=thread_id,
                state=state,
                cursor=cursor or "",
                limit=limit or api.LIST_KEYS_COUNT_MAX,
                request_id=name,
            )

        return await self._perform(call, api.Request, listed)

    async def destroy_key(self, key_id: str, *, request_id: str | None = None) -> api.DestroyKeyAnswer:
        call = verbs.destroy_key(key_id).named(request_id)
        return await self._perform(
            call,
            api.DestroyKeyRequest,
            lambda who, request, name: self._lifecycle.destroy(who, key_id, request, name),
        )

    async def status(self) -> dict[str, object]:
        call = verbs.status()._replace(body=b"{}")
        return await self._perform(call, api.Request, lambda who, _, name: self._issuing.status(who, name))

    async def _perform(
        self, call: Call[T], request_type: type[R], verb: Callable[[Principal, R, str], bytes | Awaitable[bytes]]
    ) -> T:
        try:
            answer = verb(self._who, msgspec.json.decode(call.body or b"", type=request_type), call.request_id or "")
            body = await answer if inspect.isawaitable(answer) else answer
        except MiniKmsError as error:
            raise refusal(error.code, str(error), error.status) from None
        finally:
            self._vault.end_turn()
        return call.decode(body)


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
    lifecycle = KeyLifecycle(vault=vault, audit=audit, indexing=indexing, reader=executor)
    facts: dict[str, str | int] = {"epoch": unlocked.body.epoch}
    await audit.add_written(
        Event(type="start", actor="minikms", pid=os.getpid(), detail="embedded", facts=facts), durable=True
    )
    issuing = KeyIssuing(vault, audit, lambda: _status(unlocked, log))
    return kind(vault, KeyService(vault, audit), issuing, lifecycle, _ourselves())


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
