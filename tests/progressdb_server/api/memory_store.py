"""A conversation store in memory, behind the production protocol: what the routes are tested against.

It keeps versions, tombstones, writers and idempotency as the real one does; it keeps nothing on disk and encrypts
nothing.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from progressdb_server.store import membership
from progressdb_server.store.membership import Act, Rule
from progressdb_server.store.model import (
    RECORD_MISSING,
    ConversationStore,
    Idempotency,
    IdempotencyConflictError,
    MemberIsAuthorError,
    Message,
    MessageNotFoundError,
    NewMessage,
    NoRoomToRemoveError,
    NotTheAuthorError,
    Thread,
    ThreadDeletedError,
    ThreadNotFoundError,
    TooManyMembersError,
    VersionList,
)

START_NS = 1_700_000_000_000_000_000
CHUNK = 3  # small, so that every list of the tests comes in several chunks


class MemoryStore(ConversationStore):
    def __init__(self) -> None:
        self.threads: dict[str, Thread] = {}
        self.versions: dict[str, list[Message]] = {}
        self.entries: dict[tuple[str, str], bytes] = {}
        """By thread and author, as the real store has them."""
        self.rule: Rule = "members"
        self.seen: dict[tuple[str, str], tuple[object, str]] = {}
        self.request_ids: list[str | None] = []
        self.fails_with: Exception | None = None
        self._ns = START_NS
        self._seq = 0

    def _stamp(self) -> tuple[int, str]:
        self._ns += 1
        self._seq += 1
        return self._ns, f"{self._ns}-{self._seq}"

    def _check(self) -> None:
        if self.fails_with is not None:
            raise self.fails_with

    @property
    def empty(self) -> bool:
        return not self.threads and not self.versions

    # --- messages -----------------------------------------------------------------------------------------------
    async def create_message(
        self, new: NewMessage, *, idempotency: Idempotency | None = None, request_id: str | None = None
    ) -> Message:
        self._check()
        self.request_ids.append(request_id)
        known = self._recalled(idempotency, new)
        if known is not None:
            return self.versions[known][0]
        thread = self._thread_for(new)
        self._check_room(thread.id, {new.author})
        self.entries.setdefault((thread.id, new.author), membership.MEMBER)
        ts, stamp = self._stamp()
        thread.updated_ts = ts
        message = Message(
            id=f"msg-{stamp}",
            thread=thread.id,
            author=new.author,
            role=new.role,
            ts=ts,
            body=new.body,
            reply_to=new.reply_to,
            reactions=new.reactions,
        )
        self.versions[message.id] = [message]
        self._remember(idempotency, new, message.id)
        return message

    def _thread_for(self, new: NewMessage) -> Thread:
        thread = self.threads.get(new.thread)
        if thread is not None:
            if new.as_member:
                self._check_member(thread.id, new.author, Act.WRITE)
            if thread.deleted:
                raise ThreadDeletedError
            return thread
        return self._make_thread(new.author, f"New Thread #{len(self.threads) + 1}", new.thread)

    def _make_thread(self, author: str, title: str, name: str = "") -> Thread:
        ts, stamp = self._stamp()
        thread_id = name or f"thread-{stamp}"
        made = Thread(
            id=thread_id, title=title, author=author, slug=_slug(title, thread_id), created_ts=ts, updated_ts=ts
        )
        self.threads[thread_id] = made
        self.entries[thread_id, author] = membership.MEMBER
        return made

    def _recalled(self, idempotency: Idempotency | None, request: object) -> str | None:
        if idempotency is None:
            return None
        known = self.seen.get((idempotency.scope, idempotency.key))
        if known is None:
            return None
        if known[0] != request:
            raise IdempotencyConflictError
        return known[1]

    def _remember(self, idempotency: Idempotency | None, request: object, made: str) -> None:
        if idempotency is not None:
            self.seen[(idempotency.scope, idempotency.key)] = (request, made)

    def _found(self, message_id: str, thread_id: str | None = None) -> list[Message]:
        self._check()
        versions = self.versions.get(message_id)
        if versions is None or (thread_id is not None and versions[-1].thread != thread_id):
            raise MessageNotFoundError
        return versions

    async def get_message(self, message_id: str, *, thread_id: str | None = None) -> Message:
        return self._found(message_id, thread_id)[-1]

    def _append(self, versions: list[Message], author: str | None, member: str | None, **fields: Any) -> Message:
        current = versions[-1]
        if author is not None and author != current.author:
            raise NotTheAuthorError
        if member is not None:
            self._check_member(current.thread, member, Act.READ)
        ts, _ = self._stamp()
        versions.append(msgspec.structs.replace(current, ts=ts, **fields))
        return versions[-1]

    async def update_message(
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
        versions = self._found(message_id, thread_id)
        self.request_ids.append(request_id)
        given = {"body": body, "role": role, "reply_to": reply_to}
        return self._append(
            versions, author, member, **{name: value for name, value in given.items() if value is not None}
        )

    async def delete_message(
        self,
        message_id: str,
        *,
        author: str | None,
        thread_id: str | None = None,
        member: str | None = None,
        request_id: str | None = None,
    ) -> None:
        self._append(self._found(message_id, thread_id), author, member, deleted=True)

    async def latest_version(self, message_id: str) -> Message:
        return self._found(message_id)[-1]

    async def message_versions(
        self, message_id: str, *, limit: int | None = None, before: str | None = None
    ) -> VersionList:
        self._check()
        end = int(before.partition("-")[0]) if before is not None else 2**64
        found = [version for version in self.versions.get(message_id, []) if version.ts < end]
        left = len(found) - min(len(found), limit) if limit is not None else 0
        older = f"{found[left].ts}-000000" if 0 < left < len(found) else ""
        return VersionList(_chunks(found[left:]), older)

    async def set_reaction(
        self,
        message_id: str,
        identity: str,
        reaction: str,
        *,
        member: str | None = None,
        request_id: str | None = None,
    ) -> Message:
        versions = self._found(message_id)
        return self._append(versions, None, member, reactions={**versions[-1].reactions, identity: reaction})

    async def remove_reaction(
        self, message_id: str, identity: str, *, member: str | None = None, request_id: str | None = None
    ) -> None:
        versions = self._found(message_id)
        if member is not None:
            self._check_member(versions[-1].thread, member, Act.READ)
        if identity in versions[-1].reactions:
            kept = {by: value for by, value in versions[-1].reactions.items() if by != identity}
            self._append(versions, None, None, reactions=kept)

    async def list_messages(
        self,
        thread_id: str,
        *,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        include_deleted: bool = False,
        tag: str | None = None,
    ) -> AsyncIterator[list[Message]]:
        self._check()
        found = [
            versions[-1]
            for message_id, versions in self.versions.items()
            if versions[-1].thread == thread_id
            and (include_deleted or not versions[-1].deleted)
            and (before is None or message_id < before)
            and (after is None or message_id > after)
        ]
        if limit is not None:
            found = found[len(found) - min(limit, len(found)) :]
        async for chunk in _chunks(found):
            yield chunk

    async def listed_threads(self, thread_ids: Sequence[str], *, opened: bool = True) -> list[Thread]:
        self._check()
        return [self.threads.get(name) or Thread(id=name, error=RECORD_MISSING) for name in thread_ids]

    async def list_tag(
        self, thread_id: str, *, limit: int | None, before: str | None, after: str | None, include_deleted: bool
    ) -> str:
        newest = max((v[-1].ts for v in self.versions.values() if v[-1].thread == thread_id), default=0)
        return f"{newest}-{limit}-{before}-{after}-{include_deleted}"

    async def list_unchanged(self, thread_id: str, tag: str) -> bool:
        return thread_id in self.threads

    # --- threads ------------------------------------------------------------------------------------------------
    async def thread_deleted(self, thread_id: str) -> bool:
        return thread_id in self.threads and self.threads[thread_id].deleted

    def _check_member(self, thread_id: str, author: str, act: Act) -> None:
        standing = membership.standing_of(self.entries.get((thread_id, author)))
        membership.check(self.rule, standing, act)

    async def check_reader(self, thread_id: str, author: str) -> None:
        self._check_member(thread_id, author, Act.READ)

    async def members(self, thread_id: str) -> list[str]:
        return sorted(
            author
            for (thread, author), entry in self.entries.items()
            if thread == thread_id and entry == membership.MEMBER
        )

    def _check_room(self, thread_id: str, more: set[str]) -> None:
        known = {author for thread, author in self.entries if thread == thread_id}
        if len(known | more) > membership.MEMBERS_COUNT_MAX:
            raise TooManyMembersError

    async def add_members(self, thread_id: str, members: Sequence[str]) -> None:
        self._check_room(thread_id, set(members))
        self.entries.update({(thread_id, member): membership.MEMBER for member in members})

    async def remove_member(self, thread_id: str, member: str) -> None:
        if self.threads[thread_id].author == member:
            raise MemberIsAuthorError
        try:
            self._check_room(thread_id, {member})
        except TooManyMembersError:
            raise NoRoomToRemoveError from None
        self.entries[thread_id, member] = membership.REMOVED

    async def create_thread(
        self,
        *,
        author: str,
        title: str,
        members: Sequence[str] = (),
        idempotency: Idempotency | None = None,
        request_id: str | None = None,
    ) -> Thread:
        self._check()
        known = self._recalled(idempotency, (author, title))
        if known is not None:
            return self.threads[known]
        thread = self._make_thread(author, title)
        self.entries.update({(thread.id, member): membership.MEMBER for member in members})
        self._remember(idempotency, (author, title), thread.id)
        return thread

    async def get_thread(self, thread_id: str) -> Thread:
        self._check()
        if thread_id not in self.threads:
            raise ThreadNotFoundError
        return self.threads[thread_id]

    def _own_thread(self, thread_id: str, author: str | None) -> Thread:
        thread = self.threads.get(thread_id)
        if thread is None or thread.deleted:
            raise ThreadNotFoundError
        if author is not None and author != thread.author:
            raise NotTheAuthorError
        return thread

    async def update_thread(
        self, thread_id: str, *, author: str | None, title: str, request_id: str | None = None
    ) -> Thread:
        thread = self._own_thread(thread_id, author)
        thread.title, thread.slug, thread.updated_ts = title, _slug(title, thread_id), self._stamp()[0]
        return thread

    async def delete_thread(
        self, thread_id: str, *, author: str | None, by: str, request_id: str | None = None
    ) -> None:
        thread = self._own_thread(thread_id, author)
        ts, stamp = self._stamp()
        thread.deleted, thread.deleted_ts, thread.updated_ts = True, ts, ts
        body = {"_event": "thread_deleted", "by": by}
        event = Message(id=f"msg-{stamp}", thread=thread_id, author=by, ts=ts, body=body, deleted=True)
        self.versions[event.id] = [event]

    async def list_threads(
        self, *, author: str | None, title: str | None = None, slug: str | None = None, include_deleted: bool = False
    ) -> AsyncIterator[list[Thread]]:
        for thread in self.threads.values():
            wanted = (
                (author is None or thread.author == author)
                and (title is None or title.lower() in thread.title.lower())
                and (slug is None or slug == thread.slug)
                and (include_deleted or not thread.deleted)
            )
            if wanted:
                yield [thread]

    # --- the whole ----------------------------------------------------------------------------------------------
    async def stats(self) -> dict[str, int]:
        return {"threads": len(self.threads), "messages": sum(map(len, self.versions.values()))}

    async def stored_keys(self, prefix: str) -> AsyncIterator[list[str]]:
        yield [key for key in (f"thread:{thread_id}:meta" for thread_id in self.threads) if key.startswith(prefix)]

    async def raw_value(self, key: str) -> bytes | None:
        thread_id = key.removeprefix("thread:").removesuffix(":meta")
        return b"\x01sealed" if thread_id in self.threads else None


async def _chunks(found: list[Message]) -> AsyncIterator[list[Message]]:
    for at in range(0, len(found), CHUNK):
        yield found[at : at + CHUNK]


def _slug(title: str, thread_id: str) -> str:
    return (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "t") + "-" + thread_id
