"""The removal of root keys: their slots go, with the keyring key and the audit key that they opened.

Owns: one change of the keyring that removes slots, seals everything under a fresh keyring key, and adds a fresh audit
key; the one by which another member of a replicated key service gets its fresh audit key, when it takes over; and the
change of the audit log's key that belongs to both. Invariants: no line of the log comes between the two changes,
because the keyring names the last line under the former key. The event loop goes on meanwhile: the log is held, and
answers wait for their lines. A change that has begun goes on when its caller is cancelled. A crash between the two is
completed by the next start. If it is not known which keyring is on disk, no line is written until the former one is
there again. It must never begin the KEK rotation that ends the revocation: that is `minikms_daemon.service.keks`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Container, Coroutine
from functools import partial
from typing import Final

from minikms.api.errors import SealedError, StandbyError, StorageUnavailableError, StorageUncertainError
from minikms.audit import AuditKey
from minikms.audit.record import LineRef
from minikms.custody.vault import Vault
from minikms.datadir import audit_keys
from minikms.keys import root_slots
from minikms.keys.keyring import AuditKeyEntry, Body, confirmed, next_epoch
from minikms.memory.arena import fill_random
from minikms.platform.clock import now_rfc3339
from minikms_daemon.audit.turns import TurnAudit

STORE_RETRY_SECONDS: Final = 1.0


class RootRemoval:
    """Removes slots of the keyring of `vault`, whose audit log is `audit`."""

    def __init__(self, vault: Vault, audit: TurnAudit) -> None:
        self._vault = vault
        self._audit = audit
        self._changing: set[asyncio.Task[None]] = set()
        self._repairing: asyncio.Task[None] | None = None

    async def stop(self) -> None:
        """Waits for the changes that have begun. Ends the repair after a failed one: the log refuses lines to the end,
        so a start can complete it.
        """
        if self._changing:
            await asyncio.wait(self._changing)
        if self._repairing is not None and not self._repairing.done():
            self._repairing.cancel()
            await asyncio.wait([self._repairing])

    async def remove(self, choose: Callable[[Body], Container[str]], *, proved: str = "", member_id: str = "") -> None:
        """Removes the slots that `choose` names in the newest body; nothing if it names none.

        `proved`: the slot that the others are removed for, see `root_slots.remove_slots`. `member_id`: the host that
        goes with its slot. Raises ConflictError, the errors of `choose`, StorageUnavailableError, SealedError, and
        AuditUnavailableError: the slots may be removed then, which the body says.
        """
        await self._finished(self._remove(choose, proved, member_id))

    async def take_over(self, slot_id: str, *, oldest: int) -> None:
        """The first change of a member that takes over: see `root_slots.taken_over`. It gets a fresh audit key if a
        root key was removed since its newest one was made. Raises as `remove`.
        """
        await self._finished(self._take_over(slot_id, oldest))

    async def _finished(self, changing: Coroutine[None, None, None]) -> None:
        change = asyncio.ensure_future(changing)
        self._changing.add(change)
        change.add_done_callback(self._ended)
        try:
            await asyncio.shield(change)
        finally:
            del change  # the traceback of its error leads to this frame

    def _ended(self, change: asyncio.Task[None]) -> None:
        self._changing.discard(change)
        if not change.cancelled():
            change.exception()  # for whoever still waits; if nobody does, it is no defect

    async def _remove(self, choose: Callable[[Body], Container[str]], proved: str, member_id: str) -> None:
        await self._audit.sync()  # so that the log is held for a short time
        unlocked = self._vault.unlocked
        async with self._vault.keyring.held() as replace:
            body = self._vault.keyring.body
            slots = choose(body)
            if not any(slot.slot_id in slots for slot in body.slots):
                return
            root_slots.check_removes(body, slots, unlocked.audit)

            def without(last: LineRef) -> Body:
                resealed = unlocked.make_resealed(fill_random, without=slots)
                key, at = self._audit_key_after(last, resealed.key_version), now_rfc3339()
                changed = root_slots.remove_slots(body, resealed, unlocked.member_id, key, at=at, proved=proved)
                return changed.without_member(member_id)

            await self._change_key(replace, without)

    async def _take_over(self, slot_id: str, oldest: int) -> None:
        await self._audit.sync()
        unlocked = self._vault.unlocked
        async with self._vault.keyring.held() as replace:
            body = self._vault.keyring.body
            member, in_use = body.member(unlocked.member_id), self._audit.key_version
            taken_over = partial(root_slots.taken_over, body, unlocked.member_id, slot_id, oldest=oldest, in_use=in_use)
            is_newest = in_use == unlocked.audit.current.version
            if member is None or (member.key_version == body.key_version and is_newest):
                await replace(taken_over(None, at=now_rfc3339()))
                return
            await self._change_key(
                replace, lambda last: taken_over(self._audit_key_after(last, body.key_version), at=now_rfc3339())
            )

    async def _change_key(self, replace: Callable[[Body], Awaitable[None]], make: Callable[[LineRef], Body]) -> None:
        """`make`: the next body, with its keys made, from the last line under the present audit key."""

        async def store(last: LineRef) -> AuditKey:
            self._vault.keyring.require_changes()
            await replace(make(last))
            return audit_keys(self._vault.unlocked).current

        try:
            await self._audit.change_key(store)
        except StorageUncertainError:
            self._repairing = asyncio.ensure_future(self._put_back())
            raise
        body, member_id = self._vault.unlocked.body, self._vault.unlocked.member_id
        if body.member(member_id) is not None:
            with contextlib.suppress(StorageUnavailableError):  # its next take-over does it
                await replace(next_epoch(confirmed(body, member_id), at=now_rfc3339()))

    def _audit_key_after(self, last: LineRef, key_version: int) -> AuditKeyEntry:
        unlocked = self._vault.unlocked
        return unlocked.make_audit_key(
            fill_random,
            version=unlocked.audit.current.version + 1,
            at=now_rfc3339(),
            since_seq=last.seq,
            since_sig=last.sig,
            key_version=key_version,
        )

    async def _put_back(self) -> None:
        """Writes the former keyring until the disk takes it. The log refuses lines meanwhile, and so does the daemon
        every request that needs one.
        """
        while True:
            try:
                await self._vault.keyring.store_again()
            except StorageUnavailableError:
                await asyncio.sleep(STORE_RETRY_SECONDS)
            except SealedError:
                return  # a start completes the change
            except StandbyError:
                break  # the key is not confirmed, so the log may go on without it
            else:
                break
        self._audit.release()
