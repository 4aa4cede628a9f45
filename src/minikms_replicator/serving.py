"""The loop of the member that serves: its changes go into the database, and each commit there renews its lease.

Owns: one lease from its first grant to its end. Invariants: nothing is renewed while the daemon does not answer; a
commit whose outcome is unknown is made again with the same content, and only after a later confirmed commit has read
that the head does not have it; the head is released only when the daemon says so, or when a lease has passed since
the last time that the daemon was given.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from msgspec import UNSET, UnsetType

from minikms.api.errors import KmsError
from minikms.api.replica_verbs import (
    LEASED_MODES,
    MemberReport,
    ReplicaCommit,
    ReplicaNextAnswer,
    ReplicaNextRequest,
    ReplicaPosition,
)
from minikms.platform.clock import boot_ns
from minikms.processes.postgresql import FAILURES
from minikms_replicator.following import ASK_S_MAX, ReplicaClient, position_of
from minikms_replicator.tables import LEASE_NS, RenewedLease, Tables, TablesError

PAUSE_S: Final = 0.1
"""Between two attempts."""


class Server:
    """`failed` gets what has failed: the database, or the key service."""

    def __init__(self, tables: Tables, daemon: ReplicaClient, failed: Callable[[str, BaseException], None]) -> None:
        self._tables = tables
        self._daemon = daemon
        self._failed = failed

    async def serve(self, member: str, lease: RenewedLease) -> None:
        """Until the member serves no more. Raises TablesError, or one of FAILURES."""
        seals = lease.seals
        held: RenewedLease | None = lease
        report: MemberReport | None = None
        while held is not None:
            granted_ns = held.asked_ns  # also if there is no answer: a daemon that stood still takes the grant later
            answer = await self._next(held, report)
            if answer is None:
                if boot_ns() > granted_ns + LEASE_NS:
                    await self._tables.release(held, member, seals)
                    return
                await asyncio.sleep(PAUSE_S)
                position = await self._position()
                if position is None:
                    continue
                commit = None
            else:
                position, commit = answer.position, answer.commit
            seals, report = max(seals, position.seals), position.report
            if answer is not None and answer.release:
                await self._tables.release(held, member, seals)
                return
            if position.mode not in LEASED_MODES:
                return
            held = await self._commit(member, held, commit, seals, granted_ns + LEASE_NS)

    async def _next(self, lease: RenewedLease, report: MemberReport | None) -> ReplicaNextAnswer | None:
        """None if the daemon did not answer, or refused."""
        members: list[MemberReport] | UnsetType = UNSET
        try:
            if report is not None:
                members = await self._tables.exchange(report)
        except (TablesError, *FAILURES) as error:
            self._failed("database", error)
        request = ReplicaNextRequest(
            term=lease.term, number=lease.number, seals=lease.seals, asked_ns=lease.asked_ns,
            wanted=lease.wanted or UNSET, members=members,
        )  # fmt: skip
        try:
            async with asyncio.timeout(ASK_S_MAX):
                return await self._daemon.replica_next(request)
        except (KmsError, TimeoutError) as error:
            self._failed("key service", error)
            return None

    async def _position(self) -> ReplicaPosition | None:
        try:
            return await position_of(self._daemon)
        except (KmsError, TimeoutError):
            return None

    async def _commit(
        self, member: str, lease: RenewedLease, commit: ReplicaCommit | None, seals: int, until_ns: int
    ) -> RenewedLease | None:
        """Make the commit, or renew alone; None if the head is another member's, or the time is over."""
        numbers = (lease.number,) if commit is None else (commit.previous, commit.number)
        is_known = commit is not None
        while boot_ns() < until_ns:
            try:
                if commit is not None and is_known:
                    change = await self._tables.change(lease.term, member, commit, seals)
                    if change is not None:
                        return change
                renewal = await self._tables.renew(lease.term, member, numbers, seals)
                if renewal is None or commit is None or renewal.number == commit.number:
                    return renewal
                is_known = True
            except (TablesError, *FAILURES) as error:
                self._failed("database", error)
                is_known = False
                await asyncio.sleep(PAUSE_S)
        return None
