"""Error responses, and the sentences that more than one module sends or documents.

Owns: `ApiError` and its constructors. Invariants: a sentence is stable, says what to send, begins with the text of
ProgressDB 0.1 where that has one, and holds nothing that was stored. The status of an error from another room is
decided in `api.routes.errors`, not here.
"""

from __future__ import annotations

from typing import Final

from progressdb_server.api.gate import limits
from progressdb_server.http.asgi import CLOSE, Header

FORBIDDEN: Final = "forbidden"
UNAUTHORIZED: Final = "unauthorized: send an API key in the header X-API-Key"
NOT_FOUND: Final = "not found"
INTERNAL: Final = "internal error"
TOO_LARGE: Final = "request body too large"
RATE_LIMITED: Final = "rate limit exceeded (PROGRESSDB_RATE_RPS)"
HEAD_TOO_LARGE: Final = "request head too large"
BODIES_FULL: Final = "too many bodies are being received: send this one again later"
LISTS_FULL: Final = "too many lists are being read: ask for this one again later"
INVALID_JSON: Final = "invalid json: send an object with the fields that /docs/ names"
INVALID_ENCODING: Final = "the query is not UTF-8"
REPEATED_PARAMETER: Final = "a query parameter is given twice"
MISSING_SIGNATURE: Final = "missing signature headers: send X-User-ID and X-User-Signature, from POST /v1/_sign"
INVALID_SIGNATURE: Final = "invalid signature: a backend gets the one of X-User-ID from POST /v1/_sign"
AUTHOR_REQUIRED: Final = "author required for backend requests: name the user in the header X-User-ID"
AUTHOR_TOO_LONG: Final = f"author too long: at most {limits.AUTHOR_BYTES_MAX} bytes"
AUTHOR_CONTROL_CHARACTER: Final = "author holds a control character"
OTHER_AUTHOR_IN_QUERY: Final = "author mismatch between signature and query param"
OTHER_AUTHOR_IN_BODY: Final = "author mismatch between signature and body author"
INVALID_IDEMPOTENCY_KEY: Final = "the Idempotency-Key must be 1 to 255 visible ASCII characters"

UNAUTHORIZED_HEADERS: Final[tuple[Header, ...]] = ((b"www-authenticate", b"Bearer"),)
CLOSE_HEADERS: Final[tuple[Header, ...]] = (CLOSE,)


class ApiError(Exception):
    """An error response: `{"error": text}` with this status and these headers."""

    def __init__(self, status: int, text: str, headers: tuple[Header, ...] = ()) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


def bad_request(text: str) -> ApiError:
    return ApiError(400, text)


def unauthorized(text: str = UNAUTHORIZED) -> ApiError:
    return ApiError(401, text, UNAUTHORIZED_HEADERS)


def forbidden(text: str = FORBIDDEN) -> ApiError:
    return ApiError(403, text)


def not_found(text: str = NOT_FOUND) -> ApiError:
    return ApiError(404, text)


def too_large(headers: tuple[Header, ...] = ()) -> ApiError:
    return ApiError(413, TOO_LARGE, headers)


def full(text: str) -> ApiError:
    return ApiError(503, text, (retry_after(limits.BODIES_RETRY_SECONDS),))


def retry_after(seconds: int) -> Header:
    """At least one second: a client that does not wait would only be refused again."""
    return b"retry-after", str(max(1, seconds)).encode("ascii")
