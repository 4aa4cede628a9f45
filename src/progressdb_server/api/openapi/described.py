"""What each operation of the API is, for people and programs: the half of the OpenAPI document that no code can say.

Owns: one `Described` for each entry of the table of routes: what it does, takes, answers, and how it refuses.
Invariants: an operation of the table without its description is an error (see `api.openapi`), and a test finds a
description without its operation; bounds come from `api.bounds`, shapes from the structs that the handlers decode.
Every sentence of a refusal is one that the code sends. It must never hold what follows from the table: roles, or the
checks that every request passes.
"""

from __future__ import annotations

from typing import Final

from progressdb_server.api.http import limits
from progressdb_server.api.http.errors import THREAD_ID_REFUSAL
from progressdb_server.api.openapi.description import (
    AUTHOR,
    DISK,
    ID,
    NOTHING,
    STORED_KEY,
    Described,
    Parameter,
    Schema,
    Taken,
    listed,
    nullable,
    ref,
    text,
    texts,
)
from progressdb_server.api.routes.admin import SignBody
from progressdb_server.api.routes.messages import MessageBody, ReactionBody
from progressdb_server.api.routes.threads import ThreadBody

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
_NEW_MESSAGE: Final = Taken(MessageBody, _MESSAGE, ("body",))
_NEW_MESSAGE_IN_THREAD: Final = Taken(MessageBody, {**_MESSAGE, "thread": _NAMED_BY_PATH}, ("body",))
_CHANGED_MESSAGE: Final = Taken(
    MessageBody, {**_MESSAGE, "thread": _NAMED_BY_PATH, "reactions": _NOT_CHANGED}, ("body",)
)
_THREAD_FIELDS: Final[dict[str, Schema]] = {
    "title": nullable(text(limits.TITLE_BYTES_MAX)),
    "author": nullable(AUTHOR),
}

