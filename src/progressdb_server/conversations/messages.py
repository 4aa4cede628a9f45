"""Messages: creating, editing, reacting and deleting. `conversations.reading` reads them.

Owns: what a next version becomes, and how many versions and bytes a message may have. Invariants:
- Every version is a record at its own stamp and is never changed afterwards; a message's id is the stamp of its first
  version.
- Only an edit stores a body. A change of reactions and a tombstone keep the content of an earlier version, by its
  stamp, so that they cost as much as the reactions.
- The order index has one entry per message, at the stamp of its first version, which leads to the latest version; it is
  changed in the batch of that version. So a list costs as much as it has messages, however often they were edited.
- Changes of one message run one after another; each builds on the version before it.
- A message that has all the versions or bytes that it may have can still be deleted, and its reactions can still be
  removed: that is at most one version more for each reaction, and one for the tombstone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from minikms import api
from progressdb_server.conversations.members import MEMBERS_CHANGING, Members, Room
from progressdb_server.conversations.membership import Act
from progressdb_server.conversations.reading import Reading
from progressdb_server.conversations.threads import CHANGE_TRIES_MAX, NamedLocks, Threads
from progressdb_server.store import drafts, keyspace, record
from progressdb_server.store.conditions import Write
from progressdb_server.store.drafts import Draft
from progressdb_server.store.engine import Commits, Reads
from progressdb_server.store.idempotency import Retries, Ticket
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import (
    REACTIONS_COUNT_MAX,
    ConditionFailedError,
    Idempotency,
    Message,
    MessageNotFoundError,
    NewMessage,
    NotAMemberError,
    NotTheAuthorError,
    NotWrittenError,
    RecordUnreadableError,
    Thread,
    TooManyReactionsError,
    TooManyVersionsError,
    json_text,
)
from progressdb_server.store.sealer import Sealer, ThreadState

VERSIONS_COUNT_MAX: Final = 10_000
VERSIONS_BYTES_MAX: Final = 256 * 1024 * 1024
"""The stored versions of one message, in bytes of their sealed parts."""


class _Change(NamedTuple):
    """`replaced` gives the fields to replace in the current version, None for no change. With `thread`, `author` or
    `member` it is refused unless the message is there or theirs; `beyond_bounds`: the version may be one too many."""

    replaced: Callable[[Message], dict[str, Any] | None]
    member: str | None
    request_id: str | None
    thread: str | None = None
    author: str | None = None
    beyond_bounds: bool = False


@dataclass(eq=False)
class Messages:
    reads: Reads
    writer: Commits
    clock: Clock
    sealer: Sealer
    threads: Threads
    members: Members
    reading: Reading
    locks: NamedLocks
    retries: Retries

    # --- creating -------------------------------------------------------------------------------------------------
    def create(
        self, new: NewMessage, *, idempotency: Idempotency | None = None, request_id: str | None = None
    ) -> Coroutine[Any, Any, Message]:
        """Durable when it returns. A thread is made when none is named (under a new id) or the named one is unknown
        (under the name given). Raises ThreadDeletedError, IdempotencyConflictError, TooManyMembersError;
        NotAMemberError if `new.as_member` and the author is not a member of the thread."""
        if idempotency is None:
            return self._create(new, None, request_id)
        return self._create_once(new, idempotency, request_id)

    async def _create_once(self, new: NewMessage, idempotency: Idempotency, request_id: str | None) -> Message:
        fields = {name: getattr(new, name) for name in new.__struct_fields__ if name != "as_member"}
        ticket = Ticket(idempotency, ["message", fields])
        async with self.locks.hold(ticket.key):
            message_id, message = await self.retries.once(ticket, lambda: self._create(new, ticket, request_id))
            if message is not None:
                return message
            thread, place = await self.reading.locate(message_id, None)
            if new.as_member:
                await self.members.check_member(thread, new.author, Act.READ)
            async with self.reading.open_version(thread, place.first, place.first) as version:
                return version.message

    def _create(self, new: NewMessage, ticket: Ticket | None, request_id: str | None) -> Coroutine[Any, Any, Message]:
        if not new.thread:
            return self._create_in_new_thread(new, ticket, request_id)
        state = self.sealer.known(new.thread)
        if state is None:
            return self._create_or_append(new, ticket, request_id)
        if new.author in state.writers:  # the condition of the write finds out if it is no longer true
            return self._append_as(keyspace.MEMBER, state, new, ticket, request_id=request_id)
        return self._append(state, new, ticket, request_id)

    async def _create_or_append(self, new: NewMessage, ticket: Ticket | None, request_id: str | None) -> Message:
        state = await self.sealer.thread(new.thread)
        if state is None:
            # One at a time for each thread, so that a burst of first messages makes one key.
            async with self.locks.hold(keyspace.meta(new.thread)):
                state = await self.sealer.thread(new.thread)
                if state is None:
                    try:
                        return await self._create_in_new_thread(new, ticket, request_id)
                    except ConditionFailedError as error:
                        if ticket is not None and error.key == ticket.key:
                            raise
                        state = await self._thread_with_key(new.thread)  # made meanwhile
        return await self._append(state, new, ticket, request_id)

    async def _create_in_new_thread(self, new: NewMessage, ticket: Ticket | None, request_id: str | None) -> Message:
        """Make the thread, with its first message."""
        message: Message

        def drafted(thread: Thread, created: Stamp, key_id: str) -> Draft:
            nonlocal message
            stamp = self.clock.next()
            message = new.first_version(keyspace.message_id(stamp), thread.id, stamp.time_ns)
            extra = (ticket.put(message.id, stamp.time_ns),) if ticket else ()
            expect = (ticket.condition,) if ticket else ()
            new_thread = drafts.new_thread(thread, created, key_id, extra, expect)
            return drafts.joined(new_thread, drafts.first_version(message, stamp, key_id))

        await self.threads.make_thread(drafted, request_id, author=new.author, title=None, name=new.thread)
        return message

    async def _append(
        self, state: ThreadState, new: NewMessage, ticket: Ticket | None, request_id: str | None
    ) -> Message:
        key = keyspace.writer(state.thread, new.author)
        entry = await self.reads.get(key)
        if entry is None:
            async with self.locks.hold(keyspace.writers(state.thread)):
                for _ in range(CHANGE_TRIES_MAX):
                    if (entry := await self.reads.get(key)) is not None:
                        break
                    if new.as_member:
                        await self.members.check_member(state.thread, new.author, Act.WRITE)
                    room: Room = ((), ())
                    if not state.deleted:  # else the write is refused for that reason
                        room = await self.members.check_room(state.thread, 1)
                    try:
                        return await self._append_as(None, state, new, ticket, request_id=request_id, room=room)
                    except ConditionFailedError as error:  # somebody else has changed the members meanwhile
                        if error.key not in (key, keyspace.room(state.thread)):
                            raise
                else:
                    raise NotWrittenError(MEMBERS_CHANGING)
        if new.as_member:
            await self.members.check_member(state.thread, new.author, Act.WRITE)
        return await self._append_as(entry, state, new, ticket, request_id=request_id)

    async def _append_as(
        self,
        entry: bytes | None,
        state: ThreadState,
        new: NewMessage,
        ticket: Ticket | None,
        *,
        request_id: str | None,
        room: Room = ((), ()),
    ) -> Message:
        """`entry` is the author's entry among the members; without one the message makes the author a member, for which
        there is `room`. Raises NotAMemberError if the author was removed meanwhile."""
        message: Message
        key = keyspace.writer(state.thread, new.author)
        expect = ((key, entry),) if new.as_member or entry is None else ()
        if ticket:
            expect = (ticket.condition, *expect)  # first: the entry may be of the same create, at another server

        def draft(stamp: Stamp, key_id: str) -> Draft:
            nonlocal message
            message = new.first_version(keyspace.message_id(stamp), state.thread, stamp.time_ns)
            extra: list[tuple[bytes, bytes | None]] = [ticket.put(message.id, stamp.time_ns)] if ticket else []
            if entry is None:
                extra += ((key, keyspace.MEMBER), *room[0])
            return drafts.first_version(message, stamp, key_id, extra, (*expect, *room[1]))

        try:
            await self.sealer.append(state, draft, request_id)
        except ConditionFailedError as error:
            if error.key != key or entry is None:
                raise
            state.writers.discard(new.author)
            raise NotAMemberError from None
        if entry != keyspace.REMOVED and new.author not in state.writers:
            state.remember_writer(new.author)
        return message

    # --- changing -------------------------------------------------------------------------------------------------
    async def update(
        self,
        message_id: str,
        *,
        author: str | None,
        body: Any,
        role: str | None,
        reply_to: str | None,
        thread_id: str | None = None,
        member: str | None = None,
        request_id: str | None = None,
    ) -> Message:
        """`member`, here and below: who must be a member of the thread for the write; None asks for nobody. Raises
        MessageNotFoundError, NotTheAuthorError, NotAMemberError."""

        def replaced(current: Message) -> dict[str, Any]:
            _refuse_deleted(current)
            fields: dict[str, Any] = {"body": json_text(body)}
            if role is not None:
                fields["role"] = role
            if reply_to is not None:
                fields["reply_to"] = reply_to
            return fields

        return await self._change(message_id, _Change(replaced, member, request_id, thread_id, author))

    async def delete(
        self,
        message_id: str,
        *,
        author: str | None,
        thread_id: str | None = None,
        member: str | None = None,
        request_id: str | None = None,
    ) -> None:
        def replaced(current: Message) -> dict[str, Any] | None:
            return None if current.deleted else {"deleted": True}

        await self._change(message_id, _Change(replaced, member, request_id, thread_id, author, beyond_bounds=True))

    async def set_reaction(
        self, message_id: str, identity: str, reaction: str, *, member: str | None = None, request_id: str | None = None
    ) -> Message:
        def replaced(current: Message) -> dict[str, Any]:
            _refuse_deleted(current)
            reactions = {**current.reactions, identity: reaction}
            if len(reactions) > max(REACTIONS_COUNT_MAX, len(current.reactions)):
                raise TooManyReactionsError(f"the message has reactions of {REACTIONS_COUNT_MAX} identities")
            return {"reactions": reactions}

        return await self._change(message_id, _Change(replaced, member, request_id))

    async def remove_reaction(
        self, message_id: str, identity: str, *, member: str | None = None, request_id: str | None = None
    ) -> None:
        def replaced(current: Message) -> dict[str, Any] | None:
            _refuse_deleted(current)
            if identity not in current.reactions:
                return None
            return {"reactions": {who: what for who, what in current.reactions.items() if who != identity}}

        await self._change(message_id, _Change(replaced, member, request_id, beyond_bounds=True))

    async def _change(self, message: str, change: _Change) -> Message:
        """Append a version, and return the latest one. Raises MessageNotFoundError, NotTheAuthorError, NotAMemberError,
        what the change raises, and TooManyVersionsError; NotWrittenError if other servers have changed the message
        before each of CHANGE_TRIES_MAX tries."""
        async with self.locks.hold(message.encode()):
            for _ in range(CHANGE_TRIES_MAX):
                with contextlib.suppress(ConditionFailedError):
                    return await self._try_change(message, change)
        raise NotWrittenError("other servers are changing the message at the same time")

    async def _try_change(self, message: str, change: _Change) -> Message:
        """Changes the message like `_change`. Raises ConditionFailedError if it was changed since it was read."""
        owner, place = await self.reading.locate(message, change.thread)
        state = await self._thread_with_key(owner)
        first = Stamp.parse(place.first.decode())
        async with self.reading.open_version(owner, place.first, place.latest) as current:
            if change.author not in (None, current.message.author):
                raise NotTheAuthorError
            order_key = keyspace.order(owner) + place.first
            expect: tuple[tuple[bytes, bytes | None], ...] = ((order_key, place.value),)
            if change.member is not None:
                # Only a member may, under either rule: an outsider has no message here, and can't read one to react to.
                await self.members.check_member(owner, change.member, Act.READ)
                expect = (*expect, (keyspace.writer(owner, change.member), keyspace.MEMBER))
            fields = change.replaced(current.message)
            if fields is None:  # what is answered must be durable, and on the node that answers
                await self._under(self.writer.commit(Write((), expect)), order_key)
                return current.message
            changed = msgspec.structs.replace(current.message, **fields)
            content = "" if "body" in fields else current.content
            before = record.Before(current.before.versions + 1, current.before.bytes + current.bytes)
            secret = record.later_secret(changed, first.text, content, before)
            if not change.beyond_bounds:
                _check_bounds(before, len(secret) + api.SEAL_BYTES)

            def draft(stamp: Stamp, key_id: str) -> Draft:
                changed.ts = stamp.time_ns
                return drafts.later_version(
                    changed, first, stamp, key_id, content=content, secret=secret, expect=expect
                )

            await self._under(self.sealer.append(state, draft, change.request_id), order_key)
            return changed

    async def _thread_with_key(self, thread: str) -> ThreadState:
        """The state of the thread. Raises RecordUnreadableError if it has lost its key map."""
        state = await self.sealer.thread(thread)
        if state is None:
            raise RecordUnreadableError(f"thread {thread} has no key")
        return state

    async def _under(self, writing: Awaitable[None], order_key: bytes) -> None:
        """Waits for a write. Raises ConditionFailedError for the message's place, and NotAMemberError for the only
        other condition.
        """
        try:
            await writing
        except ConditionFailedError as error:
            if error.key == order_key:
                raise
            raise NotAMemberError from None


def _check_bounds(before: record.Before, added: int) -> None:
    """Checks that a message can get another version of `added` bytes. Raises TooManyVersionsError."""
    if before.versions >= VERSIONS_COUNT_MAX:
        raise TooManyVersionsError(f"the message has {before.versions} versions, at most {VERSIONS_COUNT_MAX}")
    if before.bytes + added > VERSIONS_BYTES_MAX:
        raise TooManyVersionsError(f"the message's versions have {before.bytes} bytes, at most {VERSIONS_BYTES_MAX}")


def _refuse_deleted(current: Message) -> None:
    if current.deleted:
        raise MessageNotFoundError
