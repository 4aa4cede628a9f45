"""Messages and reactions: their own routes, and messages within a thread.

Owns: the JSON of messages and reactions as clients send it, who may read a message, and who may change one. Invariants:
- Ids and times are never taken from a client. Within a thread's routes, the path names the thread and not the body.
- A signed user reads only threads in which it takes part, and reacts only as itself.
- A deleted message keeps its thread and author. Every change, also of a reaction, appends a version.
- A malformed limit, cursor or switch is a 400, never a default.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Final

import msgspec

from progressdb_server.api.http import head, limits
from progressdb_server.api.http.access import Role, checked_author
from progressdb_server.api.http.errors import (
    AUTHOR_REQUIRED,
    AUTHOR_TOO_LONG,
    INVALID_IDEMPOTENCY_KEY,
    OTHER_AUTHOR_IN_BODY,
    bad_request,
    forbidden,
    not_found,
    too_large,
)
from progressdb_server.api.http.request import Request, decode_json
from progressdb_server.api.http.response import NO_CONTENT, JsonList, Response, encode_json, json_response
from progressdb_server.api.openapi.description import (
    AUTHOR,
    CALLER,
    ID,
    IDEMPOTENCY,
    SWITCH,
    TEXT,
    JsonBody,
    Parameter,
    Schema,
    list_of,
    nullable,
    ref,
    text,
    texts,
)
from progressdb_server.api.routes.errors import (
    AUTHOR_NOT_IN_THREAD,
    IDEMPOTENCY_CONFLICT,
    INVALID_THREAD_ID,
    MESSAGE_NOT_FOUND,
    NOT_THE_AUTHOR,
    THREAD_DELETED,
    THREAD_NOT_FOUND,
)
from progressdb_server.api.routes.table import THREAD_MESSAGES, Operation
from progressdb_server.store.model import ConversationStore, Message, NewMessage

INVALID_LIMIT: Final = "limit must be a whole number that is not negative"
BODY_REQUIRED: Final = "body is required"
ROLE_TOO_LONG: Final = "role too long"
INVALID_REPLY_TO: Final = "reply_to is not a message id"
TOO_MANY_REACTIONS: Final = "too many reactions"
THREAD_PARAMETER_MISSING: Final = "missing thread query parameter"
OTHER_REACTION_ID: Final = "author mismatch between signature and reaction id"
REACTION_INCOMPLETE: Final = "missing id or reaction"
REACTION_TOO_LONG: Final = "reaction too long"

_LIMIT_MAX: Final = 2**62
"""No thread has as many messages, so a larger limit gives the same list."""


# --- who may read -----------------------------------------------------------------------------------------------
async def check_reader(store: ConversationStore, request: Request, thread_id: str) -> None:
    """Raises ApiError 403 if a signed user does not take part in the thread.

    An unsigned backend or admin reads anything.
    """
    if request.user is not None:
        await check_takes_part(store, request.user, thread_id)


async def check_takes_part(store: ConversationStore, author: str, thread_id: str) -> None:
    """Raises ApiError 403 unless the author owns the thread or has written in it."""
    if not await store.may_read_thread(thread_id, author):
        raise forbidden(AUTHOR_NOT_IN_THREAD)


async def check_message_reader(store: ConversationStore, request: Request, message: Message) -> None:
    """As `check_reader`, for the thread of one message. The author of the message may always read it."""
    if request.user is not None and request.user != message.author:
        await check_takes_part(store, request.user, message.thread)


# --- lists ------------------------------------------------------------------------------------------------------
class Page(msgspec.Struct, frozen=True):
    """The part of a thread's messages that a request asks for."""

    limit: int | None
    before: str | None
    after: str | None
    include_deleted: bool


def read_page(query: dict[str, str]) -> Page:
    """Reads `limit`, `before`, `after`, `include_deleted`. Raises ApiError 400."""
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
        raise bad_request(INVALID_LIMIT)
    digits = text.lstrip("0")
    return _LIMIT_MAX if len(digits) > 18 else int(digits or "0")


def _cursor(query: dict[str, str], name: str) -> str | None:
    value = query.get(name)
    if value is not None and not limits.ID_PATTERN.fullmatch(value):
        raise bad_request(_not_a_message_id(name))
    return value


def _switch(query: dict[str, str], name: str) -> bool:
    value = query.get(name)
    if value is None or value in ("false", "0"):
        return False
    if value in ("true", "1"):
        return True
    raise bad_request(_not_a_switch(name))


def _not_a_message_id(name: str) -> str:
    return f"{name} must be a message id"


