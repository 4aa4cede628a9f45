"""What each operation of the viewer is: as `api.described`, of the routes in `api.viewer.routes`.

Owns: their descriptions. The invariants are those of `api.described`.
"""

from __future__ import annotations

from typing import Final

from progressdb_server.api.http import limits
from progressdb_server.api.openapi.description import (
    AUTHOR,
    BOTH,
    DISK,
    ID,
    KEY_SERVICE,
    NOTHING,
    Described,
    Parameter,
    Part,
    Schema,
    text,
)

_PAGE: Final[Schema] = {"type": "string"}
_CURSOR: Final[Schema] = {"type": "string", "maxLength": 1024}


def _shown(
    summary: str,
    *,
    parameters: tuple[Parameter, ...] = (),
    missing: tuple[str, ...] = (),
    paths: dict[str, Schema] | None = None,
    wrong: tuple[str, ...] = (),
    needs: frozenset[Part] = BOTH,
) -> Described:
    return Described(
        tag="viewer",
        summary=summary,
        answer=_PAGE,
        content="text/html",
        parameters=parameters,
        path_schemas=paths or {},
        answers={303: None},
        refusals={404: missing, 400: wrong},
        needs=needs,
    )


def _posted(summary: str, refusals: dict[int, tuple[str, ...]], *fields: str) -> Described:
    return Described(
        tag="viewer",
        summary=summary,
        status=303,
        form={
            "type": "object",
            "properties": {name: {"type": "string", "maxLength": 1000} for name in fields},
            "required": [name for name in fields if name != "username"],
            "additionalProperties": False,
        },
        refusals={413: ("request body too large",), 400: ("the form has a field that is not known",), **refusals},
        needs=NOTHING,
    )


VIEWER_DESCRIBED: Final[dict[str, Described]] = {
    "GET /viewer": Described(tag="viewer", summary="To /viewer/", status=308, needs=NOTHING),
    "GET /viewer/": _shown(
        "Threads, newest first, by id and author",
        parameters=(
            Parameter("q", text(limits.STORED_KEY_BYTES_MAX), "The beginning of a thread's id, or a message's id."),
            Parameter("author", AUTHOR, "The author of the threads."),
            Parameter("cursor", _CURSOR, "From the page before."),
        ),
        missing=("message not found",),
        wrong=("what you search for is too long",),
    ),
    "GET /viewer/threads/{thread}": _shown(
        "A conversation with the protection of each message",
        parameters=(
            Parameter("before", ID, "A message id: the page of messages before it."),
            Parameter("after", ID, "A message id: the page of messages after it."),
        ),
        missing=("thread not found", "message not found"),
        paths={"thread": ID},
        wrong=("before and after exclude each other",),
    ),
    "GET /viewer/messages/{message}": _shown(
        "A message with its versions", missing=("message not found",), paths={"message": ID}
    ),
    "GET /viewer/jobs": _shown(
        "Jobs and their progress",
        parameters=(Parameter("part", {"type": "string"}, "`rows`: the table alone."),),
        needs=DISK,
    ),
    "GET /viewer/status": _shown("What the key service says of itself", needs=KEY_SERVICE),
    "GET /viewer/login": Described(tag="viewer", summary="The login", answer=_PAGE, content="text/html", needs=NOTHING),
    "POST /viewer/login": _posted(
        "Log in with an admin key; begins a session",
        {
            401: ("This is not an admin key.",),
            403: ("This form was too old; please log in again.",),
            429: ("Too many attempts from this address; wait a little.",),
        },
        "csrf",
        "key",
        "username",
    ),
    "POST /viewer/logout": _posted(
        "Log out; ends the session", {403: ("this form was not made for this session",)}, "csrf"
    ),
    "GET /viewer/style.css": Described(
        tag="viewer", summary="The pages' style", answer=_PAGE, content="text/css", needs=NOTHING
    ),
    "GET /viewer/viewer.js": Described(
        tag="viewer", summary="The script of the page of jobs", answer=_PAGE, content="text/javascript", needs=NOTHING
    ),
}
