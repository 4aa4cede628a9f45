"""The error tree of the key service.

Owns: every way in which a verb can fail, with the HTTP status and the stable code it maps to. Invariants: the text of
an error is written for the caller and holds no key, no plaintext, no path and no internal text; `MiniKmsError` itself
is never raised. After a failure there is no default: what raises one of these has changed nothing, unless it says so.
"""

from __future__ import annotations

from typing import ClassVar

from minikms import api


class MiniKmsError(Exception):
    """Base of the tree. `status` is the HTTP status, `code` the stable word of `api`."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = api.CODE_INTERNAL


class InvalidRequestError(MiniKmsError):
    """The caller's request is malformed or out of bounds."""

    status = 400
    code = api.CODE_INVALID_REQUEST


class TooLargeError(MiniKmsError):
    status = 413
    code = api.CODE_TOO_LARGE


class TooManyError(MiniKmsError):
    status = 413
    code = api.CODE_TOO_MANY


class UnauthorizedError(MiniKmsError):
    status = 401
    code = api.CODE_UNAUTHORIZED


class ForbiddenError(MiniKmsError):
    status = 403
    code = api.CODE_FORBIDDEN


class NotFoundError(MiniKmsError):
    status = 404
    code = api.CODE_NOT_FOUND


class KeyNotFoundError(MiniKmsError):
    status = 404
    code = api.CODE_KEY_NOT_FOUND


class KeyRetiredError(MiniKmsError):
    """The key decrypts only."""

    status = 409
    code = api.CODE_KEY_RETIRED


class KeyDestroyedError(MiniKmsError):
    status = 410
    code = api.CODE_KEY_DESTROYED


class KeyExhaustedError(MiniKmsError):
    """The key's uses are spent (NIST SP 800-38D section 8.3: at most 2^32 random nonces under one key)."""

    status = 409
    code = api.CODE_KEY_EXHAUSTED


class KeyUnreadableError(MiniKmsError):
    """The key's file is damaged, foreign or of an unknown version; other keys are not affected."""

    status = 503
    code = api.CODE_KEY_UNREADABLE


class WrongThreadError(MiniKmsError):
    status = 403
    code = api.CODE_WRONG_THREAD


class WrongPurposeError(MiniKmsError):
    status = 409
    code = api.CODE_WRONG_PURPOSE


class DecryptionError(MiniKmsError):
    """The ciphertext does not open; the reason is never told apart (altered, other key, other aad)."""

    status = 400
    code = api.CODE_DECRYPTION_FAILED


class ConflictError(MiniKmsError):
    status = 409
    code = api.CODE_CONFLICT


class AuditUnavailableError(MiniKmsError):
    """The audit log can't be written, so nothing is done or answered."""

    status = 503
    code = api.CODE_AUDIT_UNAVAILABLE


class StorageUnavailableError(MiniKmsError):
    """The disk refused a write; what was durable before still is."""

    status = 503
    code = api.CODE_STORAGE_UNAVAILABLE


class ShuttingDownError(MiniKmsError):
    status = 503
    code = api.CODE_SHUTTING_DOWN


class RequestInterruptedError(MiniKmsError):
    """The daemon stopped while it worked on the request, which may have been carried out."""

    status = 503
    code = api.CODE_INTERRUPTED


class ArenaFullError(MiniKmsError):
    """No slot is free for one more raw key; the request may be tried again when others have ended."""

    status = 503
    code = api.CODE_INTERNAL


class KeyTextError(InvalidRequestError):
    """A key given as text is not 64 hexadecimal characters. The text is never quoted."""


class StartError(MiniKmsError):
    """The daemon refuses to start; the text says why and what to do. Never sent to a client."""