_USER_ID: Final = Parameter("X-User-ID", AUTHOR, "The user that the call acts for.", "header")
_AUTHOR_IN_QUERY: Final = Parameter("author", AUTHOR, "The author that the call acts for.")
_CALLER: Final = (_USER_ID, _AUTHOR_IN_QUERY)
_IDEMPOTENCY: Final = Parameter(
    "Idempotency-Key",
    {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "The same key gives the first answer again, for 24 hours; of one API key and author.",
    "header",
)
_IDENTITY: Final = Parameter("X-Identity", AUTHOR, "Whom the reaction is by, where the body does not say.", "header")
_SWITCH: Final[Schema] = {"type": "string", "enum": ["true", "false", "1", "0"]}
_PAGE: Final = (
    Parameter("limit", {"type": "integer", "minimum": 0}, "Only the most recent so many; without it, all."),
    Parameter("before", ID, "A message id: only what was created before it."),
    Parameter("after", ID, "A message id: only what was created after it."),
    Parameter("include_deleted", _SWITCH, "Deleted messages too."),
)
_PAGE_REFUSALS: Final = (
    "limit must be a whole number that is not negative",
    "before must be a message id",
    "include_deleted must be true or false",
)
_NO_AUTHOR: Final = "author required for backend requests"
_NO_BODY: Final = "body is required"
_NOT_IN_THREAD: Final = "author not found in any message in this thread"
_NOT_THE_AUTHOR: Final = "author does not match"
_NO_MESSAGE: Final = "message not found"
_NO_THREAD: Final = "thread not found"
_OTHER_BODY_AUTHOR: Final = "author mismatch between signature and body author"
_OTHER_REACTION: Final = "author mismatch between signature and reaction id"
_REPEATED_KEY: Final = "this Idempotency-Key was used before with another request"
_BAD_REACTION: Final = ("missing id or reaction", "reaction too long")
_BAD_MESSAGE: Final = (_NO_AUTHOR, _NO_BODY, "role too long", "reply_to is not a message id")
_BAD_NEW: Final = (
    *_BAD_MESSAGE,
    "too many reactions",
    "the Idempotency-Key must be 1 to 255 visible ASCII characters",
)
_MESSAGE_LIST: Final = listed("messages", ref("Message"), thread=ID)
_THREAD_LIST: Final = listed("threads", ref("Thread"))
_REACTION_LIST: Final = listed("reactions", texts("id", "reaction"), id=ID)

_MESSAGE_ID: Final[dict[str, Schema]] = {"message": ID}
_THREAD_ID: Final[dict[str, Schema]] = {"thread": ID}
_BOTH_IDS: Final = {**_THREAD_ID, **_MESSAGE_ID}
_FORBIDDEN_IN_THREAD: Final = {403: (_NOT_IN_THREAD,), 404: (_NO_MESSAGE,)}


def _read_message(paths: dict[str, Schema]) -> Described:
    return Described(
        tag="messages",
        summary="The latest version of a message, also of a deleted one",
        answer=ref("Message"),
        parameters=_CALLER,
        path_schemas=paths,
        refusals={400: (_NO_AUTHOR,) if "thread" in paths else (), **_FORBIDDEN_IN_THREAD},
    )


def _update_message(paths: dict[str, Schema]) -> Described:
    return Described(
        tag="messages",
        summary="Append a version of a message",
        answer=ref("Message"),
        body=_CHANGED_MESSAGE,
        parameters=_CALLER,
        path_schemas=paths,
        refusals={400: _BAD_MESSAGE, 403: (_OTHER_BODY_AUTHOR, _NOT_THE_AUTHOR), 404: (_NO_MESSAGE,)},
    )


def _delete_message(paths: dict[str, Schema]) -> Described:
    return Described(
        tag="messages",
        summary="Append a tombstone; an unsigned admin may delete anybody's message",
        status=204,
        parameters=_CALLER,
        path_schemas=paths,
        refusals={400: (_NO_AUTHOR,), 403: (_NOT_THE_AUTHOR,), 404: (_NO_MESSAGE,)},
    )


DESCRIBED: Final[dict[str, Described]] = {
    "GET /healthz": Described(
        tag="operators", summary="That the server answers; needs no key", answer=texts("status"), needs=NOTHING
    ),
    "POST /v1/_sign": Described(
        tag="users",
        summary="A signature of a user id under the caller's own backend key",
        answer=texts("userId", "signature"),
        body=Taken(SignBody, {"userId": {**AUTHOR, "minLength": 1}}),
        refusals={400: ("invalid payload",)},
        needs=NOTHING,
    ),
    "POST /v1/messages": Described(
        tag="messages",
        summary="Append a message; durable when answered. A thread is made where none is named or the named one is new",
        answer=ref("Message"),
        body=_NEW_MESSAGE,
        parameters=(*_CALLER, _IDEMPOTENCY),
        refusals={
            400: (*_BAD_NEW, THREAD_ID_REFUSAL),
            403: ("thread deleted", _OTHER_BODY_AUTHOR, _OTHER_REACTION),
            409: (_REPEATED_KEY,),
        },
    ),
    "GET /v1/messages": Described(
        tag="messages",
        summary="The messages of a thread in order of creation, the latest version of each",
        answer=_MESSAGE_LIST,
        parameters=(Parameter("thread", ID, "The thread.", required=True), *_CALLER, *_PAGE),
        refusals={
            400: ("missing thread query parameter", THREAD_ID_REFUSAL, *_PAGE_REFUSALS),
            403: (_NOT_IN_THREAD,),
            404: (_NO_MESSAGE,),
        },
    ),
    "GET /v1/messages/{message}": _read_message(_MESSAGE_ID),
    "PUT /v1/messages/{message}": _update_message(_MESSAGE_ID),
    "DELETE /v1/messages/{message}": _delete_message(_MESSAGE_ID),
    "GET /v1/messages/{message}/versions": Described(
        tag="messages",
        summary="All versions of a message, oldest first; none for an unknown id",
        answer=listed("versions", ref("Message"), id={"type": "string"}),
        parameters=_CALLER,
        refusals={403: (_NOT_IN_THREAD,)},
    ),
    "GET /v1/messages/{message}/reactions": Described(
        tag="reactions",
        summary="The reactions to a message",
        answer=_REACTION_LIST,
        parameters=_CALLER,
        path_schemas=_MESSAGE_ID,
        refusals=_FORBIDDEN_IN_THREAD,
    ),
    "POST /v1/messages/{message}/reactions": Described(
        tag="reactions",
        summary="Set one identity's reaction; answers the message",
        answer=ref("Message"),
        body=Taken(
            ReactionBody,
            {"id": nullable(AUTHOR), "reaction": {**text(limits.REACTION_BYTES_MAX), "minLength": 1}},
            ("reaction",),
        ),
        parameters=(*_CALLER, _IDENTITY),
        path_schemas=_MESSAGE_ID,
        refusals={400: _BAD_REACTION, 403: (_OTHER_REACTION, _NOT_IN_THREAD), 404: (_NO_MESSAGE,)},
    ),
    "DELETE /v1/messages/{message}/reactions/{identity}": Described(
        tag="reactions",
        summary="Remove one identity's reaction, also when there is none",
        status=204,
        parameters=_CALLER,
        path_schemas={**_MESSAGE_ID, "identity": AUTHOR},
        refusals={400: ("author too long",), 403: (_OTHER_REACTION, _NOT_IN_THREAD), 404: (_NO_MESSAGE,)},
    ),
    "POST /v1/threads": Described(
        tag="threads",
        summary="Make a thread",
        answer=ref("Thread"),
        body=Taken(ThreadBody, _THREAD_FIELDS),
        parameters=(*_CALLER, _IDEMPOTENCY),
        refusals={
            400: (_NO_AUTHOR, "title too long", "the Idempotency-Key must be 1 to 255 visible ASCII characters"),
            403: (_OTHER_BODY_AUTHOR,),
            409: (_REPEATED_KEY,),
        },
    ),
    "GET /v1/threads": Described(
        tag="threads",
        summary="The author's own threads",
        answer=_THREAD_LIST,
        parameters=(
            *_CALLER,
            Parameter("title", text(limits.TITLE_BYTES_MAX), "Part of the title, in any case."),
            Parameter("slug", text(limits.SLUG_BYTES_MAX), "The whole slug."),
        ),
        refusals={400: (_NO_AUTHOR, "title too long", "slug too long")},
    ),
    "GET /v1/threads/{thread}": Described(
        tag="threads",
        summary="A thread of the author; a deleted one for admins only",
        answer=ref("Thread"),
        parameters=_CALLER,
        path_schemas=_THREAD_ID,
        refusals={400: (_NO_AUTHOR,), 403: (_NOT_THE_AUTHOR,), 404: (_NO_THREAD,)},
    ),
    "PUT /v1/threads/{thread}": Described(
        tag="threads",
        summary="Rename a thread, which makes a new slug",
        answer=ref("Thread"),
        body=Taken(ThreadBody, {**_THREAD_FIELDS, "title": text(limits.TITLE_BYTES_MAX)}, ("title",)),
        parameters=_CALLER,
        path_schemas=_THREAD_ID,
        refusals={
            400: (_NO_AUTHOR, "title is required", "title too long"),
            403: (_OTHER_BODY_AUTHOR, _NOT_THE_AUTHOR),
            404: (_NO_THREAD,),
        },
    ),
    "DELETE /v1/threads/{thread}": Described(
        tag="threads",
        summary="Mark a thread as deleted",
        status=204,
        parameters=_CALLER,
        path_schemas=_THREAD_ID,
        refusals={400: (_NO_AUTHOR,), 403: (_NOT_THE_AUTHOR,), 404: (_NO_THREAD,)},
    ),
    "POST /v1/threads/{thread}/messages": Described(
        tag="messages",
        summary="Append a message to this thread; durable when answered",
        answer=ref("Message"),
        body=_NEW_MESSAGE_IN_THREAD,
        parameters=(*_CALLER, _IDEMPOTENCY),
        path_schemas=_THREAD_ID,
        refusals={
            400: _BAD_NEW,
            403: ("thread deleted", _OTHER_BODY_AUTHOR, _OTHER_REACTION),
            404: (_NO_THREAD,),
            409: (_REPEATED_KEY,),
        },
    ),
    "GET /v1/threads/{thread}/messages": Described(
        tag="messages",
        summary="The messages of this thread, for those who take part in it",
        answer=_MESSAGE_LIST,
        parameters=(*_CALLER, *_PAGE),
        path_schemas=_THREAD_ID,
        refusals={400: (_NO_AUTHOR, *_PAGE_REFUSALS), 403: (_NOT_IN_THREAD,), 404: (_NO_THREAD, _NO_MESSAGE)},
    ),
    "GET /v1/threads/{thread}/messages/{message}": _read_message(_BOTH_IDS),
    "PUT /v1/threads/{thread}/messages/{message}": _update_message(_BOTH_IDS),
    "DELETE /v1/threads/{thread}/messages/{message}": _delete_message(_BOTH_IDS),
    "GET /admin/health": Described(
        tag="operators", summary="That the server answers", answer=texts("status", "service"), needs=NOTHING
    ),
    "GET /admin/stats": Described(
        tag="operators",
        summary="How many threads there are, and messages with each stored version counted",
        answer={
            "type": "object",
            "properties": {"threads": {"type": "integer"}, "messages": {"type": "integer"}},
            "required": ["threads", "messages"],
        },
        needs=NOTHING,
    ),
    "GET /admin/threads": Described(
        tag="operators", summary="Everybody's threads, deleted ones too", answer=_THREAD_LIST
    ),
    "GET /admin/keys": Described(
        tag="operators",
        summary="Stored keys",
        answer=listed("keys", {"type": "string"}),
        parameters=(Parameter("prefix", STORED_KEY, "What the keys begin with."),),
        refusals={400: ("prefix too long",)},
        needs=DISK,
    ),
    "GET /admin/keys/{key}": Described(
        tag="operators",
        summary="One raw value as it is stored, encrypted",
        answer={"type": "string", "format": "binary"},
        content="application/octet-stream",
        path_schemas={"key": {"type": "string", "minLength": 1}},
        refusals={404: ("key not found",)},
        needs=DISK,
    ),
    "GET /metrics": Described(
        tag="operators",
        summary="Metrics in the text format of Prometheus (docs/metrics.md)",
        answer={"type": "string"},
        content="text/plain",
        needs=NOTHING,
    ),
    "GET /openapi.yaml": Described(
        tag="documentation",
        summary="This document",
        answer={"type": "object"},
        content="application/yaml",
        needs=NOTHING,
    ),
    "GET /docs": Described(tag="documentation", summary="To /docs/", status=308, needs=NOTHING),
    "GET /docs/": Described(
        tag="documentation",
        summary="This document as a page",
        answer={"type": "string"},
        content="text/html",
        needs=NOTHING,
    ),
    "GET /docs/style.css": Described(
        tag="documentation",
        summary="The page's style",
        answer={"type": "string"},
        content="text/css",
        needs=NOTHING,
    ),
}
