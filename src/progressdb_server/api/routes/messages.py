"""Messages and reactions: their own routes, and messages within a thread.

Owns: the JSON of messages and reactions as clients send it, who may read a message, and who may change one. Invariants:
- Ids and times are never taken from a client. Within a thread's routes, the path names the thread and not the body.
- A signed user reads and writes only in threads of which it is a member (`conversations.membership`). With a front-end
  key it reacts only as itself; a backend or admin key acts for anyone.
- A deleted message keeps its thread and author. Every change, also of a reaction, appends a version.
- Lists show a message or version that can't be read with the code of the reason, and go on.
- A malformed limit, cursor or switch is a 400, never a default.
"""

from __future__ import annotations

from collections.abc import Coroutine
from functools import partial
from typing import Any, Final

import msgspec

from progressdb_server.api.gate import head, limits
from progressdb_server.api.gate.errors import (
    AUTHOR_REQUIRED,
    AUTHOR_TOO_LONG,
    ApiError,
    bad_request,
    forbidden,
    not_found,
    too_large,
)
from progressdb_server.api.gate.keys import Role, checked_author
from progressdb_server.api.gate.request import ApiRequest, decode_json
from progressdb_server.api.gate.response import (
    NO_CONTENT,
    AnyResponse,
    ApiResponse,
    JsonList,
    encode_json,
    json_response,
)
from progressdb_server.api.openapi.description import (
    AUTHOR,
    ID,
    IDEMPOTENCY,
    SWITCH,
    TEXT,
    JsonBody,
    Operation,
    Parameter,
    Schema,
    list_of,
    nullable,
    ref,
    text,
    texts,
)
from progressdb_server.api.routes.paging import INVALID_LIMIT, read_limit
from progressdb_server.api.routes.table import THREAD_MESSAGES
from progressdb_server.conversations.whole import Conversations
from progressdb_server.http.asgi import Header
from progressdb_server.http.limits import REQUEST_BYTES_MAX
from progressdb_server.store.model import (
    RECORD_MISSING,
    AmbiguousTimeError,
    AuthorNotInThreadError,
    InvalidThreadIdError,
    Message,
    MessageNotFoundError,
    MessageRange,
    NewMessage,
    NotAMemberError,
    NotTheAuthorError,
    ThreadDeletedError,
    ThreadKeyDestroyedError,
    ThreadNotFoundError,
    TooManyMembersError,
    TooManyReactionsError,
    TooManyVersionsError,
    json_decoder,
)

BODY_REQUIRED: Final = "body is required"
ROLE_TOO_LONG: Final = f"role too long: at most {limits.ROLE_BYTES_MAX} bytes"
INVALID_REPLY_TO: Final = "reply_to is not a message id"
INVALID_VERSION: Final = "before must be the ts of a version, or the older of a page of versions"
THREAD_PARAMETER_MISSING: Final = "missing thread query parameter"
OTHER_REACTION_ID: Final = "author mismatch between signature and reaction id"
REACTION_INCOMPLETE: Final = "missing id or reaction"
REACTION_TOO_LONG: Final = f"reaction too long: at most {limits.REACTION_BYTES_MAX} bytes"

_REVALIDATED: Final = (b"cache-control", b"private, no-cache")
"""A list is for one caller, and no cache gives it away without asking whether the caller may still read it."""


# --- who may read -----------------------------------------------------------------------------------------------
async def check_reader(store: Conversations, request: ApiRequest, thread_id: str) -> None:
    """Checks that a signed user is a member of the thread. Raises AuthorNotInThreadError or NotAMemberError.

    An unsigned backend or admin reads anything.
    """
    if request.user is not None:
        await store.members.check_reader(thread_id, request.user)


async def check_message(store: Conversations, request: ApiRequest, message: Message) -> None:
    """Checks the reader of a message that is asked for by its id, like `check_reader`. Raises MessageNotFoundError too,
    if its thread is deleted and no admin asks.
    """
    await check_reader(store, request, message.thread)
    if request.caller.role is not Role.ADMIN and await store.threads.is_deleted(message.thread):
        raise MessageNotFoundError


# --- lists ------------------------------------------------------------------------------------------------------
def read_range(query: dict[str, str]) -> MessageRange:
    """Reads `limit`, `before`, `after`, `include_deleted`. Raises ApiError 400."""
    return MessageRange(
        limit=read_limit(query),
        before=_cursor(query, "before"),
        after=_cursor(query, "after"),
        include_deleted=_switch(query, "include_deleted"),
    )


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


