"""The members of threads: who they are, and changing that. `conversations.membership` has the rule.

Invariants: a change is one write, under the entries that it was decided from; no write makes more entries than a thread
may have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

from progressdb_server.conversations import membership
from progressdb_server.conversations.membership import Act, Rule
from progressdb_server.conversations.threads import CHANGE_TRIES_MAX, NamedLocks, Threads
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import Commits, Engine, pages
from progressdb_server.store.model import (
    ConditionFailedError,
    MemberIsAuthorError,
    NoRoomToRemoveError,
    NotWrittenError,
    ThreadNotFoundError,
    TooManyMembersError,
)

MEMBERS_CHANGING: Final = "other servers are changing the members of the thread at the same time"

Room: TypeAlias = tuple[Sequence[tuple[bytes, bytes]], Sequence[tuple[bytes, bytes | None]]]
"""Puts and conditions of a write that adds members."""


class Members:
    def __init__(self, engine: Engine, writer: Commits, threads: Threads, locks: NamedLocks, rule: Rule) -> None:
        """`rule`: who may post into a thread."""
        self._sole = engine.sole
        self._reads = engine.reads
        self._writer = writer
        self._threads = threads
        self._locks = locks
        self.rule = rule

    async def check_member(self, thread_id: str, author: str, act: Act) -> bytes | None:
        """The entry from which it was decided that the author may do this. Raises NotAMemberError,
        AuthorNotInThreadError."""
        entry = await self._reads.get(keyspace.writer(thread_id, author))
        membership.check(self.rule, membership.standing_of(entry), act)
        return entry

    async def check_reader(self, thread_id: str, author: str) -> None:
        """Checks that the author is a member of the thread. Raises AuthorNotInThreadError or NotAMemberError."""
        await self.check_member(thread_id, author, Act.READ)

    async def of_thread(self, thread_id: str) -> list[str]:
        """The members of a thread, its author included; empty for an unknown thread."""
        prefix = keyspace.writers(thread_id)
        members: list[str] = []
        async for entries in pages(self._reads, prefix, keyspace.after(prefix)):
            members += [keyspace.last_part(key) for key, entry in entries if entry == keyspace.MEMBER]
        return members

    async def add(self, thread_id: str, members: Sequence[str]) -> None:
        """Adds members, even those who were removed. Durable when it returns. Raises ThreadNotFoundError (also when
        the thread is deleted), TooManyMembersError."""
        async with self._locks.hold(keyspace.writers(thread_id)):
            keys = sorted({keyspace.writer(thread_id, member) for member in members})
            for _ in range(CHANGE_TRIES_MAX):
                entries = await self._reads.values(keys)
                changed = [key for key in keys if entries.get(key) != keyspace.MEMBER]
                more, expect = await self.check_room(thread_id, sum(key not in entries for key in changed))
                room = more, [*expect, *((key, entries[key]) for key in keys if key not in changed)]
                if await self._change_members(thread_id, [(key, keyspace.MEMBER) for key in changed], room):
                    return
        raise NotWrittenError(MEMBERS_CHANGING)

    async def remove(self, thread_id: str, member: str) -> None:
        """Removes a member, or shuts out an author who is none. Durable when it returns: no later read or write by that
        author succeeds until a new `add`. Raises ThreadNotFoundError (also when the thread is deleted),
        MemberIsAuthorError, NoRoomToRemoveError."""
        async with self._locks.hold(keyspace.writers(thread_id)):
            if (await self._threads.get(thread_id)).author == member:
                raise MemberIsAuthorError
            key = keyspace.writer(thread_id, member)
            for _ in range(CHANGE_TRIES_MAX):
                try:
                    room = await self.check_room(thread_id, int(await self._reads.get(key) is None))
                except TooManyMembersError:
                    raise NoRoomToRemoveError from None
                if await self._change_members(thread_id, [(key, keyspace.REMOVED)], room):
                    return
        raise NotWrittenError(MEMBERS_CHANGING)

    async def check_room(self, thread_id: str, more: int) -> Room:
        """Under what condition `more` entries can be added, and a put with which no other server adds some meanwhile.
        The caller holds the lock of the entries. Raises TooManyMembersError."""
        if not more:
            return (), ()
        key = keyspace.room(thread_id)
        raw = None if self._sole else await self._reads.get(key)
        prefix = keyspace.writers(thread_id)
        left = membership.MEMBERS_COUNT_MAX - more
        if left < 0 or len(await self._reads.keys(prefix, keyspace.after(prefix), limit=left + 1)) > left:
            raise TooManyMembersError
        return ((), ()) if self._sole else (((key, b"%d" % (int(raw or b"0") + 1)),), ((key, raw),))

    async def _change_members(self, thread_id: str, puts: Sequence[tuple[bytes, bytes]], room: Room) -> bool:
        """False if one of the conditions of `room` does not hold. Without a change it still waits for the disk: what it
        relies on may be visible and not durable yet."""
        map_key = keyspace.key_map(thread_id)
        if await self._reads.get(map_key) is None:
            raise ThreadNotFoundError
        more, expect = room
        try:
            await self._writer.commit(Write((*puts, *more), ((keyspace.closed_key(thread_id), None), *expect)))
        except ConditionFailedError as error:
            if error.key != keyspace.closed_key(thread_id):
                return False
            raise ThreadNotFoundError from None
        return True
