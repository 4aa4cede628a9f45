"""Threads: create, list, read, rename, delete. Every operation here acts for an author.

Owns: the JSON of a thread as clients send it, and who may see and change a thread. Invariants: only the author of a
thread reads, renames or deletes it; a deleted thread does not exist for anyone but an admin.
"""

from __future__ import annotations

from typing import Final

import msgspec

from progressdb_server.api.http import limits
from progressdb_server.api.http.access import Role
from progressdb_server.api.http.errors import (
    AUTHOR_REQUIRED,
    INVALID_IDEMPOTENCY_KEY,
    OTHER_AUTHOR_IN_BODY,
    bad_request,
    forbidden,
    not_found,
)
from progressdb_server.api.http.request import Request
from progressdb_server.api.http.response import NO_CONTENT, JsonList, Response, json_response
from progressdb_server.api.openapi.description import (
    AUTHOR,
    CALLER,
    ID,
    IDEMPOTENCY,
    JsonBody,
    Parameter,
    Schema,
    list_of,
    nullable,
    ref,
    text,
)
from progressdb_server.api.routes.errors import IDEMPOTENCY_CONFLICT, NOT_THE_AUTHOR, THREAD_NOT_FOUND
from progressdb_server.api.routes.table import Operation
from progressdb_server.store.model import ConversationStore

TITLE_TOO_LONG: Final = "title too long"
TITLE_REQUIRED: Final = "title is required"
SLUG_TOO_LONG: Final = "slug too long"


class ThreadBody(msgspec.Struct):
    """A thread from a client. `id`, `slug`, times and unknown fields are ignored; null counts as absent."""

    title: str | None = None
    author: str | None = None


_DECODER: Final = msgspec.json.Decoder(ThreadBody)


async def _received(request: Request) -> ThreadBody:
    """The thread within its bounds. Raises ApiError 400, 413."""
    sent = await request.json(_DECODER)
    if sent.title and len(sent.title.encode()) > limits.TITLE_BYTES_MAX:
        raise bad_request(TITLE_TOO_LONG)
    return sent


class ThreadHandlers:
    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def create(self, request: Request) -> Response:
        sent = await _received(request)
        author = request.required_author(sent.author)
        thread = await self._store.create_thread(
            author=author,
            title=sent.title or "",
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
        if thread.deleted and request.principal.role is not Role.ADMIN:
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


# --- operations -------------------------------------------------------------------------------------------------
_FIELDS: Final[dict[str, Schema]] = {"title": nullable(text(limits.TITLE_BYTES_MAX)), "author": nullable(AUTHOR)}
_THREAD_ID: Final[dict[str, Schema]] = {"thread": ID}
THREAD_LIST: Final = list_of("threads", ref("Thread"))


def operations(store: ConversationStore) -> tuple[Operation, ...]:
    threads = ThreadHandlers(store)
    return (
        Operation(
            "GET",
            "/v1/threads",
            threads.list,
            tag="threads",
            summary="The author's own threads",
            response=THREAD_LIST,
            parameters=(
                *CALLER,
                Parameter("title", text(limits.TITLE_BYTES_MAX), "Part of the title, in any case."),
                Parameter("slug", text(limits.SLUG_BYTES_MAX), "The whole slug."),
            ),
            errors={400: (AUTHOR_REQUIRED, TITLE_TOO_LONG, SLUG_TOO_LONG)},
        ),
        Operation(
            "POST",
            "/v1/threads",
            threads.create,
            tag="threads",
            summary="Make a thread",
            response=ref("Thread"),
            body=JsonBody(ThreadBody, _FIELDS),
            parameters=(*CALLER, IDEMPOTENCY),
            errors={
                400: (AUTHOR_REQUIRED, TITLE_TOO_LONG, INVALID_IDEMPOTENCY_KEY),
                403: (OTHER_AUTHOR_IN_BODY,),
                409: (IDEMPOTENCY_CONFLICT,),
            },
        ),
        Operation(
            "GET",
            "/v1/threads/{thread}",
            threads.read,
            tag="threads",
            summary="A thread of the author; a deleted one for admins only",
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
            summary="Rename a thread, which makes a new slug",
            response=ref("Thread"),
            body=JsonBody(ThreadBody, {**_FIELDS, "title": text(limits.TITLE_BYTES_MAX)}, ("title",)),
            parameters=CALLER,
            path_schemas=_THREAD_ID,
            errors={
                400: (AUTHOR_REQUIRED, TITLE_REQUIRED, TITLE_TOO_LONG),
                403: (OTHER_AUTHOR_IN_BODY, NOT_THE_AUTHOR),
                404: (THREAD_NOT_FOUND,),
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
            errors={400: (AUTHOR_REQUIRED,), 403: (NOT_THE_AUTHOR,), 404: (THREAD_NOT_FOUND,)},
        ),
    )