async def list_of_messages(
    store: Conversations, request: ApiRequest, thread_id: str, page: MessageRange
) -> AnyResponse:
    """`{"thread", "messages": []}`, in the order of creation; 304 if the caller has this list, as `If-None-Match` says.
    The caller may read the thread."""
    tag = await store.reading.list_tag(thread_id, page)
    headers: tuple[Header, ...] = ((b"etag", b'W/"%b"' % tag.encode()), _REVALIDATED)
    held = request.headers.get(head.IF_NONE_MATCH)
    if held is not None and head.names_tag(held, tag.encode()) and await store.reading.list_unchanged(thread_id, tag):
        return ApiResponse(304, content_type=None, headers=headers)
    chunks = store.reading.messages(thread_id, range_=page, tag=tag)
    return JsonList(b'{"thread":' + encode_json(thread_id) + b',"messages":[', chunks, headers=headers)


# --- what clients send ------------------------------------------------------------------------------------------
class MessageBody(msgspec.Struct):
    """A message from a client. `id`, `ts`, `deleted` and unknown fields are ignored; null counts as absent."""

    thread: str | None = None
    author: str | None = None
    role: str | None = None
    body: Any = None
    reply_to: str | None = None
    reactions: dict[str, str] | None = None


_MESSAGE_DECODER: Final = json_decoder(MessageBody)
_UNCHECKED_BYTES_MAX: Final = REQUEST_BYTES_MAX // 4
"""The store writes the JSON of a body again. JSON grows less than fourfold by that (`1e15,` becomes
`1000000000000000.0,`), so that the length of a shorter body needs no check.
"""


class ReactionBody(msgspec.Struct):
    """A reaction from a client."""

    id: str | None = None
    reaction: str | None = None


_REACTION_DECODER: Final = msgspec.json.Decoder(ReactionBody)


async def _received(request: ApiRequest) -> MessageBody:
    """The message within its bounds. Raises ApiError 400, 413."""
    raw = request.received_body()
    if raw is None:
        raw = await request.body()
    sent = decode_json(raw, _MESSAGE_DECODER)
    if sent.role and len(sent.role.encode()) > limits.ROLE_BYTES_MAX:
        raise bad_request(ROLE_TOO_LONG)
    if sent.reply_to and not limits.ID_PATTERN.fullmatch(sent.reply_to):
        raise bad_request(INVALID_REPLY_TO)
    if len(raw) > _UNCHECKED_BYTES_MAX and len(encode_json(sent.body)) > REQUEST_BYTES_MAX:
        raise too_large()
    return sent


def checked_identity(request: ApiRequest, identity: str) -> str:
    """The identity that reacts. Raises ApiError 403 if a front-end key's user reacts as another, 400 if it cannot be
    stored."""
    if request.acting_user is not None and identity != request.acting_user:
        raise forbidden(OTHER_REACTION_ID)
    return checked_author(identity)


def checked_reaction(reaction: str) -> str:
    if len(reaction.encode()) > limits.REACTION_BYTES_MAX:
        raise bad_request(REACTION_TOO_LONG)
    return reaction


def _reactions(request: ApiRequest, sent: MessageBody) -> dict[str, str]:
    """The reactions of a new message, without those that lack an identity or a value. The bounds hold for all.

    Raises ApiError 400, 403.
    """
    if not sent.reactions:
        return {}
    if len(sent.reactions) > limits.REACTIONS_COUNT_MAX:
        raise bad_request(TooManyReactionsError.text)
    for by, value in sent.reactions.items():
        checked_reaction(value)
        if by:
            checked_identity(request, by)
    return {by: value for by, value in sent.reactions.items() if by and value}