def _not_a_switch(name: str) -> str:
    return f"{name} must be true or false"


def list_of_messages(store: ConversationStore, thread_id: str, page: Page) -> JsonList:
    """`{"thread", "messages": []}`, in the order of creation."""
    chunks = store.list_messages(
        thread_id, limit=page.limit, before=page.before, after=page.after, include_deleted=page.include_deleted
    )
    return JsonList(b'{"thread":' + encode_json(thread_id) + b',"messages":[', chunks)


# --- what clients send ------------------------------------------------------------------------------------------
class MessageBody(msgspec.Struct):
    """A message from a client. `id`, `ts`, `deleted` and unknown fields are ignored; null counts as absent."""

    thread: str | None = None
    author: str | None = None
    role: str | None = None
    body: Any = None
    reply_to: str | None = None
    reactions: dict[str, str] | None = None


_MESSAGE_DECODER: Final = msgspec.json.Decoder(MessageBody)
_UNCHECKED_BYTES_MAX: Final = limits.REQUEST_BYTES_MAX // 4
"""The store writes the JSON of a body again. JSON grows less than fourfold by that (`1e15,` becomes
`1000000000000000.0,`), so that the length of a shorter body needs no check.
"""


class ReactionBody(msgspec.Struct):
    """A reaction from a client."""

    id: str | None = None
    reaction: str | None = None


_REACTION_DECODER: Final = msgspec.json.Decoder(ReactionBody)


async def _received(request: Request) -> MessageBody:
    """The message within its bounds. Raises ApiError 400, 413."""
    raw = request.received_body()
    if raw is None:
        raw = await request.body()
    sent = decode_json(raw, _MESSAGE_DECODER)
    if sent.role and len(sent.role.encode()) > limits.ROLE_BYTES_MAX:
        raise bad_request(ROLE_TOO_LONG)
    if sent.reply_to and not limits.ID_PATTERN.fullmatch(sent.reply_to):
        raise bad_request(INVALID_REPLY_TO)
    if len(raw) > _UNCHECKED_BYTES_MAX and len(encode_json(sent.body)) > limits.REQUEST_BYTES_MAX:
        raise too_large()
    return sent


def checked_identity(request: Request, identity: str) -> str:
    """The identity that reacts. Raises ApiError 403 if a signed user reacts as another, 400 if it cannot be stored."""
    if request.user is not None and identity != request.user:
        raise forbidden(OTHER_REACTION_ID)
    return checked_author(identity)


def checked_reaction(reaction: str) -> str:
    if len(reaction.encode()) > limits.REACTION_BYTES_MAX:
        raise bad_request(REACTION_TOO_LONG)
    return reaction


def _reactions(request: Request, sent: MessageBody) -> dict[str, str]:
    """The reactions of a new message, without those that lack an identity or a value. The bounds hold for all.

    Raises ApiError 400, 403.
    """
    if not sent.reactions:
        return {}
    if len(sent.reactions) > limits.REACTIONS_COUNT_MAX:
        raise bad_request(TOO_MANY_REACTIONS)
    for by, value in sent.reactions.items():
        checked_reaction(value)
        if by:
            checked_identity(request, by)
    return {by: value for by, value in sent.reactions.items() if by and value}


