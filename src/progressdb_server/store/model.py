"""What the routes ask of the store: models, errors and the store protocol.

Invariants: authors, ids and timestamps are the only fields a store may keep in plaintext. Errors say what happened in
a sentence for the client; the routes map each class to a status and add nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec


class Message(msgspec.Struct, omit_defaults=True):
    """One version of a message. `ts` is Unix nanoseconds of this version."""

    id: str
    thread: str
    author: str
    role: str = ""
    ts: int = 0
    body: Any = None
    reply_to: str = ""
    deleted: bool = False
    reactions: dict[str, str] = {}


class Thread(msgspec.Struct, omit_defaults=True):
    id: str
    title: str = ""
    author: str = ""
    slug: str = ""
    created_ts: int = 0
    updated_ts: int = 0
    deleted: bool = False
    deleted_ts: int = 0


class StoreError(Exception):
    """Base of the tree; never raised itself."""


class MessageNotFoundError(StoreError):
    """404 `message not found`."""


class ThreadNotFoundError(StoreError):
    """404 `thread not found`."""


class ThreadDeletedError(StoreError):
    """403 `thread deleted`."""


class NotTheAuthorError(StoreError):
    """403 `author does not match`."""


class AuthorNotInThreadError(StoreError):
    """403 `author not found in any message in this thread`."""


class InvalidThreadIdError(StoreError):
    """400: a thread can't be made under the id that was asked for."""


class IdempotencyConflictError(StoreError):
    """409: the idempotency key was used before with another request."""


class StoreUnavailableError(StoreError):
    """503: the disk or the key service can't take the write now; `retry_after_s` is what to tell the client."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RecordUnreadableError(StoreError):
    """500: a stored record does not open (altered, misplaced, or its key is gone); names the record, never its
    content."""


class Idempotency(msgspec.Struct, frozen=True):
    """Scope and key of a create that may be retried. `scope` is a keyed digest made by the routes, never a raw API
    key."""

    scope: str
    key: str


class NewMessage(msgspec.Struct):
    author: str
    thread: str = ""
    role: str = "user"
    body: Any = None
    reply_to: str = ""
    reactions: dict[str, str] = {}


class ConversationStore(Protocol):
    """All times and ids are made by the store. `author=None` means that the caller may act for anybody (admin).

    Every method may raise StoreUnavailableError; every reader may raise RecordUnreadableError.
    """

    async def create_message(
        self, new: NewMessage, *, idempotency: Idempotency | None = None, request_id: str = ""
    ) -> Message:
        """Durable when it returns. A thread is made when none is named (under a new id) or the named one is unknown
        (under the name given). Raises ThreadDeletedError, IdempotencyConflictError."""
        ...

    async def get_message(self, message_id: str, *, thread_id: str | None = None) -> Message:
        """The latest version, also when deleted. Raises MessageNotFoundError (also when it is in another thread than
        the one named)."""
        ...

    async def update_message(
        self,
        message_id: str,
        *,
        author: str | None,
        body: Any,
        role: str | None,
        reply_to: str | None,
        thread_id: str | None = None,
        request_id: str = "",
    ) -> Message: ...

    async def delete_message(
        self, message_id: str, *, author: str | None, thread_id: str | None = None, request_id: str = ""
    ) -> None: ...

    async def message_versions(self, message_id: str, *, thread_id: str | None = None) -> list[Message]:
        """Oldest first; empty for an unknown id."""
        ...

    async def set_reaction(self, message_id: str, identity: str, reaction: str, *, request_id: str = "") -> Message: ...

    async def remove_reaction(self, message_id: str, identity: str, *, request_id: str = "") -> None: ...

    def list_messages(
        self,
        thread_id: str,
        *,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        include_deleted: bool = False,
    ) -> AsyncIterator[list[Message]]:
        """Chunks, in order of creation, latest version of each. `limit` keeps the most recent; `before` and `after`
        are message ids, exclusive. An unknown thread yields nothing."""
        ...

    async def may_read_thread(self, thread_id: str, author: str) -> bool:
        """Whether the author owns the thread or has written in it."""
        ...

    async def create_thread(
        self, *, author: str, title: str, idempotency: Idempotency | None = None, request_id: str = ""
    ) -> Thread: ...

    async def get_thread(self, thread_id: str) -> Thread:
        """Also when deleted. Raises ThreadNotFoundError."""
        ...

    async def update_thread(
        self, thread_id: str, *, author: str | None, title: str, request_id: str = ""
    ) -> Thread: ...

    async def delete_thread(self, thread_id: str, *, author: str | None, by: str, request_id: str = "") -> None: ...

    def list_threads(
        self, *, author: str | None, title: str | None = None, slug: str | None = None, include_deleted: bool = False
    ) -> AsyncIterator[list[Thread]]:
        """The author's own threads (None: all), in order of creation."""
        ...

    async def stats(self) -> dict[str, int]:
        """`threads` and `messages` (stored versions)."""
        ...

    def stored_keys(self, prefix: str) -> AsyncIterator[list[str]]: ...

    async def raw_value(self, key: str) -> bytes | None: ...
