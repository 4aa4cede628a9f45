"""The tables of a replicated key service, in memory, and a replicator between them and a `MemberDirectory`.

Owns: what `minikms-replicator` does with PostgreSQL, without both: the condition of each transaction, snapshots, parts.
A test can let it lose answers, refuse commits, and lie. It asserts nothing.
"""

from __future__ import annotations

import asyncio
import base64
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from minikms import api
from minikms.api.base64 import encode_text
from minikms.api.errors import ConflictError
from minikms.custody.member import MemberDirectory
from minikms.custody.replica_file import Mark
from minikms.keys.tombstones import RECORD_BYTES


class Lost(Exception):
    """The connection was lost during a commit: the tables may have it."""


@dataclass
class Tables:
    """`files`: content and the number of the change that wrote it."""

    keyring_id: str = ""
    term: int = 0
    member: str = ""
    number: int = 0
    seals: int = 0
    wanted: str = ""
    keyring: bytes = b""
    state: bytes = b""
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    tombstones: bytes = b""

    def copy(self) -> Tables:
        return copy.deepcopy(self)

    def head(self, after: int) -> api.ReplicaHead:
        """As the replicator reads it for a member that has change `after`."""
        head = api.ReplicaHead(
            keyring_id=self.keyring_id,
            term=self.term,
            member=self.member,
            number=self.number,
            seals=self.seals,
            wanted=self.wanted,
            state=encode_text(self.state),
        )
        if self.number != after:
            head.keyring = encode_text(self.keyring)
        return head

    def parts(
        self, after: int, tombstones_after: int, *, files_max: int = api.REPLICA_FILES_MAX
    ) -> list[api.ReplicaFollowRequest]:
        """What a member with change `after` and as many tombstones lacks. Empty tables give no head."""
        if not self.keyring:
            return [msgspec.structs.replace(api.ASK_POSITION, after=after)]
        rows = sorted(key_id for key_id, (_, number) in self.files.items() if number > after)
        pages = [rows[start : start + files_max] for start in range(0, len(rows), files_max)] or [[]]
        records = self.tombstones[tombstones_after * RECORD_BYTES :]
        requests = [
            api.ReplicaFollowRequest(
                head=self.head(after),
                after=after,
                files=[api.ReplicaFile(key_id, encode_text(self.files[key_id][0])) for key_id in page],
                tombstones_after=tombstones_after,
                tombstones=encode_text(records) if number == 0 else "",
                complete=number == len(pages) - 1,
            )
            for number, page in enumerate(pages)
        ]
        for request in requests[1:]:
            request.tombstones_after += len(records) // RECORD_BYTES
        return requests


@dataclass
class ReplicaDatabase:
    """`lose`: how many of the next commits lose their answer: true for one that the tables have all the same.
    `refuse`: commits are refused.
    """

    tables: Tables = field(default_factory=Tables)
    lose: list[bool] = field(default_factory=list)
    refuse: bool = False

    def take_over(self, position: Mark, keyring_id: str, term: int) -> bool:
        """Whether the condition was met. Empty tables get the number of the member, which fills them."""
        tables = self.tables
        if self.refuse or tables.term != term or (tables.keyring and tables.number != position.number):
            return False
        tables.term, tables.member, tables.keyring_id = max(term, position.term) + 1, position.member_id, keyring_id
        if not tables.keyring:
            tables.number, tables.files = position.number, {}
        return True

    def commit(self, term: int, member_id: str, commit: api.ReplicaCommit) -> bool:
        """One transaction; false: its condition was not met. Raises Lost."""
        tables = self.tables
        had = (tables.term, tables.member, tables.number) == (term, member_id, commit.previous)
        lost = self.lose.pop(0) if self.lose else None
        if had and not self.refuse and lost is not False:
            if commit.tombstones and len(tables.tombstones) != commit.tombstones_after * RECORD_BYTES:
                return False
            for file in commit.files:
                tables.files[file.key_id] = (base64.b64decode(file.content), commit.number)
            for key_id in commit.destroyed:
                tables.files.pop(key_id, None)
            tables.tombstones += commit.tombstones
            tables.keyring = commit.keyring or tables.keyring
            tables.state, tables.number = commit.state, commit.number
        if lost is not None:
            raise Lost
        return had and not self.refuse


class Replicator:
    """Carries changes for one member, step by step. `term`: in which it serves."""

    def __init__(self, database: ReplicaDatabase, member: MemberDirectory, keyring_id: str) -> None:
        self.database = database
        self.member = member
        self._keyring_id = keyring_id
        self.term = 0

    async def follow(self, tombstones: int, *, files_max: int = api.REPLICA_FILES_MAX) -> None:
        """Gives the member all that it lacks, again if it asks for everything. `tombstones`: those that it has. Raises
        the errors of the member.
        """
        for _ in range(2):
            after = self.member.mark.number
            for request in self.database.tables.parts(after, tombstones, files_max=files_max):
                await self.member.follow(request)
            if self.member.mark.number >= after:
                return

    def take_over(self) -> None:
        """Raises ConflictError."""
        tables = self.database.tables
        if not self.database.take_over(self.member.mark, self._keyring_id, tables.term):
            raise ConflictError("the head is another one")
        self.term = tables.term
        self.member.serve(self.term, tables.number)

    async def step(self, seconds: float = 0.01) -> bool:
        """One answer of `replica_next`, its commit, and the confirmation. False: there was none, or it was refused."""
        commit = await self.member.next_commit(seconds)
        if commit is None:
            return False
        try:
            done = self.database.commit(self.term, self.member.mark.member_id, commit)
        except Lost:
            done = self.database.tables.number == commit.number  # it asks the head
        if done:
            self.member.confirm(commit.number)
        return done

    async def run(self) -> None:
        """Steps until it is cancelled or the member serves no more."""
        while self.member.serves:
            await self.step(1.0)
            await asyncio.sleep(0)


def each_order(requests: list[api.ReplicaFollowRequest]) -> Iterator[list[api.ReplicaFollowRequest]]:
    """As they are, each twice, the first again at the end."""
    yield requests
    yield [request for request in requests for _ in range(2)]
    yield [*requests, requests[0]]
