"""A member of a key service as its daemon is one, with contents that nobody opens: all that a replicator sees of it.

Owns: the changes that wait, the lease, and what the member has. It refuses what a daemon refuses, and asserts nothing.
"""

import asyncio
from typing import Any

from msgspec import UNSET

from minikms.api import (
    LEASE_SECONDS,
    ReplicaCommit,
    ReplicaFile,
    ReplicaFollowRequest,
    ReplicaNextAnswer,
    ReplicaNextRequest,
    ReplicaPosition,
)
from minikms.api.base64 import decode_canonical, encode_text
from minikms.api.errors import ConflictError, KmsUnavailableError, ReplicaRolledBackError
from minikms.api.replica_verbs import MemberReport
from minikms.platform.clock import boot_ns

KEYRING_ID = "kr_0123456789abcdef"
LEASE_NS = LEASE_SECONDS * 10**9


def key_id(number: int) -> str:
    return f"k_{number:026d}"


def content(number: int) -> bytes:
    return b"%d" % number * 8


class Member:
    """`files` by key id; `tombstones`: all records. `served`: the times in which it had a lease, by CLOCK_BOOTTIME."""

    def __init__(self, member_id: str, *, begins: bool = False) -> None:
        self.member_id = member_id
        self.begins = begins
        self.number = self.term = self.seals = 0
        self.mode: Any = "following"
        self.files: dict[str, bytes] = {}
        self.tombstones: list[bytes] = []
        self.keyring = b""
        self.wants = self.fills = False
        self.ready = True
        self.away = False
        self.wanted = ""
        self.poll_s = 0.05
        self.members: list[MemberReport] = []
        self.hosts: list[str] = []
        self.waiting: list[ReplicaCommit] = []
        self.out: ReplicaCommit | None = None
        self.acknowledged: list[str] = []
        self.served: list[tuple[int, int, int]] = []
        self.until_ns = 0
        self.lease_term = 0
        self._answered_ns = 0

    # --- what a test does ---------------------------------------------------------------------------------------------

    def change(self, *numbers: int, destroyed: tuple[int, ...] = (), keyring: bytes = b"") -> None:
        """A change that waits to be committed."""
        previous = self.waiting[-1].number if self.waiting else self.out.number if self.out else self.number
        before = len(self.tombstones) + sum(len(one.tombstones) // 40 for one in self.waiting)
        before += len(self.out.tombstones) // 40 if self.out else 0
        self.waiting.append(
            ReplicaCommit(
                previous=previous, number=previous + 1, state=b"state %d" % (previous + 1), keyring=keyring,
                tombstones_after=before, tombstones=b"".join(b"%040d" % one for one in destroyed),
                files=[ReplicaFile(key_id(one), encode_text(content(one))) for one in numbers],
                destroyed=[key_id(one) for one in destroyed],
            )
        )  # fmt: skip

    @property
    def serves(self) -> bool:
        return self.mode == "serving" and boot_ns() < self.until_ns

    # --- what the replicator asks -------------------------------------------------------------------------------------

    def position(self) -> ReplicaPosition:
        if self.mode == "serving" and boot_ns() >= self.until_ns:
            self._end()
        report = MemberReport(self.member_id, "host", self.mode, self.number, self.term, "0", "", "", "", 0.0)
        return ReplicaPosition(
            KEYRING_ID, self.member_id, self.mode, self.number, self.term, len(self.tombstones), self.seals,
            self.ready and self.mode == "following", self.wants, self.begins, report, self.hosts,
        )  # fmt: skip

    async def replica_follow(self, request: ReplicaFollowRequest) -> ReplicaPosition:
        self._check_reached()
        self.members = request.members or self.members
        head = request.head
        self.fills = head is not UNSET and head.keyring == "" and self.begins
        if head is UNSET or self.mode != "following" or head.keyring == "":
            return self.position()
        if head.number < self.number:
            raise ReplicaRolledBackError("older")
        for file in request.files:
            self.files[file.key_id] = decode_canonical(file.content, 1024, "a file")
        records = decode_canonical(request.tombstones, 2**24, "records")
        if request.tombstones_after != len(self.tombstones):
            raise ConflictError("not after the own tombstones")
        self._add_records([records[at : at + 40] for at in range(0, len(records), 40)])
        if head.keyring:
            self.keyring = decode_canonical(head.keyring, 2**24, "keyring")
        if request.complete:
            self.number, self.term = head.number, head.term
        return self.position()

    async def replica_next(self, request: ReplicaNextRequest) -> ReplicaNextAnswer:
        self._check_reached()
        if not self._answered_ns <= request.asked_ns <= boot_ns() or boot_ns() >= request.asked_ns + LEASE_NS:
            raise ConflictError("no time of a lease")
        if self.mode == "sealed":
            return ReplicaNextAnswer(self.position(), release=True)
        if self.mode == "following":
            if request.number != self.number and not self.fills:
                raise ConflictError("not at the end")
            self.number = request.number
            self.mode, self.lease_term, self.out = "serving", request.term, None
        if self.mode != "serving" or request.term != self.lease_term:
            raise ConflictError("it does not serve in this term")
        if self.out is not None and request.number == self.out.number:
            self._apply(self.out)
            self.out = None
        self.served.append((boot_ns(), request.asked_ns + LEASE_NS, request.term))
        self.until_ns = max(self.until_ns, request.asked_ns + LEASE_NS)
        self.wanted = request.wanted or ""
        self.members = request.members or self.members
        if self.wanted not in ("", self.member_id):
            self._end()
            self._answered_ns = boot_ns()
            return ReplicaNextAnswer(self.position(), release=True)
        if self.out is None and not self.waiting:
            await asyncio.sleep(self.poll_s)
        if self.out is None and self.waiting:
            self.out = self.waiting.pop(0)
        self._answered_ns = boot_ns()
        return ReplicaNextAnswer(self.position(), commit=self.out, release=self.mode == "sealed")

    def _check_reached(self) -> None:
        if self.away:
            raise KmsUnavailableError("no daemon")

    def _apply(self, commit: ReplicaCommit) -> None:
        for file in commit.files:
            self.files[file.key_id] = decode_canonical(file.content, 1024, "a file")
            self.acknowledged.append(file.key_id)
        self._add_records([commit.tombstones[at : at + 40] for at in range(0, len(commit.tombstones), 40)])
        self.number, self.keyring, self.term = commit.number, commit.keyring or self.keyring, self.lease_term

    def _add_records(self, records: list[bytes]) -> None:
        self.tombstones += records
        for record in records:
            self.files.pop(key_id(int(record)), None)

    def _end(self) -> None:
        """The lease is over: what waits is refused."""
        self.mode, self.out, self.until_ns = "following", None, min(self.until_ns, boot_ns())
        self.waiting.clear()
        start, _, term = self.served[-1]
        self.served[-1] = (start, min(self.served[-1][1], boot_ns()), term)
