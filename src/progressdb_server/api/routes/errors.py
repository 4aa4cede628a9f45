"""The HTTP status of every error that another room raises.

Owns: the one table from errors of the store, the jobs, the backups and the key service to a status and a sentence.
Invariants: an exception's own text is sent only where the table says so, and those texts are written for clients. An
error that is not in the table is a 500 with one fixed text, and its own text is never sent.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from progressdb_server.api.http.errors import ApiError, Header, retry_after
from progressdb_server.jobs.model import JobError, JobNotFoundError, TooManyJobsError
from progressdb_server.kms.provider import ProviderError
from progressdb_server.store import backup, model

INVALID_THREAD_ID: Final = "thread must be 1 to 128 letters, digits, dots, underscores or hyphens"
MESSAGE_NOT_FOUND: Final = "message not found"
THREAD_NOT_FOUND: Final = "thread not found"
THREAD_DELETED: Final = "thread deleted"
NOT_THE_AUTHOR: Final = "author does not match"
AUTHOR_NOT_IN_THREAD: Final = "author not found in any message in this thread"
IDEMPOTENCY_CONFLICT: Final = "this Idempotency-Key was used before with another request"
BACKUP_EXISTS: Final = "a backup of this name exists"
BACKUP_BUSY: Final = "another backup is being made: wait for its end"
BACKUP_FAILED: Final = "the backup failed and nothing of it is left; the log says why under the request's id"
BACKUP_NOT_FOUND: Final = "no backup of this name is registered"
BACKUP_STILL_THERE: Final = "the backup is still there: delete it first, and every copy of it"
KEY_SERVICE_UNAVAILABLE: Final = "the key service is not available now"
_RETRY_LATER_S: Final = 60
_RETRY_SOON_S: Final = 2


class _ErrorResponse(NamedTuple):
    """`text` is None for an error whose own text is sent; `retry_after_s` is 0 for one that has its own."""

    status: int
    text: str | None = None
    retry_after_s: int = 0


_RESPONSES: Final[dict[type[BaseException], _ErrorResponse]] = {
    model.MessageNotFoundError: _ErrorResponse(404, MESSAGE_NOT_FOUND),
    model.ThreadNotFoundError: _ErrorResponse(404, THREAD_NOT_FOUND),
    model.ThreadDeletedError: _ErrorResponse(403, THREAD_DELETED),
    model.NotTheAuthorError: _ErrorResponse(403, NOT_THE_AUTHOR),
    model.AuthorNotInThreadError: _ErrorResponse(403, AUTHOR_NOT_IN_THREAD),
    model.InvalidThreadIdError: _ErrorResponse(400, INVALID_THREAD_ID),
    model.IdempotencyConflictError: _ErrorResponse(409, IDEMPOTENCY_CONFLICT),
    model.StoreUnavailableError: _ErrorResponse(503),
    model.RecordUnreadableError: _ErrorResponse(500),
    JobNotFoundError: _ErrorResponse(404),
    TooManyJobsError: _ErrorResponse(503, retry_after_s=_RETRY_LATER_S),
    JobError: _ErrorResponse(409),
    backup.BackupExistsError: _ErrorResponse(409, BACKUP_EXISTS),
    backup.BackupBusyError: _ErrorResponse(409, BACKUP_BUSY),
    backup.BackupThereError: _ErrorResponse(409, BACKUP_STILL_THERE),
    backup.BackupNotFoundError: _ErrorResponse(404, BACKUP_NOT_FOUND),
    backup.BackupError: _ErrorResponse(500, BACKUP_FAILED),
    ProviderError: _ErrorResponse(503, KEY_SERVICE_UNAVAILABLE, _RETRY_SOON_S),
}


def api_error(error: Exception) -> ApiError | None:
    """The error response for an error of another room; None for one that no table entry covers: a defect."""
    if isinstance(error, ApiError):
        return error
    for known in type(error).__mro__:
        found = _RESPONSES.get(known)
        if found is not None:
            headers: tuple[Header, ...] = ()
            if found.status == 503:
                headers = (retry_after(found.retry_after_s or getattr(error, "retry_after_s", 1)),)
            return ApiError(found.status, found.text or str(error), headers)
    return None
