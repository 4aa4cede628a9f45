"""What the API answers when it refuses, and how the store's errors become answers.

Owns: `ApiError` and the table from the store's error tree to statuses. Invariants: a text here is a sentence for the
client, stable, and holds nothing of what was stored; an error that is not in the table becomes a 500 with one fixed
text. It must never put an exception's own text in an answer unless the table says that it was written for clients.
"""

from __future__ import annotations

from typing import Final

from progressdb_server.store import model

Header = tuple[bytes, bytes]


class ApiError(Exception):
    """A refusal. `text` is the sentence that the client sees in `{"error": text}`."""

    def __init__(self, status: int, text: str, headers: tuple[Header, ...] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


class ClientGoneError(Exception):
    """The client closed its connection before its request was whole, or stopped reading: nobody is left to answer."""


THREAD_ID_REFUSAL: Final = "thread must be 1 to 128 letters, digits, dots, underscores or hyphens"
_FIXED: Final[dict[type[model.StoreError], tuple[int, str]]] = {
    model.MessageNotFoundError: (404, "message not found"),
    model.ThreadNotFoundError: (404, "thread not found"),
    model.ThreadDeletedError: (403, "thread deleted"),
    model.NotTheAuthorError: (403, "author does not match"),
    model.AuthorNotInThreadError: (403, "author not found in any message in this thread"),
    model.InvalidThreadIdError: (400, THREAD_ID_REFUSAL),
    model.IdempotencyConflictError: (409, "this Idempotency-Key was used before with another request"),
}

UNAUTHORIZED_HEADERS: Final[tuple[Header, ...]] = ((b"www-authenticate", b"Bearer"),)
CLOSE: Final[Header] = (b"connection", b"close")
CLOSE_HEADERS: Final[tuple[Header, ...]] = (CLOSE,)


def bad_request(text: str) -> ApiError:
    return ApiError(400, text)


def unauthorized(text: str) -> ApiError:
    return ApiError(401, text, UNAUTHORIZED_HEADERS)


def forbidden(text: str = "forbidden") -> ApiError:
    return ApiError(403, text)


def not_found(text: str = "not found") -> ApiError:
    return ApiError(404, text)


def too_large() -> ApiError:
    return ApiError(413, "request body too large")


def from_store(error: model.StoreError) -> ApiError:
    """The answer for a store's error. Total: an unknown member of the tree is a 500."""
    if isinstance(error, model.StoreUnavailableError):
        retry_after = str(max(1, error.retry_after_s)).encode("ascii")
        return ApiError(503, str(error), ((b"retry-after", retry_after),))
    if isinstance(error, model.RecordUnreadableError):
        return ApiError(500, str(error))
    for known, (status, text) in _FIXED.items():
        if isinstance(error, known):
            return ApiError(status, text)
    return internal()


def internal() -> ApiError:
    return ApiError(500, "internal error")
