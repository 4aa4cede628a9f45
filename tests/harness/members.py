"""Members of a replicated key service over real directories, in one process, with one `ReplicaDatabase`.

Owns: the first host's directory, the second one's, and their opening. Invariants: as `tests.harness.vaults`; both have
one root key. It asserts nothing.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from minikms.custody import replica_file
from minikms.custody.member import MemberDirectory
from minikms.custody.replica_file import Mark
from minikms.keys import keyring
from minikms.keys.keyring import Member
from minikms.memory.arena import fill_random
from minikms.platform.clock import now_rfc3339
from minikms.platform.files import closed_after, open_directory
from tests.harness.replica_database import ReplicaDatabase, Replicator
from tests.harness.vaults import OpenedVault, key_file, opened_vault


class OpenedMember:
    """A member and its replicator."""

    def __init__(self, one: OpenedVault, database: ReplicaDatabase) -> None:
        if one.data.member is None:
            raise ValueError("the directory is not that of a member")
        self.one = one
        self.vault = one.vault
        self.directory: MemberDirectory = one.data.member
        self.replicator = Replicator(database, self.directory, one.vault.unlocked.body.keyring_id)
        self._running: asyncio.Task[None] | None = None

    async def follow(self, *, files_max: int = 4096) -> None:
        await self.replicator.follow(self.vault.destroyed.count, files_max=files_max)

    async def serve(self) -> None:
        """Follows, takes over, fills an empty database, and carries changes from here on."""
        await self.follow()
        self.replicator.take_over()
        self._running = asyncio.create_task(self.replicator.run())
        if self.directory.fills:
            await self.directory.fill()
        await self.vault.keyring.change(lambda body: keyring.next_epoch(body, at=now_rfc3339()))

    async def stop(self) -> None:
        """Serves no more."""
        self.directory.stop_serving()
        await self.halt()

    async def halt(self) -> None:
        """Its replicator carries nothing more."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])
            self._running = None


async def make_first(directory: Path, *, keys: int = 0) -> list[str]:
    """The directory of the first host, with as many keys. Its keyring has a second host too."""
    async with opened_vault(directory) as one:
        key_ids = await one.make(keys)
        unlocked, at = one.vault.unlocked, now_rfc3339()
        second = Member("m2", "b", "s1", at, 1, unlocked.make_member_audit(fill_random, at=at))
        members = (Member("m1", "a", "s1", at, 1), second)
        await one.vault.keyring.change(lambda body: keyring.next_epoch(body, at=at, members=members))
    write_mark(directory, Mark(member_id="m1", name="a", begins=True))
    return key_ids


def join(directory: Path, first: Path) -> None:
    """A copy of the first host's directory becomes the second one's."""
    shutil.copytree(first, directory, ignore=shutil.ignore_patterns("minikms-audit*"))
    shutil.copy2(key_file(first), directory.with_name(directory.name + ".key"))
    write_mark(directory, Mark(member_id="m2", name="b"))


def write_mark(directory: Path, mark: Mark) -> None:
    with closed_after(open_directory(str(directory))) as directory_fd:
        replica_file.write(directory_fd, mark, None)


@asynccontextmanager
async def opened_member(
    directory: Path, database: ReplicaDatabase, *, later_keyring: bytes = b""
) -> AsyncIterator[OpenedMember]:
    """A start, with the sum over its files, and at the end a stop."""
    async with opened_vault(directory, later_keyring=later_keyring) as one:
        member = OpenedMember(one, database)
        await member.directory.scan()
        try:
            yield member
        finally:
            await member.stop()
