"""Who may read a thread, and which part of its list a request asks for.

Owns: the rule that a signed user reads only where it takes part, and the query of a list of messages. Invariant: a
malformed limit, cursor or switch is a 400, never a default.

Messages: create, list, read, edit, delete, versions; on their own routes and within a thread.

Owns: what a message may look like coming in, and who may change one. Invariants: ids and times are never taken from
a client; within a thread's routes the path names the thread, whatever the body says; a deleted message's thread and
author stay what they were.

Reactions to a message: list, set, remove.

Owns: the wire shape of a reaction. Invariants: each change appends a version of the message; a signed user reacts
only as itself, and only to a message that it may read.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final

import msgspec

from progressdb_server.api.http import head, limits, response
from progressdb_server.api.http.access import Role, checked_author
from progressdb_server.api.http.errors import THREAD_ID_REFUSAL, bad_request, forbidden, not_found, too_large
from progressdb_server.api.http.request import Call, decode_json
from progressdb_server.api.http.response import Answer, JsonList
from progressdb_server.store.model import ConversationStore, Message, NewMessage

_LIMIT_MAX: Final = 2**62
"""A larger limit asks for all that there is, as this one does."""


async def check_reader(store: ConversationStore, call: Call, thread_id: str) -> None:
    """A signed user must own the thread or have written in it. A backend or admin key alone may read anything."""
    if call.user is not None:
        await check_takes_part(store, call.user, thread_id)


async def check_takes_part(store: ConversationStore, author: str, thread_id: str) -> None:
    if not await store.may_read_thread(thread_id, author):
        raise forbidden("author not found in any message in this thread")


async def check_message_reader(store: ConversationStore, call: Call, message: Message) -> None:
    """As `check_reader`, for the thread of one message; its own author may always read it."""
    if call.user is not None and call.user != message.author:
        await check_takes_part(store, call.user, message.thread)


class Page(msgspec.Struct, frozen=True):
    limit: int | None
    before: str | None
    after: str | None
    include_deleted: bool


def read_page(query: dict[str, str]) -> Page:
    """`limit`, `before`, `after`, `include_deleted`. Raises ApiError 400."""
    return Page(
        limit=_limit(query.get("limit")),
        before=_cursor(query, "before"),
        after=_cursor(query, "after"),
        include_deleted=_switch(query, "include_deleted"),
    )


def _limit(text: str | None) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise bad_request("limit must be a whole number that is not negative")
    digits = text.lstrip("0")
    return _LIMIT_MAX if len(digits) > 18 else int(digits or "0")


def _cursor(query: dict[str, str], name: str) -> str | None:
    value = query.get(name)
    if value is not None and not limits.ID_PATTERN.fullmatch(value):
        raise bad_request(f"{name} must be a message id")
    return value


def _switch(query: dict[str, str], name: str) -> bool:
    value = query.get(name)
    if value is None or value in ("false", "0"):
        return False
    if value in ("true", "1"):
        return True
    raise bad_request(f"{name} must be true or false")


def list_of_messages(store: ConversationStore, thread_id: str, page: Page) -> JsonList:
    """`{"thread", "messages": []}`, in order of creation."""
    chunks = store.list_messages(
        thread_id, limit=page.limit, before=page.before, after=page.after, include_deleted=page.include_deleted
    )
    return JsonList(b'{"thread":' + response.json_text(thread_id) + b',"messages":[', chunks)


class MessageBody(msgspec.Struct):
    """What a client may send. `id`, `ts`, `deleted` and unknown fields are ignored; null counts as absent."""

    thread: str | None = None
    author: str | None = None
    role: str | None = None
    body: Any = None
    reply_to: str | None = None
    reactions: dict[str, str] | None = None


_BODY: Final = msgspec.json.Decoder(MessageBody)
_UNCHECKED_BYTES_MAX: Final = limits.MESSAGE_BYTES_MAX // 4
"""JSON grows less than fourfold when it is written again (`1e15,` becomes `1000000000000000.0,`): below this no look
is needed.
"""
_UNKNOWN: Final = "message not found"


async def _received(call: Call) -> MessageBody:
    """The body within its bounds. Raises ApiError."""
    raw = call.whole_body()
    if raw is None:
        raw = await call.body()
    sent = decode_json(raw, _BODY)
    if sent.role and len(sent.role.encode()) > limits.ROLE_BYTES_MAX:
        raise bad_request("role too long")
    if sent.reply_to and not limits.ID_PATTERN.fullmatch(sent.reply_to):
        raise bad_request("reply_to is not a message id")
    if len(raw) > _UNCHECKED_BYTES_MAX and len(response.json_text(sent.body)) > limits.REQUEST_BYTES_MAX:
        raise too_large()
    return sent


def checked_identity(call: Call, identity: str) -> str:
    """Whom a reaction is by. A signed user reacts only as itself."""
    if call.user is not None and identity != call.user:
        raise forbidden("author mismatch between signature and reaction id")
    return checked_author(identity)


def checked_reaction(reaction: str) -> str:
    if len(reaction.encode()) > limits.REACTION_BYTES_MAX:
        raise bad_request("reaction too long")
    return reaction


def _reactions(call: Call, sent: MessageBody) -> dict[str, str]:
    if not sent.reactions:
        return {}
    if len(sent.reactions) > limits.REACTIONS_COUNT_MAX:
        raise bad_request("too many reactions")
    return {checked_identity(call, by): checked_reaction(value) for by, value in sent.reactions.items() if by and value}


class MessageRoutes:
    """The handlers; each takes a call that the gate has admitted."""

    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    # --- collections --------------------------------------------------------------------------------------------
    async def create(self, call: Call) -> Answer:
        """Durable when answered."""
        return await self._create(call, in_thread=False)

    def create_in_thread(self, call: Call) -> Coroutine[Any, Any, Answer]:
        return self._create(call, in_thread=True)

    async def _create(self, call: Call, *, in_thread: bool) -> Answer:
        sent = await _received(call)
        thread_id = call.id_from_path("thread", "thread not found") if in_thread else sent.thread or ""
        author = call.required_author(sent.author)
        if not in_thread and thread_id and not limits.ID_PATTERN.fullmatch(thread_id):
            raise bad_request(THREAD_ID_REFUSAL)
        if sent.body is None:
            raise bad_request("body is required")
        new = NewMessage(
            author=author,
            thread=thread_id,
            role=sent.role or "user",
            body=sent.body,
            reply_to=sent.reply_to or "",
            reactions=_reactions(call, sent),
        )
        message = await self._store.create_message(
            new, idempotency=call.idempotency(author), request_id=call.request_id
        )
        return response.json(message)

    async def list_by_query(self, call: Call) -> JsonList:
        """`?thread=`; a signed user must take part in the thread."""
        call.author()
        thread_id = call.query.get("thread", "")
        if not thread_id:
            raise bad_request("missing thread query parameter")
        if not limits.ID_PATTERN.fullmatch(thread_id):
            raise bad_request(THREAD_ID_REFUSAL)
        page = read_page(call.query)
        await check_reader(self._store, call, thread_id)
        return list_of_messages(self._store, thread_id, page)

    async def list_in_thread(self, call: Call) -> JsonList:
        """The author, signed or not, must take part in the thread."""
        thread_id = call.id_from_path("thread", "thread not found")
        author = call.required_author()
        page = read_page(call.query)
        thread = await self._store.get_thread(thread_id)
        if thread.deleted:
            raise not_found("thread not found")
        if thread.author != author:
            await check_takes_part(self._store, author, thread_id)
        return list_of_messages(self._store, thread_id, page)

    # --- one message --------------------------------------------------------------------------------------------
    async def read(self, call: Call) -> Answer:
        """The latest version, also of a deleted message."""
        thread_id, _ = self._place(call)
        message = await self._store.get_message(call.id_from_path("message", _UNKNOWN), thread_id=thread_id)
        await check_message_reader(self._store, call, message)
        return response.json(message)

    async def update(self, call: Call) -> Answer:
        """Appends a version. The thread never changes."""
        message_id = call.id_from_path("message", _UNKNOWN)
        thread_id = self._thread(call)
        sent = await _received(call)
        author = call.required_author(sent.author)
        if sent.body is None:
            raise bad_request("body is required")
        message = await self._store.update_message(
            message_id,
            author=author,
            body=sent.body,
            role=sent.role or None,
            reply_to=sent.reply_to,
            thread_id=thread_id,
            request_id=call.request_id,
        )
        return response.json(message)

    async def delete(self, call: Call) -> Answer:
        """Appends a tombstone. An admin may delete anybody's message."""
        message_id = call.id_from_path("message", _UNKNOWN)
        thread_id = self._thread(call)
        author = call.required_author()
        acts_as = None if call.principal.role is Role.ADMIN and call.user is None else author
        await self._store.delete_message(message_id, author=acts_as, thread_id=thread_id, request_id=call.request_id)
        return response.NO_CONTENT

    async def versions(self, call: Call) -> Answer:
        """Oldest first; none for an unknown id."""
        call.author()
        message_id = call.parameters["message"]
        found = await self._store.message_versions(message_id) if limits.ID_PATTERN.fullmatch(message_id) else []
        if found:
            await check_message_reader(self._store, call, found[-1])
        return response.json({"id": message_id, "versions": found})

    def _thread(self, call: Call) -> str | None:
        """The thread of the path, None on the routes that name none."""
        return call.id_from_path("thread", _UNKNOWN) if "thread" in call.parameters else None

    def _place(self, call: Call) -> tuple[str | None, str | None]:
        """The thread of the path and the author, which a thread's routes require."""
        thread_id = self._thread(call)
        return thread_id, call.required_author() if thread_id is not None else call.author()