# --- operations -------------------------------------------------------------------------------------------------------
_REQUIRED_BODY: Final[Schema] = {
    "not": {"type": "null"},
    "description": f"Any JSON value except null, of at most {REQUEST_BYTES_MAX} bytes as the server encodes it.",
}
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
_NAMED_BY_PATH: Final[Schema] = {"type": ["string", "null"], "description": "Ignored. The path names the thread."}
_NOT_CHANGED: Final[Schema] = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}
_LIMIT: Final = Parameter(
    "limit", {"type": "integer", "minimum": 0}, "How many of the most recent messages; without it, all."
)
_PAGE: Final = (
    _LIMIT,
    Parameter("before", ID, "A message id. Only messages created before that message."),
    Parameter("after", ID, "A message id. Only messages created after that message."),
    Parameter("include_deleted", SWITCH, "Include deleted messages."),
)
_LIST_HEADERS: Final = (
    Parameter(
        "ETag",
        {"type": "string"},
        "For `If-None-Match`. It counts until the server is restarted.",
        "header",
        required=True,
    ),
)
_HELD: Final = Parameter(
    "If-None-Match",
    {"type": "string"},
    "The `ETag` of an earlier response to the same request. If the list has not changed, the response is 304.",
    "header",
)
_PAGE_ERRORS: Final = (INVALID_LIMIT, _not_a_message_id("before"), _not_a_switch("include_deleted"))
_MESSAGE_ERRORS: Final = (AUTHOR_REQUIRED, BODY_REQUIRED, ROLE_TOO_LONG, INVALID_REPLY_TO)
_READER: Final = (AuthorNotInThreadError, NotAMemberError)
"""The errors of a caller who may not read the thread."""
_MESSAGE_LIST: Final = list_of("messages", ref("Message"), thread=ID)
_VERSION: Final[Schema] = {"type": "string", "pattern": f"^{limits.VERSION_PATTERN.pattern}$"}
_VERSION_LIST: Final = list_of("versions", ref("Message"), id=TEXT)
_VERSION_LIST["properties"]["older"] = {
    **_VERSION,
    "description": "With `limit`, if there are older versions: `before` of the next page.",
}
_REACTION_LIST: Final = list_of("reactions", texts("id", "reaction"), id=ID)

MESSAGE: Final = "/v1/messages/{message}"
MESSAGE_IN_THREAD: Final = f"{THREAD_MESSAGES}/{{message}}"
_create: Final = partial(
    Operation,
    "POST",
    response=ref("Message"),
    parameters=(IDEMPOTENCY,),
    errors={403: (OTHER_REACTION_ID,)},
)
_POST_RAISES: Final = (ThreadDeletedError, NotAMemberError, TooManyMembersError, ThreadKeyDestroyedError)
_CREATE_RAISES: Final = (*_MESSAGE_ERRORS, TooManyReactionsError.text, REACTION_TOO_LONG, *_POST_RAISES)
_READ_RAISES: Final = (*_READER, MessageNotFoundError)
_REACT_RAISES: Final = (*_READ_RAISES, ThreadKeyDestroyedError)
_LIST_RAISES: Final = (*_PAGE_ERRORS, *_READ_RAISES, ThreadNotFoundError)
_read: Final = partial(Operation, "GET", response=ref("Message"), raises=_READ_RAISES)
_list: Final = partial(Operation, "GET", response=_MESSAGE_LIST, other_responses={304: None}, headers=_LIST_HEADERS)
_CHANGE_RAISES: Final = (NotTheAuthorError, NotAMemberError, MessageNotFoundError, ThreadKeyDestroyedError)
_update: Final = partial(
    Operation,
    "PUT",
    response=ref("Message"),
    body=JsonBody(MessageBody, {**_MESSAGE, "thread": _NAMED_BY_PATH, "reactions": _NOT_CHANGED}, ("body",)),
    raises=(*_MESSAGE_ERRORS, TooManyVersionsError, *_CHANGE_RAISES),
)
_delete: Final = partial(Operation, "DELETE", status=204, raises=(AUTHOR_REQUIRED, *_CHANGE_RAISES))