# --- handlers ---------------------------------------------------------------------------------------------------
class MessageHandlers:
    """Each handler takes a request that access control has authorized."""

    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def create(self, request: Request) -> Response:
        """The message is durable before the response."""
        return await self._create(request, in_thread=False)

    def create_in_thread(self, request: Request) -> Coroutine[Any, Any, Response]:
        return self._create(request, in_thread=True)

    async def _create(self, request: Request, *, in_thread: bool) -> Response:
        sent = await _received(request)
        thread_id = request.id_from_path("thread", THREAD_NOT_FOUND) if in_thread else sent.thread or ""
        author = request.required_author(sent.author)
        if not in_thread and thread_id and not limits.ID_PATTERN.fullmatch(thread_id):
            raise bad_request(INVALID_THREAD_ID)
        if sent.body is None:
            raise bad_request(BODY_REQUIRED)
        new = NewMessage(
            author=author,
            thread=thread_id,
            role=sent.role or "user",
            body=sent.body,
            reply_to=sent.reply_to or "",
            reactions=_reactions(request, sent),
        )
        message = await self._store.create_message(
            new, idempotency=request.idempotency(author), request_id=request.request_id
        )
        return json_response(message)

    async def list_by_query(self, request: Request) -> JsonList:
        """The thread is the parameter `thread`. A signed user must take part in it; only admins read a deleted one."""
        request.author()
        thread_id = request.query_params.get("thread", "")
        if not thread_id:
            raise bad_request(THREAD_PARAMETER_MISSING)
        if not limits.ID_PATTERN.fullmatch(thread_id):
            raise bad_request(INVALID_THREAD_ID)
        page = read_page(request.query_params)
        await check_reader(self._store, request, thread_id)
        if request.principal.role is not Role.ADMIN and await self._store.thread_deleted(thread_id):
            raise not_found(THREAD_NOT_FOUND)
        return list_of_messages(self._store, thread_id, page)

    async def list_in_thread(self, request: Request) -> JsonList:
        """The author must take part in the thread, whether signed or not."""
        thread_id = request.id_from_path("thread", THREAD_NOT_FOUND)
        author = request.required_author()
        page = read_page(request.query_params)
        thread = await self._store.get_thread(thread_id)
        if thread.deleted:
            raise not_found(THREAD_NOT_FOUND)
        if thread.author != author:
            await check_takes_part(self._store, author, thread_id)
        return list_of_messages(self._store, thread_id, page)

    async def read(self, request: Request) -> Response:
        """The latest version, also of a deleted message."""
        thread_id = self._thread(request)
        if thread_id is None:
            request.author()
        else:
            request.required_author()
        message = await self._store.get_message(request.id_from_path("message", MESSAGE_NOT_FOUND), thread_id=thread_id)
        await check_message_reader(self._store, request, message)
        return json_response(message)

    async def update(self, request: Request) -> Response:
        """Append a version. The thread never changes."""
        message_id = request.id_from_path("message", MESSAGE_NOT_FOUND)
        thread_id = self._thread(request)
        sent = await _received(request)
        author = request.required_author(sent.author)
        if sent.body is None:
            raise bad_request(BODY_REQUIRED)
        message = await self._store.update_message(
            message_id,
            author=author,
            body=sent.body,
            role=sent.role or None,
            reply_to=sent.reply_to,
            thread_id=thread_id,
            request_id=request.request_id,
        )
        return json_response(message)

    async def delete(self, request: Request) -> Response:
        """Append a tombstone. An unsigned admin may delete any message."""
        message_id = request.id_from_path("message", MESSAGE_NOT_FOUND)
        thread_id = self._thread(request)
        author = request.required_author()
        acts_as = None if request.principal.role is Role.ADMIN and request.user is None else author
        await self._store.delete_message(message_id, author=acts_as, thread_id=thread_id, request_id=request.request_id)
        return NO_CONTENT

    async def versions(self, request: Request) -> Response:
        """Oldest first; an empty list for an unknown id."""
        request.author()
        message_id = request.path_params["message"]
        found = await self._store.message_versions(message_id) if limits.ID_PATTERN.fullmatch(message_id) else []
        if found:
            await check_message_reader(self._store, request, found[-1])
        return json_response({"id": message_id, "versions": found})

    def _thread(self, request: Request) -> str | None:
        """The thread in the path; None for a path without one."""
        return request.id_from_path("thread", MESSAGE_NOT_FOUND) if "thread" in request.path_params else None


class ReactionHandlers:
    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def _readable(self, request: Request) -> Message:
        """The message of the path, if the caller may read it. Raises ApiError 403, MessageNotFoundError."""
        request.author()
        message = await self._store.get_message(request.id_from_path("message", MESSAGE_NOT_FOUND))
        await check_message_reader(self._store, request, message)
        return message

    async def list(self, request: Request) -> Response:
        message = await self._readable(request)
        listed = [{"id": by, "reaction": value} for by, value in message.reactions.items()]
        return json_response({"id": message.id, "reactions": listed})

    async def set(self, request: Request) -> Response:
        """The identity is the body's `id` or else the header X-Identity. The response is the message."""
        sent = await request.json(_REACTION_DECODER)
        by = sent.id or head.header_text(request.headers.get(head.IDENTITY, b""), "X-Identity")
        if not by or not sent.reaction:
            raise bad_request(REACTION_INCOMPLETE)
        checked_identity(request, by)
        checked_reaction(sent.reaction)
        message = await self._readable(request)
        changed = await self._store.set_reaction(message.id, by, sent.reaction, request_id=request.request_id)
        return json_response(changed)

    async def remove(self, request: Request) -> Response:
        """Succeeds also if there is no such reaction."""
        by = checked_identity(request, request.path_params["identity"])
        message = await self._readable(request)
        await self._store.remove_reaction(message.id, by, request_id=request.request_id)
        return NO_CONTENT


