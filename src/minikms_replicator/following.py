"""The loop of a member that does not serve: it gives the daemon the changes of the others, and takes over.

Owns: one step of the loop. Invariants: a part comes from one snapshot, with its head and keyring, and is handed over
after the node has confirmed a later commit, so a member has nothing that a failover of the database loses. A file that
changes between two parts is in a later one too. It must never take over against `deciding.why_not`, or after the head
has changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, Protocol

import msgspec

from minikms.api.base64 import encode_text
from minikms.api.replica_verbs import (
    ASK_POSITION,
    LEASED_MODES,
    MemberReport,
    ReplicaFollowRequest,
    ReplicaHead,
    ReplicaNextAnswer,
    ReplicaNextRequest,
    ReplicaPosition,
)
from minikms.platform.clock import boot_ns
from minikms_replicator.deciding import Watch, is_settled, why_not
from minikms_replicator.tables import Head, RenewedLease, ReplicaPart, Tables

ASK_S_MAX: Final = 5.0
"""The time of one request to the daemon that brings no part of a change."""


class ReplicaClient(Protocol):
    """What the replicator needs of `minikms.client.AsyncClient`."""

    def replica_follow(self, request: ReplicaFollowRequest) -> Coroutine[Any, Any, ReplicaPosition]: ...

    def replica_next(self, request: ReplicaNextRequest) -> Coroutine[Any, Any, ReplicaNextAnswer]: ...


async def position_of(daemon: ReplicaClient) -> ReplicaPosition:
    async with asyncio.timeout(ASK_S_MAX):
        return await daemon.replica_follow(ASK_POSITION)


class Follower:
    """Each step raises KmsError, TablesError, or one of FAILURES."""

    def __init__(self, tables: Tables, daemon: ReplicaClient) -> None:
        self._tables = tables
        self._daemon = daemon
        self._watch = Watch()
        self._held_term = 0
        self.why = ""
        """Why the member does not take over."""

    async def step(self) -> tuple[str, RenewedLease] | None:
        """The member's id and lease, if it has taken over or its daemon serves already."""
        position = await position_of(self._daemon)
        me = position.member_id
        await self._tables.exchange(position.report)
        if position.mode in LEASED_MODES:
            return await self._resume(position)
        position, head = await self._follow(position, self._tables.reports.members)
        now_ns = boot_ns()
        unchanged_ns = self._watch.unchanged_ns(self._tables.node, head, now_ns)
        could_report = self._watch.could_report(position, self._tables.reports, self._tables.connected_ns, now_ns)
        if position.seals > head.seals:
            await self._tables.seal(position.seals)
        is_wanted = position.wants and position.ready and is_settled(self._tables.settled_ns)
        if is_wanted and me not in (head.member, head.wanted):  # else the head would be released before it is taken
            await self._tables.want(me)
        self.why = why_not(
            head, position, held_term=self._held_term, unchanged_ns=unchanged_ns, settled_ns=self._tables.settled_ns,
            could_report=could_report,
        )  # fmt: skip
        if self.why:
            return None
        return self._held(me, await self._tables.take_over(head, position))

    async def _resume(self, position: ReplicaPosition) -> tuple[str, RenewedLease] | None:
        """Renews the lease that the daemon has from an earlier run of this process. A term belongs to one member."""
        head = await self._tables.head()
        if head.member != position.member_id:
            self.why = f"{head.member} has the head, and the lease of this member ends"
            return None
        lease = await self._tables.renew(head.term, position.member_id, (head.number,), position.seals)
        return self._held(position.member_id, lease)

    def _held(self, member: str, lease: RenewedLease | None) -> tuple[str, RenewedLease] | None:
        if lease is None:
            return None
        self._held_term = lease.term
        return member, lease

    async def _follow(self, position: ReplicaPosition, members: list[MemberReport]) -> tuple[ReplicaPosition, Head]:
        """Give the daemon the head, and what it lacks."""
        parts = self._tables.parts(position.number, position.tombstones)
        while True:
            part: ReplicaPart | None = None
            async with self._tables.snapshot():
                head = await self._tables.head()
                answer = _shown(head._replace(keyring_id=head.keyring_id or position.keyring_id))
                if head.empty:
                    answer.keyring = ""
                elif position.mode != "sealed" and (head.number != position.number or position.begins):
                    answer.keyring = encode_text(await self._tables.keyring())
                    part = await anext(parts)
            if part is None:
                break
            await self._tables.confirm(position.report)
            request = ReplicaFollowRequest(
                head=answer, after=position.number, files=part.files, tombstones_after=part.tombstones_after,
                tombstones=encode_text(part.tombstones), complete=part.complete, members=members,
            )  # fmt: skip
            followed = await self._daemon.replica_follow(request)
            if part.complete:
                return followed, head
        request = msgspec.structs.replace(
            ASK_POSITION, head=answer, after=position.number, tombstones_after=position.tombstones,
            complete=position.mode != "sealed", members=members,
        )  # fmt: skip
        async with asyncio.timeout(ASK_S_MAX):
            return await self._daemon.replica_follow(request), head


def _shown(head: Head) -> ReplicaHead:
    return ReplicaHead(
        head.keyring_id, head.term, head.member, head.number, head.seals, head.wanted, encode_text(head.state)
    )
