"""Two members in turns, over a database that loses answers, and a replicator that lies: no member ever has less than it
had, none revives a key, and whoever serves has everything that was answered.
"""

import asyncio
import contextlib
import random
import tempfile
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms import api
from minikms.api.base64 import encode_text
from minikms.api.errors import KmsRefusedError, StandbyError
from minikms.custody import replica_file
from minikms.keys import dek
from minikms.platform.files import closed_after, open_directory
from tests.harness.disk_faults import quick_directory
from tests.harness.members import OpenedMember, join, make_first, opened_member
from tests.harness.replica_database import ReplicaDatabase, Tables
from tests.harness.vaults import create

STEPS = 14


class Seen:
    """The most that one member has had: versions of key files, destroyed keys, epoch and number of its mark."""

    def __init__(self) -> None:
        self.versions: dict[str, int] = {}
        self.destroyed: set[str] = set()
        self.epoch = self.number = 0

    def check(self, member: OpenedMember, known: Iterable[str]) -> None:
        directory, destroyed = member.one.directory, member.vault.destroyed
        assert all(key_id in destroyed for key_id in self.destroyed)
        found = {
            path.stem: dek.parse(path.read_bytes(), path.stem).version
            for path in (directory / "kms-deks").iterdir()
            if path.stem not in destroyed
        }
        for key_id, version in self.versions.items():
            assert key_id in destroyed or found[key_id] >= version
        for key_id in self.destroyed:
            with pytest.raises(KmsRefusedError):
                member.vault.opened(key_id)
        with closed_after(open_directory(str(directory))) as directory_fd:
            stored = replica_file.read(directory_fd)
        assert stored is not None
        epoch = member.vault.keyring.body.epoch
        assert (epoch >= self.epoch, stored.mark.number >= self.number) == (True, True)
        self.versions = found
        self.destroyed |= {key_id for key_id in known if key_id in destroyed}
        self.epoch, self.number = epoch, stored.mark.number


class World:
    """`answered`: each key with the state that a caller was told."""

    def __init__(self, rng: random.Random, place: Path) -> None:
        self.rng = rng
        self.place = place
        self.database = ReplicaDatabase()
        self.history: list[Tables] = []
        self.members: list[OpenedMember] = []
        self.stacks: list[AsyncExitStack] = []
        self.seen = [Seen(), Seen()]
        self.serving: int | None = None
        self.answered: dict[str, str] = {}

    async def open(self, at: int) -> None:
        stack = AsyncExitStack()
        member = await stack.enter_async_context(opened_member(self.place / "ab"[at], self.database))
        self.members[at : at + 1], self.stacks[at : at + 1] = [member], [stack]

    async def restart(self) -> None:
        at = self.rng.randrange(2)
        if self.serving == at:
            self.serving = None
        await self.stacks[at].aclose()
        await self.open(at)

    async def take_over(self) -> None:
        at = self.rng.randrange(2)
        if self.serving is not None:
            await self.stop()
        await self.members[at].serve()
        self.serving = at
        member = self.members[at]
        for key_id, state in self.answered.items():
            if state == "destroyed":
                assert key_id in member.vault.destroyed
            elif key_id not in member.vault.destroyed:
                assert (state, member.vault.record(key_id).state) != ("retired", "active")

    async def stop(self) -> None:
        assert self.serving is not None
        await self.members[self.serving].stop()
        self.serving = None

    async def change(self) -> None:
        if self.serving is None:
            return
        member = self.members[self.serving]
        if self.rng.random() < 0.2:
            self.database.lose = [self.rng.random() < 0.5]
            if self.rng.random() < 0.5:
                member.directory.confirm = lambda number: member.directory.stop_serving()  # type: ignore[method-assign]  # the lease ends
        key_ids = [key_id for key_id, state in self.answered.items() if state != "destroyed"]
        kind = self.rng.choice(["create", "create", "retire", "destroy", "rotate"])
        try:
            if kind == "create" or not key_ids:
                made = await create(member.vault, "t")
                self.answered[made.id] = "active"
            elif kind == "rotate":
                await rotated(member)
            else:
                key_id = self.rng.choice(key_ids)
                await member.vault.retire(key_id, again=True)
                self.answered[key_id] = "retired"
                if kind == "destroy":
                    await member.vault.destroy(key_id)
                    self.answered[key_id] = "destroyed"
        except StandbyError:
            assert not member.directory.serves
        if not member.directory.serves:
            await self.stop()
        member.directory.__dict__.pop("confirm", None)
        self.history.append(self.database.tables.copy())

    async def follow(self) -> None:
        at = self.rng.randrange(2)
        if at != self.serving:
            member = self.members[at]
            if not member.directory.scanned:
                await member.directory.scan()
            await member.follow(files_max=self.rng.choice([1, 3, 4096]))
            assert member.directory.mark.number == self.database.tables.number

    async def lie(self) -> None:
        """Parts that mix what the database had at different times."""
        at = self.rng.randrange(2)
        if at == self.serving or not self.history:
            return
        member, tables = self.members[at], Tables()
        for field in msgspec.structs.asdict(api.ReplicaHead("", 0, "", 0, 0, "", "")):
            if hasattr(tables, field):
                setattr(tables, field, getattr(self.at_some_time(), field))
        for field in ("files", "tombstones", "keyring"):
            setattr(tables, field, getattr(self.at_some_time(), field))
        after = self.rng.choice([0, member.directory.mark.number])
        parts = tables.parts(after, self.rng.choice([0, member.vault.destroyed.count]), files_max=2)
        self.rng.shuffle(parts)
        for request in parts:
            if self.rng.random() < 0.2:
                request.files = request.files[1:]
            if self.rng.random() < 0.2:
                request.complete = not request.complete
            if isinstance(request.head, api.ReplicaHead) and self.rng.random() < 0.3:
                request.head.state = encode_text(self.at_some_time().state)
            with contextlib.suppress(KmsRefusedError):
                await member.directory.follow(request)

    def at_some_time(self) -> Tables:
        return self.rng.choice([*self.history, self.database.tables])

    async def run(self) -> None:
        await make_first(self.place / "a", keys=2)
        join(self.place / "b", self.place / "a")
        self.members, self.stacks = [], []
        try:
            for at in range(2):
                await self.open(at)
            await self.members[0].serve()
            self.serving = 0
            for _ in range(STEPS):
                step = self.rng.choice([self.change, self.change, self.follow, self.lie, self.take_over, self.restart])
                await step()
                for member, seen in zip(self.members, self.seen, strict=True):
                    seen.check(member, self.answered)
        finally:
            for stack in self.stacks:
                await stack.aclose()


async def rotated(member: OpenedMember) -> None:
    """A rotation, which stays begun if the member serves no more."""
    await member.one.begin()
    running = asyncio.ensure_future(member.one.rotation.run())
    while member.directory.serves and not running.done():
        await asyncio.sleep(0.001)
    running.cancel()
    await asyncio.wait([running])


@given(st.integers(0, 2**32))
@settings(max_examples=8)
def test_no_member_goes_back_and_none_revives_a_key(seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=quick_directory()) as place:
        asyncio.run(World(random.Random(seed), Path(place)).run())


@pytest.mark.torture
@given(st.integers(0, 2**32))
@settings(max_examples=400)
def test_no_member_goes_back_in_many_histories(seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=quick_directory()) as place:
        asyncio.run(World(random.Random(seed), Path(place)).run())