class ReactionBody(msgspec.Struct):
    id: str | None = None
    reaction: str | None = None


_BODY_REACTIONS: Final = msgspec.json.Decoder(ReactionBody)


class ReactionRoutes:
    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def _readable(self, call: Call) -> Message:
        call.author()
        message = await self._store.get_message(call.id_from_path("message", _UNKNOWN))
        await check_message_reader(self._store, call, message)
        return message

    async def list(self, call: Call) -> Answer:
        message = await self._readable(call)
        listed = [{"id": by, "reaction": value} for by, value in message.reactions.items()]
        return response.json({"id": message.id, "reactions": listed})

    async def set(self, call: Call) -> Answer:
        """The identity is the body's `id`, or the header X-Identity. Answers the message."""
        sent = await call.json(_BODY_REACTIONS)
        by = sent.id or head.header_text(call.headers.get(head.IDENTITY, b""), "X-Identity")
        if not by or not sent.reaction:
            raise bad_request("missing id or reaction")
        checked_identity(call, by)
        checked_reaction(sent.reaction)
        message = await self._readable(call)
        changed = await self._store.set_reaction(message.id, by, sent.reaction, request_id=call.request_id)
        return response.json(changed)

    async def remove(self, call: Call) -> Answer:
        """Also when there is no such reaction."""
        by = checked_identity(call, call.parameters["identity"])
        message = await self._readable(call)
        await self._store.remove_reaction(message.id, by, request_id=call.request_id)
        return response.NO_CONTENT
