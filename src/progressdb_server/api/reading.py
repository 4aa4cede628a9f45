"""Who may read a thread, and which part of its list a request asks for.

Owns: the rule that a signed user reads only where it takes part, and the query of a list of messages. Invariant: a
malformed limit, cursor or switch is a 400, never a default.
"""

from __future__ import annotations

from typing import Final

import msgspec

from progressdb_server.api import answer, bounds
from progressdb_server.api.answer import JsonList
from progressdb_server.api.call import Call
from progressdb_server.api.errors import bad_request, forbidden
from progressdb_server.store.model import ConversationStore, Message

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
    if value is not None and not bounds.ID_PATTERN.fullmatch(value):
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
    return JsonList(b'{"thread":' + answer.json_text(thread_id) + b',"messages":[', chunks)