# --- handlers ---------------------------------------------------------------------------------------------------
class MessageHandlers:
    """Each handler takes a request that access control has authorized."""

    def __init__(self, store: Conversations) -> None:
        self._store = store

    @_create(
        "/v1/messages",
        body=JsonBody(MessageBody, _MESSAGE, ("body",)),
        raises=(InvalidThreadIdError, *_CREATE_RAISES),
    )
    async def create(self, request: ApiRequest) -> ApiResponse:
        """Append a message. It is durable before the response. Without `thread`, or with an unknown thread id, this
        creates the thread. A signed user must be a member of a thread that exists."""
        return await self._create(request, in_thread=False)

    @_create(
        THREAD_MESSAGES,
        body=JsonBody(MessageBody, {**_MESSAGE, "thread": _NAMED_BY_PATH}, ("body",)),
        raises=(ThreadNotFoundError, *_CREATE_RAISES),
    )
    def create_in_thread(self, request: ApiRequest) -> Coroutine[Any, Any, ApiResponse]:
        """Append a message to a thread. It is durable before the response. A signed user must be a member."""
        return self._create(request, in_thread=True)

    async def _create(self, request: ApiRequest, *, in_thread: bool) -> ApiResponse:
        sent = await _received(request)
        thread_id = request.id_from_path("thread", ThreadNotFoundError) if in_thread else sent.thread or ""
        author = request.required_author(sent.author)
        if not in_thread and thread_id and not limits.ID_PATTERN.fullmatch(thread_id):
            raise InvalidThreadIdError
        if sent.body is None:
            raise bad_request(BODY_REQUIRED)
        new = NewMessage(
            author=author,
            thread=thread_id,
            role=sent.role or "user",
            body=sent.body,
            reply_to=sent.reply_to or "",
            reactions=_reactions(request, sent),
            as_member=request.acting_user is not None,
        )
        message = await self._store.messages.create(
            new, idempotency=request.idempotency(author), request_id=request.request_id
        )
        return json_response(message)

    @_list(
        "/v1/messages",
        parameters=(Parameter("thread", ID, "The thread.", required=True), *_PAGE, _HELD),
        raises=(THREAD_PARAMETER_MISSING, InvalidThreadIdError, *_LIST_RAISES),
    )
    async def list_by_query(self, request: ApiRequest) -> AnyResponse:
        """List the latest version of each message of a thread, in order of creation. Only an admin key lists a deleted
        thread."""
        request.author()
        thread_id = request.query_params.get("thread", "")
        if not thread_id:
            raise bad_request(THREAD_PARAMETER_MISSING)
        if not limits.ID_PATTERN.fullmatch(thread_id):
            raise InvalidThreadIdError
        page = read_range(request.query_params)
        await check_reader(self._store, request, thread_id)
        if request.caller.role is not Role.ADMIN and await self._store.threads.is_deleted(thread_id):
            raise ThreadNotFoundError
        return await list_of_messages(self._store, request, thread_id, page)

    @_list(
        THREAD_MESSAGES,
        parameters=(*_PAGE, _HELD),
        raises=(AUTHOR_REQUIRED, *_LIST_RAISES),
    )
    async def list_in_thread(self, request: ApiRequest) -> AnyResponse:
        """List the messages of a thread. The author must own the thread or have written in it."""
        thread_id = request.id_from_path("thread", ThreadNotFoundError)
        author = request.required_author()
        page = read_range(request.query_params)
        (thread,) = await self._store.threads.listed([thread_id], opened=False)
        if thread.deleted or thread.error == RECORD_MISSING:
            raise ThreadNotFoundError
        await self._store.members.check_reader(thread_id, author)
        return await list_of_messages(self._store, request, thread_id, page)

    @_read(MESSAGE)
    @_read(MESSAGE_IN_THREAD, raises=(AUTHOR_REQUIRED, *_READ_RAISES))
    async def read(self, request: ApiRequest) -> ApiResponse:
        """Read the latest version of a message, even if it is deleted. Only an admin key reads in a deleted thread."""
        thread_id = self._thread(request)
        if thread_id is None:
            request.author()
        else:
            request.required_author()
        message = await self._store.reading.message(
            request.id_from_path("message", MessageNotFoundError), thread_id=thread_id
        )
        await check_message(self._store, request, message)
        return json_response(message)

    @_update(MESSAGE)
    @_update(MESSAGE_IN_THREAD)
    async def update(self, request: ApiRequest) -> ApiResponse:
        """Change a message: append a new version."""
        message_id = request.id_from_path("message", MessageNotFoundError)
        thread_id = self._thread(request)
        sent = await _received(request)
        author = request.required_author(sent.author)
        if sent.body is None:
            raise bad_request(BODY_REQUIRED)
        message = await self._store.messages.update(
            message_id,
            author=author,
            body=sent.body,
            role=sent.role or None,
            reply_to=sent.reply_to,
            thread_id=thread_id,
            member=request.acting_user,
            request_id=request.request_id,
        )
        return json_response(message)

    @_delete(MESSAGE)
    @_delete(MESSAGE_IN_THREAD)
    async def delete(self, request: ApiRequest) -> ApiResponse:
        """Delete a message: append a tombstone. An admin key without a signed user deletes any message."""
        message_id = request.id_from_path("message", MessageNotFoundError)
        thread_id = self._thread(request)
        author = request.required_author()
        acts_as = None if request.caller.role is Role.ADMIN and request.user is None else author
        await self._store.messages.delete(
            message_id, author=acts_as, thread_id=thread_id, member=request.acting_user, request_id=request.request_id
        )
        return NO_CONTENT

    @Operation(
        "GET",
        f"{MESSAGE}/versions",
        response=_VERSION_LIST,
        path_schemas={"message": {"type": "string", "minLength": 1}},
        parameters=(
            _LIMIT,
            Parameter(
                "before", _VERSION, "Only versions before this one: `older` of a page, or a `ts` that one version has."
            ),
        ),
        raises=(INVALID_LIMIT, INVALID_VERSION, AmbiguousTimeError, *_READER),
    )
    async def versions(self, request: ApiRequest) -> AnyResponse:
        """List the versions of a message, oldest first. The list is empty for an unknown id, and unless an admin key
        asks in a deleted thread."""
        request.author()
        limit, before = read_limit(request.query_params), request.query_params.get("before")
        if before is not None and not limits.VERSION_PATTERN.fullmatch(before):
            raise bad_request(INVALID_VERSION)
        message_id = request.path_params["message"]
        try:
            latest = await self._store.reading.latest_version(request.id_from_path("message", MessageNotFoundError))
            await check_message(self._store, request, latest)
        except (ApiError, MessageNotFoundError):
            return json_response({"id": message_id, "versions": []})
        listed = await self._store.reading.versions(message_id, limit=limit, before=before)
        older = {"older": listed.older} if listed.older else {}
        return JsonList(b'{"id":' + encode_json(message_id) + b',"versions":[', listed.chunks, lambda: older)

    def _thread(self, request: ApiRequest) -> str | None:
        """The thread in the path; None for a path without one."""
        return request.id_from_path("thread", MessageNotFoundError) if "thread" in request.path_params else None


