"""Threads: create, list, read, rename, delete. Every route here acts for an author.

Owns: what a thread may look like coming in, and who may see and change one. Invariants: only a thread's author reads,
renames or deletes it; a deleted thread is unknown to everybody but an admin.
"""

from __future__ import annotations

from typing import Final

import msgspec

from progressdb_server.api.http import limits, response
from progressdb_server.api.http.access import Role
from progressdb_server.api.http.errors import bad_request, forbidden, not_found
from progressdb_server.api.http.request import Call
from progressdb_server.api.http.response import Answer, JsonList
from progressdb_server.store.model import ConversationStore


class ThreadBody(msgspec.Struct):
    """`id`, `slug`, times and unknown fields are ignored; null counts as absent."""

    title: str | None = None
    author: str | None = None


_BODY: Final = msgspec.json.Decoder(ThreadBody)
_UNKNOWN: Final = "thread not found"


async def _received(call: Call) -> ThreadBody:
    sent = await call.json(_BODY)
    if sent.title and len(sent.title.encode()) > limits.TITLE_BYTES_MAX:
        raise bad_request("title too long")
    return sent


class ThreadRoutes:
    def __init__(self, store: ConversationStore) -> None:
        self._store = store

    async def create(self, call: Call) -> Answer:
        sent = await _received(call)
        author = call.required_author(sent.author)
        thread = await self._store.create_thread(
            author=author,
            title=sent.title or "",
            idempotency=call.idempotency(author),
            request_id=call.request_id,
        )
        return response.json(thread)

    async def list(self, call: Call) -> JsonList:
        """The author's own; `title` is part of a title in any case, `slug` the whole of one."""
        author = call.required_author()
        title, slug = call.query.get("title") or None, call.query.get("slug") or None
        if title is not None and len(title.encode()) > limits.TITLE_BYTES_MAX:
            raise bad_request("title too long")
        if slug is not None and len(slug.encode()) > limits.SLUG_BYTES_MAX:
            raise bad_request("slug too long")
        return JsonList(b'{"threads":[', self._store.list_threads(author=author, title=title, slug=slug))

    async def read(self, call: Call) -> Answer:
        thread_id = call.id_from_path("thread", _UNKNOWN)
        author = call.required_author()
        thread = await self._store.get_thread(thread_id)
        if thread.deleted and call.principal.role is not Role.ADMIN:
            raise not_found(_UNKNOWN)
        if thread.author != author:
            raise forbidden("author does not match")
        return response.json(thread)

    async def update(self, call: Call) -> Answer:
        """The title only, which makes a new slug."""
        thread_id = call.id_from_path("thread", _UNKNOWN)
        sent = await _received(call)
        author = call.required_author(sent.author)
        if sent.title is None:
            raise bad_request("title is required")
        thread = await self._store.update_thread(thread_id, author=author, title=sent.title, request_id=call.request_id)
        return response.json(thread)

    async def delete(self, call: Call) -> Answer:
        thread_id = call.id_from_path("thread", _UNKNOWN)
        author = call.required_author()
        await self._store.delete_thread(thread_id, author=author, by=author, request_id=call.request_id)
        return response.NO_CONTENT
