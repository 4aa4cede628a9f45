"""The HTTP status of every error that another room raises.

Owns: the one table from errors of the store, the jobs, the backups and the key service to a status and a sentence.
Invariants: an exception's own text is sent only where the table says so, and those texts are written for clients. An
error that is not in the table is a 500 with one fixed text, and its own text is never sent. A refusal that a
retry can't change is never a 503.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from minikms import api
from minikms.api.errors import KmsError, KmsRefusedError, LimitExceededError, SealedError
from progressdb_server.api.http.errors import ApiError, Header, retry_after
from progressdb_server.jobs.states import JobError, JobNotFoundError, TooManyJobsError
from progressdb_server.kms.provider import LIMITED, SEALED, is_permanent
from progressdb_server.store import model

INVALID_THREAD_ID: Final = "thread must be 1 to 128 letters, digits, dots, underscores or hyphens, and not . or .."
MESSAGE_NOT_FOUND: Final = "message not found"
THREAD_NOT_FOUND: Final = "thread not found"
THREAD_DELETED: Final = "thread deleted"
NOT_THE_AUTHOR: Final = "author does not match"
AUTHOR_NOT_IN_THREAD: Final = "author not found in any message in this thread"
TOO_MANY_VERSIONS: Final = (
    "the message has as many versions as it may have: post a new message; this one can still be deleted, and its "
    "reactions removed"
)
AMBIGUOUS_TIME: Final = "before is a ts that does not name one version: send the older of a page of versions"
TOO_MANY_REACTIONS: Final = "too many reactions"
NOT_A_MEMBER: Final = "author is not a member of this thread"
TOO_MANY_MEMBERS: Final = "the thread has too many members"
MEMBER_IS_AUTHOR: Final = "the author of a thread can't be removed from it"
NO_ROOM_TO_REMOVE: Final = (
    "the thread has as many members, removed ones counted, as it may have: the removal of somebody who is none of them "
    "can't be recorded"
)
IDEMPOTENCY_CONFLICT: Final = "this Idempotency-Key was used before with another request"
BACKUP_EXISTS: Final = "a backup of this name exists"
BACKUP_BUSY: Final = "another backup is running: wait until it ends"
BACKUP_FAILED: Final = "the backup failed and its files were removed; the log has the reason with the request id"
BACKUP_NOT_FOUND: Final = "no backup of this name is registered"
BACKUP_STILL_THERE: Final = "the backup still exists: delete it and all its copies first"
THREAD_KEY_DESTROYED: Final = "the key of this thread is destroyed: nothing can be changed in it; use another thread"
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
    model.NotAMemberError: _ErrorResponse(403, NOT_A_MEMBER),
    model.TooManyMembersError: _ErrorResponse(409, TOO_MANY_MEMBERS),
    model.NoRoomToRemoveError: _ErrorResponse(409, NO_ROOM_TO_REMOVE),
    model.MemberIsAuthorError: _ErrorResponse(409, MEMBER_IS_AUTHOR),
    model.InvalidThreadIdError: _ErrorResponse(400, INVALID_THREAD_ID),
    model.AmbiguousTimeError: _ErrorResponse(400, AMBIGUOUS_TIME),
    model.TooManyVersionsError: _ErrorResponse(409, TOO_MANY_VERSIONS),
    model.TooManyReactionsError: _ErrorResponse(409, TOO_MANY_REACTIONS),
    model.IdempotencyConflictError: _ErrorResponse(409, IDEMPOTENCY_CONFLICT),
    model.ThreadKeyDestroyedError: _ErrorResponse(409, THREAD_KEY_DESTROYED),
    model.KeyServiceRefusedError: _ErrorResponse(500),
    model.StoreUnavailableError: _ErrorResponse(503),
    model.RecordUnreadableError: _ErrorResponse(500),
    JobNotFoundError: _ErrorResponse(404),
    TooManyJobsError: _ErrorResponse(503, retry_after_s=_RETRY_LATER_S),
    JobError: _ErrorResponse(409),
    model.BackupExistsError: _ErrorResponse(409, BACKUP_EXISTS),
    model.BackupBusyError: _ErrorResponse(409, BACKUP_BUSY),
    model.BackupThereError: _ErrorResponse(409, BACKUP_STILL_THERE),
    model.BackupNotFoundError: _ErrorResponse(404, BACKUP_NOT_FOUND),
    model.BackupError: _ErrorResponse(500, BACKUP_FAILED),
    SealedError: _ErrorResponse(503, SEALED, api.SEALED_RETRY_SECONDS),
    LimitExceededError: _ErrorResponse(503, LIMITED),
    KmsError: _ErrorResponse(503, KEY_SERVICE_UNAVAILABLE, _RETRY_SOON_S),
}


def api_error(error: Exception) -> ApiError | None:
    """The error response for an error of another room; None for one that no table entry covers: a defect."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, KmsRefusedError) and is_permanent(error):
        error = model.KeyServiceRefusedError(error.code)
    for known in type(error).__mro__:
        found = _RESPONSES.get(known)
        if found is not None:
            headers: tuple[Header, ...] = ()
            if found.status == 503:
                headers = (retry_after(found.retry_after_s or getattr(error, "retry_after_s", 1)),)
            return ApiError(found.status, found.text or str(error), headers)
    return None