class ReactionHandlers:
    def __init__(self, store: Conversations) -> None:
        self._store = store

    @Operation("GET", f"{MESSAGE}/reactions", response=_REACTION_LIST, raises=_READ_RAISES)
    async def list(self, request: ApiRequest) -> ApiResponse:
        """List the reactions to a message."""
        request.author()
        message = await self._store.reading.message(request.id_from_path("message", MessageNotFoundError))
        await check_message(self._store, request, message)
        listed = [{"id": by, "reaction": value} for by, value in message.reactions.items()]
        return json_response({"id": message.id, "reactions": listed})

    @Operation(
        "POST",
        f"{MESSAGE}/reactions",
        response=ref("Message"),
        body=JsonBody(
            ReactionBody,
            {"id": nullable(AUTHOR), "reaction": {**text(limits.REACTION_BYTES_MAX), "minLength": 1}},
            ("reaction",),
        ),
        parameters=(Parameter("X-Identity", AUTHOR, "The identity that reacts, if the body has no `id`.", "header"),),
        errors={403: (OTHER_REACTION_ID,)},
        raises=(REACTION_INCOMPLETE, REACTION_TOO_LONG, *_REACT_RAISES, TooManyVersionsError, TooManyReactionsError),
    )
    async def set(self, request: ApiRequest) -> ApiResponse:
        """Set the reaction of one identity. The response is the message; for a signed user who may not read it, without
        a body and other reactions."""
        sent = await request.json(_REACTION_DECODER)
        by = sent.id or head.header_text(request.headers.get(head.IDENTITY, b""), "X-Identity")
        if not by or not sent.reaction:
            raise bad_request(REACTION_INCOMPLETE)
        checked_identity(request, by)
        checked_reaction(sent.reaction)
        request.author()
        changed = await self._store.messages.set_reaction(
            request.id_from_path("message", MessageNotFoundError),
            by,
            sent.reaction,
            member=request.acting_user,
            request_id=request.request_id,
        )
        try:
            await check_reader(self._store, request, changed.thread)
        except (AuthorNotInThreadError, NotAMemberError):
            changed = Message(changed.id, changed.thread, changed.author, ts=changed.ts, reactions={by: sent.reaction})
        return json_response(changed)

    @Operation(
        "DELETE",
        f"{MESSAGE}/reactions/{{identity:path}}",
        status=204,
        path_schemas={"identity": {**AUTHOR, "minLength": 1}},
        errors={403: (OTHER_REACTION_ID,)},
        raises=(AUTHOR_TOO_LONG, *_REACT_RAISES),
    )
    async def remove(self, request: ApiRequest) -> ApiResponse:
        """Remove the reaction of one identity. Succeeds if there is none."""
        identity = request.path_params["identity"]
        if not identity:
            raise not_found()
        by = checked_identity(request, identity)
        request.author()
        await self._store.messages.remove_reaction(
            request.id_from_path("message", MessageNotFoundError),
            by,
            member=request.acting_user,
            request_id=request.request_id,
        )
        return NO_CONTENT
