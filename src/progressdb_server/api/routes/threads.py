"""Threads: create, list, read, rename, delete, and their members.

Owns: the JSON of a thread and of its members as clients send it, and who may see and change a thread. Invariants: only
the author of a thread reads, renames or deletes it; only that author, a backend and an admin see and change its
members; a deleted thread does not exist for anyone but an admin.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from progressdb_server.api.http import limits
from progressdb_server.api.http.errors import (
    AUTHOR_REQUIRED,
    INVALID_IDEMPOTENCY_KEY,
    OTHER_AUTHOR_IN_BODY,
    bad_request,
    forbidden,
    not_found,
)
from progressdb_server.api.http.keys import Role, checked_author
from progressdb_server.api.http.request import Request
from progressdb_server.api.http.response import NO_CONTENT, JsonList, Response, json_response
from progressdb_server.api.openapi.description import (
    AUTHOR,
    CALLER,
    ID,
    IDEMPOTENCY,
    TEXT,
    JsonBody,
    Parameter,
    Schema,
    list_of,
    nullable,
    ref,
    text,
)
from progressdb_server.api.routes.errors import (
    IDEMPOTENCY_CONFLICT,
    MEMBER_IS_AUTHOR,
    NO_ROOM_TO_REMOVE,
    NOT_THE_AUTHOR,
    THREAD_KEY_DESTROYED,
    THREAD_NOT_FOUND,
    TOO_MANY_MEMBERS,
)
from progressdb_server.api.routes.table import Operation
from progressdb_server.store.model import ConversationStore, json_decoder

TITLE_TOO_LONG: Final = "title too long"
TITLE_REQUIRED: Final = "title is required"
SLUG_TOO_LONG: Final = "slug too long"
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


async def _received(request: Request) -> ThreadBody:
    """The thread within its bounds. Raises ApiError 400, 413."""
    sent = await request.json(_DECODER)
    if sent.title and len(sent.title.encode()) > limits.TITLE_BYTES_MAX:
        raise bad_request(TITLE_TOO_LONG)
    return sent


def _checked_members(request: Request, given: object) -> list[str]:
    """The members that a new thread begins with. Raises ApiError 400."""
    if given is None or request.acting_user is not None:
        return []
    if not isinstance(given, list) or not all(isinstance(member, str) for member in given):
        raise bad_request(INVALID_MEMBERS)
    return checked_members(given)


def checked_members(members: list[str]) -> list[str]:
    """Raises ApiError 400 for too many, and for one that is no author."""
    if len(members) > limits.NAMED_MEMBERS_COUNT_MAX or not all(members):
        raise bad_request(INVALID_MEMBERS)
    return [checked_author(member) for member in members]


class ThreadHandlers:
    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def create(self, request: Request) -> Response:
        sent = await _received(request)
        author = request.required_author(sent.author)
        thread = await self._store.create_thread(
            author=author,
            title=sent.title or "",
            members=_checked_members(request, sent.members),
            idempotency=request.idempotency(author),
            request_id=request.request_id,
        )
        return json_response(thread)

    async def list(self, request: Request) -> JsonList:
        """The threads of the author. `title` is part of a title, in any case; `slug` is a whole slug."""
        author = request.required_author()
        title, slug = request.query_params.get("title") or None, request.query_params.get("slug") or None
        if title is not None and len(title.encode()) > limits.TITLE_BYTES_MAX:
            raise bad_request(TITLE_TOO_LONG)
        if slug is not None and len(slug.encode()) > limits.SLUG_BYTES_MAX:
            raise bad_request(SLUG_TOO_LONG)
        return JsonList(b'{"threads":[', self._store.list_threads(author=author, title=title, slug=slug))

    async def read(self, request: Request) -> Response:
        thread_id = request.id_from_path("thread", THREAD_NOT_FOUND)
        author = request.required_author()
        thread = await self._store.get_thread(thread_id)
        if thread.deleted and request.caller.role is not Role.ADMIN:
            raise not_found(THREAD_NOT_FOUND)
        if thread.author != author:
            raise forbidden(NOT_THE_AUTHOR)
        return json_response(thread)

    async def update(self, request: Request) -> Response:
        """Change the title, which makes a new slug."""
        thread_id = request.id_from_path("thread", THREAD_NOT_FOUND)
        sent = await _received(request)
        author = request.required_author(sent.author)
        if sent.title is None:
            raise bad_request(TITLE_REQUIRED)
        thread = await self._store.update_thread(
            thread_id, author=author, title=sent.title, request_id=request.request_id
        )
        return json_response(thread)

    async def delete(self, request: Request) -> Response:
        thread_id = request.id_from_path("thread", THREAD_NOT_FOUND)
        author = request.required_author()
        await self._store.delete_thread(thread_id, author=author, by=author, request_id=request.request_id)
        return NO_CONTENT

    # --- members --------------------------------------------------------------------------------------------------
    async def _administered(self, request: Request) -> str:
        """The thread of the path, if the caller may see and change its members. Raises ApiError 403, 404."""
        thread_id = request.id_from_path("thread", THREAD_NOT_FOUND)
        request.author()
        thread = await self._store.get_thread(thread_id)
        if thread.deleted:
            raise not_found(THREAD_NOT_FOUND)
        if request.acting_user is not None and request.acting_user != thread.author:
            raise forbidden(NOT_THE_AUTHOR)
        return thread_id

    async def _members(self, thread_id: str) -> Response:
        return json_response({"thread": thread_id, "members": await self._store.members(thread_id)})

    async def list_members(self, request: Request) -> Response:
        return await self._members(await self._administered(request))

    async def add_members(self, request: Request) -> Response:
        """Also members who were removed. The response is the list of all members."""
        sent = await request.json(_MEMBERS_DECODER)
        members = checked_members(sent.members)
        thread_id = await self._administered(request)
        await self._store.add_members(thread_id, members)
        return await self._members(thread_id)

    async def remove_member(self, request: Request) -> Response:
        """Succeeds also for somebody who is no member."""
        member = request.query_params.get("member", "")
        if not member:
            raise bad_request(MEMBER_MISSING)
        checked_author(member)
        await self._store.remove_member(await self._administered(request), member)
        return NO_CONTENT


# --- operations -------------------------------------------------------------------------------------------------
_FIELDS: Final[dict[str, Schema]] = {"title": nullable(text(limits.TITLE_BYTES_MAX)), "author": nullable(AUTHOR)}
_MEMBERS: Final[Schema] = {
    "type": "array",
    "maxItems": limits.NAMED_MEMBERS_COUNT_MAX,
    "items": {**AUTHOR, "minLength": 1},
}
_MEMBER_LIST: Final = list_of("members", TEXT, thread=ID)
_THREAD_ID: Final[dict[str, Schema]] = {"thread": ID}
THREAD_MEMBERS: Final = "/v1/threads/{thread}/members"
THREAD_LIST: Final = list_of("threads", ref("Thread"))


def operations(store: ConversationStore) -> tuple[Operation, ...]:
    threads = ThreadHandlers(store)
    return (
        Operation(
            "GET",
            "/v1/threads",
            threads.list,
            tag="threads",
            summary="List the author's threads",
            response=THREAD_LIST,
            parameters=(
                *CALLER,
                Parameter(
                    "title",
                    text(limits.TITLE_BYTES_MAX),
                    "Only threads whose title contains this text; upper and lower case are equal.",
                ),
                Parameter("slug", text(limits.SLUG_BYTES_MAX), "Only threads with this slug."),
            ),
            errors={400: (AUTHOR_REQUIRED, TITLE_TOO_LONG, SLUG_TOO_LONG)},
        ),
        Operation(
            "POST",
            "/v1/threads",
            threads.create,
            tag="threads",
            summary="Create a thread",
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
            parameters=(*CALLER, IDEMPOTENCY),
            errors={
                400: (AUTHOR_REQUIRED, TITLE_TOO_LONG, INVALID_MEMBERS, INVALID_IDEMPOTENCY_KEY),
                403: (OTHER_AUTHOR_IN_BODY,),
                409: (IDEMPOTENCY_CONFLICT,),
            },
        ),
        Operation(
            "GET",
            "/v1/threads/{thread}",
            threads.read,
            tag="threads",
            summary="Read a thread of the author. Only an admin key reads a deleted thread",
            response=ref("Thread"),
            parameters=CALLER,
            path_schemas=_THREAD_ID,
            errors={400: (AUTHOR_REQUIRED,), 403: (NOT_THE_AUTHOR,), 404: (THREAD_NOT_FOUND,)},
        ),
        Operation(
            "PUT",
            "/v1/threads/{thread}",
            threads.update,
            tag="threads",
            summary="Change a thread's title, and with it the slug",
            response=ref("Thread"),
            body=JsonBody(
                ThreadBody,
                {**_FIELDS, "title": text(limits.TITLE_BYTES_MAX), "members": {"description": "Ignored."}},
                ("title",),
            ),
            parameters=CALLER,
            path_schemas=_THREAD_ID,
            errors={
                400: (AUTHOR_REQUIRED, TITLE_REQUIRED, TITLE_TOO_LONG),
                403: (OTHER_AUTHOR_IN_BODY, NOT_THE_AUTHOR),
                404: (THREAD_NOT_FOUND,),
                409: (THREAD_KEY_DESTROYED,),
            },
        ),
        Operation(
            "DELETE",
            "/v1/threads/{thread}",
            threads.delete,
            tag="threads",
            summary="Mark a thread as deleted",
            status=204,
            parameters=CALLER,
            path_schemas=_THREAD_ID,
            errors={
                400: (AUTHOR_REQUIRED,),
                403: (NOT_THE_AUTHOR,),
                404: (THREAD_NOT_FOUND,),
                409: (THREAD_KEY_DESTROYED,),
            },
        ),
        Operation(
            "GET",
            THREAD_MEMBERS,
            threads.list_members,
            tag="threads",
            summary="The members of a thread, its author included; for its author, backends and admins",
            response=_MEMBER_LIST,
            parameters=CALLER,
            path_schemas=_THREAD_ID,
            errors={403: (NOT_THE_AUTHOR,), 404: (THREAD_NOT_FOUND,)},
        ),
        Operation(
            "POST",
            THREAD_MEMBERS,
            threads.add_members,
            tag="threads",
            summary="Add members to a thread, also removed ones again; answers all members",
            response=_MEMBER_LIST,
            body=JsonBody(MembersBody, {"members": _MEMBERS}),
            parameters=CALLER,
            path_schemas=_THREAD_ID,
            errors={
                400: (INVALID_MEMBERS,),
                403: (NOT_THE_AUTHOR,),
                404: (THREAD_NOT_FOUND,),
                409: (TOO_MANY_MEMBERS,),
            },
        ),
        Operation(
            "DELETE",
            THREAD_MEMBERS,
            threads.remove_member,
            tag="threads",
            summary="Remove somebody, member or not, who then can't post or read until added again",
            status=204,
            parameters=(
                *CALLER,
                Parameter("member", {**AUTHOR, "minLength": 1}, "Whom to remove.", required=True),
            ),
            path_schemas=_THREAD_ID,
            errors={
                400: (MEMBER_MISSING,),
                403: (NOT_THE_AUTHOR,),
                404: (THREAD_NOT_FOUND,),
                409: (MEMBER_IS_AUTHOR, NO_ROOM_TO_REMOVE),
            },
        ),
    )