# --- operations -------------------------------------------------------------------------------------------------
_REQUIRED_BODY: Final[Schema] = {"not": {"type": "null"}, "description": "Any JSON but null."}
_ID_OR_EMPTY: Final[Schema] = {"type": ["string", "null"], "pattern": "^[A-Za-z0-9._-]{0,128}$"}
_REACTIONS: Final[Schema] = {
    "type": ["object", "null"],
    "maxProperties": limits.REACTIONS_COUNT_MAX,
    "propertyNames": AUTHOR,
    "additionalProperties": text(limits.REACTION_BYTES_MAX),
}
_MESSAGE: Final[dict[str, Schema]] = {
    "thread": _ID_OR_EMPTY,
    "author": nullable(AUTHOR),
    "role": nullable(text(limits.ROLE_BYTES_MAX)),
    "body": _REQUIRED_BODY,
    "reply_to": _ID_OR_EMPTY,
    "reactions": _REACTIONS,
}
_NAMED_BY_PATH: Final[Schema] = {"type": ["string", "null"], "description": "Ignored: the path names the thread."}
_NOT_CHANGED: Final[Schema] = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}
_PAGE: Final = (
    Parameter("limit", {"type": "integer", "minimum": 0}, "Only the most recent so many; without it, all."),
    Parameter("before", ID, "A message id: only what was created before it."),
    Parameter("after", ID, "A message id: only what was created after it."),
    Parameter("include_deleted", SWITCH, "Deleted messages too."),
)
_PAGE_ERRORS: Final = (INVALID_LIMIT, _not_a_message_id("before"), _not_a_switch("include_deleted"))
_MESSAGE_ERRORS: Final = (AUTHOR_REQUIRED, BODY_REQUIRED, ROLE_TOO_LONG, INVALID_REPLY_TO)
_NEW_MESSAGE_ERRORS: Final = (*_MESSAGE_ERRORS, TOO_MANY_REACTIONS, REACTION_TOO_LONG, INVALID_IDEMPOTENCY_KEY)
_READ_ERRORS: Final = {403: (AUTHOR_NOT_IN_THREAD,), 404: (MESSAGE_NOT_FOUND,)}
_MESSAGE_LIST: Final = list_of("messages", ref("Message"), thread=ID)
_REACTION_LIST: Final = list_of("reactions", texts("id", "reaction"), id=ID)
_MESSAGE_ID: Final[dict[str, Schema]] = {"message": ID}


def operations(store: ConversationStore) -> tuple[Operation, ...]:
    """Messages by their id, and reactions."""
    messages, reactions = MessageHandlers(store), ReactionHandlers(store)
    return (
        Operation(
            "GET",
            "/v1/messages",
            messages.list_by_query,
            tag="messages",
            summary="The messages of a thread in order of creation, the latest version of each; those of a deleted "
            "thread for admins only",
            response=_MESSAGE_LIST,
            parameters=(Parameter("thread", ID, "The thread.", required=True), *CALLER, *_PAGE),
            errors={
                400: (THREAD_PARAMETER_MISSING, INVALID_THREAD_ID, *_PAGE_ERRORS),
                403: (AUTHOR_NOT_IN_THREAD,),
                404: (THREAD_NOT_FOUND, MESSAGE_NOT_FOUND),
            },
        ),
        Operation(
            "POST",
            "/v1/messages",
            messages.create,
            tag="messages",
            summary="Append a message; durable when answered. A thread is made where none is named or the "
            "named one is new",
            response=ref("Message"),
            body=JsonBody(MessageBody, _MESSAGE, ("body",)),
            parameters=(*CALLER, IDEMPOTENCY),
            errors={
                400: (*_NEW_MESSAGE_ERRORS, INVALID_THREAD_ID),
                403: (THREAD_DELETED, OTHER_AUTHOR_IN_BODY, OTHER_REACTION_ID),
                409: (IDEMPOTENCY_CONFLICT,),
            },
        ),
        *_one_message("/v1/messages/{message}", messages, _MESSAGE_ID),
        Operation(
            "GET",
            "/v1/messages/{message}/versions",
            messages.versions,
            tag="messages",
            summary="All versions of a message, oldest first; none for an unknown id",
            response=list_of("versions", ref("Message"), id=TEXT),
            parameters=CALLER,
            errors={403: (AUTHOR_NOT_IN_THREAD,)},
        ),
        Operation(
            "GET",
            "/v1/messages/{message}/reactions",
            reactions.list,
            tag="reactions",
            summary="The reactions to a message",
            response=_REACTION_LIST,
            parameters=CALLER,
            path_schemas=_MESSAGE_ID,
            errors=_READ_ERRORS,
        ),
        Operation(
            "POST",
            "/v1/messages/{message}/reactions",
            reactions.set,
            tag="reactions",
            summary="Set one identity's reaction; answers the message",
            response=ref("Message"),
            body=JsonBody(
                ReactionBody,
                {"id": nullable(AUTHOR), "reaction": {**text(limits.REACTION_BYTES_MAX), "minLength": 1}},
                ("reaction",),
            ),
            parameters=(
                *CALLER,
                Parameter("X-Identity", AUTHOR, "Whom the reaction is by, where the body does not say.", "header"),
            ),
            path_schemas=_MESSAGE_ID,
            errors={
                400: (REACTION_INCOMPLETE, REACTION_TOO_LONG),
                403: (OTHER_REACTION_ID, AUTHOR_NOT_IN_THREAD),
                404: (MESSAGE_NOT_FOUND,),
            },
        ),
        Operation(
            "DELETE",
            "/v1/messages/{message}/reactions/{identity}",
            reactions.remove,
            tag="reactions",
            summary="Remove one identity's reaction, also when there is none",
            status=204,
            parameters=CALLER,
            path_schemas={**_MESSAGE_ID, "identity": AUTHOR},
            errors={
                400: (AUTHOR_TOO_LONG,),
                403: (OTHER_REACTION_ID, AUTHOR_NOT_IN_THREAD),
                404: (MESSAGE_NOT_FOUND,),
            },
        ),
    )


