"""The HTTP status of every error that another room raises.

Owns: the status and the sentence of errors of the key service; the errors of this server know theirs (`StatusError`).
Invariants: an exception's own text is sent only where its class has no sentence, and those texts are written for
clients. Any other error is a 500 with one fixed text, and its own text is never sent. A refusal of one
request that a retry can't change is never a 503.
"""

from __future__ import annotations

from typing import Final

from minikms import api
from minikms.api.errors import KmsError, KmsRefusedError, LimitExceededError, SealedError
from progressdb_server.api.gate.errors import ApiError, retry_after
from progressdb_server.kms.provider import LIMITED, SEALED, is_permanent
from progressdb_server.store.model import KeyServiceRefusedError, StatusError

_KEY_SERVICE: Final = (
    (SealedError, SEALED, api.SEALED_RETRY_SECONDS),
    (LimitExceededError, LIMITED, 0),
    (KmsError, "the key service is not available now", 2),
)
"""The sentence and the seconds to wait for each class, the most special first; 0: the seconds that the error names."""


def api_error(error: Exception) -> ApiError | None:
    """The error response for an error of another room; None for a defect."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, KmsRefusedError) and is_permanent(error):
        error = KeyServiceRefusedError(error.code)
    if isinstance(error, StatusError) and error.status:
        headers = (retry_after(error.retry_after_s),) if error.status == 503 else ()
        return ApiError(error.status, error.text or str(error), headers)
    for kind, text, wait_s in _KEY_SERVICE:
        if isinstance(error, kind):
            return ApiError(503, text, (retry_after(wait_s or getattr(error, "retry_after_s", 1)),))
    return None
