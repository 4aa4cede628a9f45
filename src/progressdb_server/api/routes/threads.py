"""Threads: create, list, read, rename, delete, and their members.

Owns: the JSON of a thread and of its members as clients send it, and who may see and change a thread. Invariants: only
the author of a thread reads, renames or deletes it; only that author, a backend and an admin see and change its
members; a deleted thread does not exist for anyone but an admin.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from progressdb_server.api.gate import limits
from progressdb_server.api.gate.errors import (
    AUTHOR_REQUIRED,
    bad_request,
)
from progressdb_server.api.gate.keys import Role, checked_author
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import NO_CONTENT, ApiResponse, JsonList, json_response
from progressdb_server.api.openapi.description import (
    AUTHOR,
    ID,
    IDEMPOTENCY,
    TEXT,
    JsonBody,
    Operation,
    Parameter,
    Schema,
    list_of,
    nullable,
    ref,
    text,
)
from progressdb_server.api.routes.paging import Paging
from progressdb_server.conversations.whole import Conversations
from progressdb_server.store.model import (
    MemberIsAuthorError,
    NoRoomToRemoveError,
    NotTheAuthorError,
    ThreadKeyDestroyedError,
    ThreadNotFoundError,
    TooManyMembersError,
    json_decoder,
)

TITLE_TOO_LONG: Final = f"title too long: at most {limits.TITLE_BYTES_MAX} bytes"
TITLE_REQUIRED: Final = "title is required"
SLUG_TOO_LONG: Final = f"slug too long: at most {limits.SLUG_BYTES_MAX} bytes"
INVALID_MEMBERS: Final = f"members must be a list of at most {limits.NAMED_MEMBERS_COUNT_MAX} names, none of them empty"
MEMBER_MISSING: Final = "missing member query parameter"


class ThreadBody(msgspec.Struct):
    """A thread from a client. `id`, `slug`, times and unknown fields are ignored; null counts as absent."""

    title: str | None = None
    author: str | None = None
    members: Any = None
    """A list of names. It counts for a backend or admin key when a thread is created, and is ignored otherwise."""


class MembersBody(msgspec.Struct):
    """Members from a client."""

    members: list[str]


_DECODER: Final = json_decoder(ThreadBody)
_MEMBERS_DECODER: Final = msgspec.json.Decoder(MembersBody)


async def _received(request: ApiRequest) -> ThreadBody:
    """The thread within its bounds. Raises ApiError 400, 413."""
    sent = await request.json(_DECODER)
    if sent.title and len(sent.title.encode()) > limits.TITLE_BYTES_MAX:
        raise bad_request(TITLE_TOO_LONG)
    return sent


def _checked_members(request: ApiRequest, members: object) -> list[str]:
    """The members that a new thread begins with. Raises ApiError 400."""
    if members is None or request.acting_user is not None:
        return []
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise bad_request(INVALID_MEMBERS)
    return checked_members(members)


def checked_members(members: list[str]) -> list[str]:
    """Checks the members: not too many, and each an author. Raises ApiError 400."""
    if len(members) > limits.NAMED_MEMBERS_COUNT_MAX or not all(members):
        raise bad_request(INVALID_MEMBERS)
    return [checked_author(member) for member in members]


# --- operations -------------------------------------------------------------------------------------------------------
_FIELDS: Final[dict[str, Schema]] = {"title": nullable(text(limits.TITLE_BYTES_MAX)), "author": nullable(AUTHOR)}
_MEMBERS: Final[Schema] = {
    "type": "array",
    "maxItems": limits.NAMED_MEMBERS_COUNT_MAX,
    "items": {**AUTHOR, "minLength": 1},
}
_MEMBER_LIST: Final = list_of("members", TEXT, thread=ID)
THREAD: Final = "/v1/threads/{thread}"
THREAD_MEMBERS: Final = "/v1/threads/{thread}/members"
_CHANGE_RAISES: Final = (AUTHOR_REQUIRED, NotTheAuthorError, ThreadNotFoundError, ThreadKeyDestroyedError)
THREADS: Final = Paging(
    "threads", "before", "older", re.compile(r"[0-9]{20}-[0-9]{6}:" + limits.ID_PATTERN.pattern, re.ASCII)
)


class ThreadHandlers:
    def __init__(self, store: Conversations) -> None:
        self._store = store

    @Operation(
        "POST",
        "/v1/threads",
        response=ref("Thread"),
        body=JsonBody(
            ThreadBody,
            {
                **_FIELDS,
                "members": {
                    **nullable(_MEMBERS),
                    "description": "Members beside the author. Ignored unless a backend or admin key sends it.",
                },
            },
        ),
        parameters=(IDEMPOTENCY,),
        raises=(AUTHOR_REQUIRED, TITLE_TOO_LONG, INVALID_MEMBERS),
    )
    async def create(self, request: ApiRequest) -> ApiResponse:
        """Create a thread."""
        sent = await _received(request)
        author = request.required_author(sent.author)
        thread = await self._store.threads.create(
            author=author,
            title=sent.title or "",
            members=_checked_members(request, sent.members),
            idempotency=request.idempotency(author),
            request_id=request.request_id,
        )
        return json_response(thread)

    @Operation(
        "GET",
        "/v1/threads",
        response=THREADS.response(ref("Thread")),
        parameters=(
            Parameter(
                "title",
                text(limits.TITLE_BYTES_MAX),
                "Only threads whose title contains this text; upper and lower case are equal.",
            ),
            Parameter("slug", text(limits.SLUG_BYTES_MAX), "Only threads with this slug."),
            *THREADS.parameters,
        ),
        raises=(AUTHOR_REQUIRED, TITLE_TOO_LONG, SLUG_TOO_LONG, *THREADS.errors),
    )
    async def list(self, request: ApiRequest) -> JsonList:
        """List the author's threads, in order of creation; pages begin with the newest."""
        author = request.required_author()
        title, slug = request.query_params.get("title") or None, request.query_params.get("slug") or None
        if title is not None and len(title.encode()) > limits.TITLE_BYTES_MAX:
            raise bad_request(TITLE_TOO_LONG)
        if slug is not None and len(slug.encode()) > limits.SLUG_BYTES_MAX:
            raise bad_request(SLUG_TOO_LONG)
        page = THREADS.read(request.query_params)
        return THREADS.list(self._store.threads.list_threads(author=author, title=title, slug=slug, page=page), page)

    @Operation("GET", THREAD, response=ref("Thread"), raises=(AUTHOR_REQUIRED, NotTheAuthorError, ThreadNotFoundError))
    async def read(self, request: ApiRequest) -> ApiResponse:
        """Read a thread of the author. Only an admin key reads a deleted thread."""
        thread_id = request.id_from_path("thread", ThreadNotFoundError)
        author = request.required_author()
        thread = await self._store.threads.get(thread_id)
        if thread.deleted and request.caller.role is not Role.ADMIN:
            raise ThreadNotFoundError
        if thread.author != author:
            raise NotTheAuthorError
        return json_response(thread)

    @Operation(
        "PUT",
        THREAD,
        response=ref("Thread"),
        body=JsonBody(
            ThreadBody,
            {**_FIELDS, "title": text(limits.TITLE_BYTES_MAX), "members": {"description": "Ignored."}},
            ("title",),
        ),
        raises=(TITLE_REQUIRED, TITLE_TOO_LONG, *_CHANGE_RAISES),
    )
    async def update(self, request: ApiRequest) -> ApiResponse:
        """Change a thread's title, and with it the slug."""
        thread_id = request.id_from_path("thread", ThreadNotFoundError)
        sent = await _received(request)
        author = request.required_author(sent.author)
        if sent.title is None:
            raise bad_request(TITLE_REQUIRED)
        thread = await self._store.threads.update(
            thread_id, author=author, title=sent.title, request_id=request.request_id
        )
        return json_response(thread)

    @Operation("DELETE", THREAD, status=204, raises=_CHANGE_RAISES)
    async def delete(self, request: ApiRequest) -> ApiResponse:
        """Mark a thread as deleted."""
        thread_id = request.id_from_path("thread", ThreadNotFoundError)
        author = request.required_author()
        await self._store.threads.delete(thread_id, author=author, by=author, request_id=request.request_id)
        return NO_CONTENT

    # --- members --------------------------------------------------------------------------------------------------
    async def _administered(self, request: ApiRequest) -> str:
        """The thread of the path, if the caller may see and change its members. Raises ApiError 403, 404."""
        thread_id = request.id_from_path("thread", ThreadNotFoundError)
        request.author()
        thread = await self._store.threads.get(thread_id)
        if thread.deleted:
            raise ThreadNotFoundError
        if request.acting_user is not None and request.acting_user != thread.author:
            raise NotTheAuthorError
        return thread_id

    async def _members(self, thread_id: str) -> ApiResponse:
        return json_response({"thread": thread_id, "members": await self._store.members.of_thread(thread_id)})

    @Operation("GET", THREAD_MEMBERS, response=_MEMBER_LIST, raises=(NotTheAuthorError, ThreadNotFoundError))
    async def list_members(self, request: ApiRequest) -> ApiResponse:
        """The members of a thread, its author included; for its author, backends and admins."""
        return await self._members(await self._administered(request))

    @Operation(
        "POST",
        THREAD_MEMBERS,
        response=_MEMBER_LIST,
        body=JsonBody(MembersBody, {"members": _MEMBERS}),
        raises=(INVALID_MEMBERS, NotTheAuthorError, ThreadNotFoundError, TooManyMembersError),
    )
    async def add_members(self, request: ApiRequest) -> ApiResponse:
        """Add members to a thread, also removed ones again; answers all members."""
        sent = await request.json(_MEMBERS_DECODER)
        members = checked_members(sent.members)
        thread_id = await self._administered(request)
        await self._store.members.add(thread_id, members)
        return await self._members(thread_id)

    @Operation(
        "DELETE",
        THREAD_MEMBERS,
        status=204,
        parameters=(Parameter("member", {**AUTHOR, "minLength": 1}, "Whom to remove.", required=True),),
        raises=(MEMBER_MISSING, NotTheAuthorError, ThreadNotFoundError, MemberIsAuthorError, NoRoomToRemoveError),
    )
    async def remove_member(self, request: ApiRequest) -> ApiResponse:
        """Remove somebody, member or not, who then can't post or read until added again."""
        member = request.query_params.get("member", "")
        if not member:
            raise bad_request(MEMBER_MISSING)
        checked_author(member)
        await self._store.members.remove(await self._administered(request), member)
        return NO_CONTENT