def thread_operations(store: ConversationStore) -> tuple[Operation, ...]:
    """Messages within a thread that the path names."""
    messages = MessageHandlers(store)
    return (
        Operation(
            "GET",
            THREAD_MESSAGES,
            messages.list_in_thread,
            tag="messages",
            summary="The messages of this thread, for those who take part in it",
            response=_MESSAGE_LIST,
            parameters=(*CALLER, *_PAGE),
            path_schemas={"thread": ID},
            errors={
                400: (AUTHOR_REQUIRED, *_PAGE_ERRORS),
                403: (AUTHOR_NOT_IN_THREAD,),
                404: (THREAD_NOT_FOUND, MESSAGE_NOT_FOUND),
            },
        ),
        Operation(
            "POST",
            THREAD_MESSAGES,
            messages.create_in_thread,
            tag="messages",
            summary="Append a message to this thread; durable when answered",
            response=ref("Message"),
            body=JsonBody(MessageBody, {**_MESSAGE, "thread": _NAMED_BY_PATH}, ("body",)),
            parameters=(*CALLER, IDEMPOTENCY),
            path_schemas={"thread": ID},
            errors={
                400: _NEW_MESSAGE_ERRORS,
                403: (THREAD_DELETED, OTHER_AUTHOR_IN_BODY, OTHER_REACTION_ID),
                404: (THREAD_NOT_FOUND,),
                409: (IDEMPOTENCY_CONFLICT,),
            },
        ),
        *_one_message(f"{THREAD_MESSAGES}/{{message}}", messages, {"thread": ID, **_MESSAGE_ID}),
    )


def _one_message(path: str, messages: MessageHandlers, path_schemas: dict[str, Schema]) -> tuple[Operation, ...]:
    return (
        Operation(
            "GET",
            path,
            messages.read,
            tag="messages",
            summary="The latest version of a message, also of a deleted one",
            response=ref("Message"),
            parameters=CALLER,
            path_schemas=path_schemas,
            errors={400: (AUTHOR_REQUIRED,) if "thread" in path_schemas else (), **_READ_ERRORS},
        ),
        Operation(
            "PUT",
            path,
            messages.update,
            tag="messages",
            summary="Append a version of a message",
            response=ref("Message"),
            body=JsonBody(MessageBody, {**_MESSAGE, "thread": _NAMED_BY_PATH, "reactions": _NOT_CHANGED}, ("body",)),
            parameters=CALLER,
            path_schemas=path_schemas,
            errors={400: _MESSAGE_ERRORS, 403: (OTHER_AUTHOR_IN_BODY, NOT_THE_AUTHOR), 404: (MESSAGE_NOT_FOUND,)},
        ),
        Operation(
            "DELETE",
            path,
            messages.delete,
            tag="messages",
            summary="Append a tombstone; an unsigned admin may delete anybody's message",
            status=204,
            parameters=CALLER,
            path_schemas=path_schemas,
            errors={400: (AUTHOR_REQUIRED,), 403: (NOT_THE_AUTHOR,), 404: (MESSAGE_NOT_FOUND,)},
        ),
    )
