"""The error tree of the key service.

Owns: every way in which a verb can fail, with its HTTP status and stable code. Invariants: the text of an error is
written for the caller and contains no key, no plaintext, no path and no internal text; `MiniKmsError` itself is never
raised; a verb that raises one of these errors has changed nothing, unless the error says so.
"""

from __future__ import annotations

from typing import ClassVar

from minikms import api


class MiniKmsError(Exception):
    """The base of the tree. status: the HTTP status. code: one of the CODE_ constants of `api`."""

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
    """The key can only decrypt."""

    status = 409
    code = api.CODE_KEY_RETIRED


class KeyDestroyedError(MiniKmsError):
    status = 410
    code = api.CODE_KEY_DESTROYED


class KeyExhaustedError(MiniKmsError):
    """The key has no uses left (NIST SP 800-38D section 8.3: at most 2^32 random nonces under one key)."""

    status = 409
    code = api.CODE_KEY_EXHAUSTED


class KeyUnreadableError(MiniKmsError):
    """The key's file is damaged, of another installation or of an unknown version. Other keys are not affected."""

    status = 503
    code = api.CODE_KEY_UNREADABLE


class WrongThreadError(MiniKmsError):
    status = 403
    code = api.CODE_WRONG_THREAD


class WrongPurposeError(MiniKmsError):
    status = 409
    code = api.CODE_WRONG_PURPOSE


class DecryptionError(MiniKmsError):
    """The ciphertext does not open. The error does not say why: it was altered, or key or aad is another one."""

    status = 400
    code = api.CODE_DECRYPTION_FAILED


class ConflictError(MiniKmsError):
    status = 409
    code = api.CODE_CONFLICT


class AuditUnavailableError(MiniKmsError):
    """The audit log can't be written, so requests are refused."""

    status = 503
    code = api.CODE_AUDIT_UNAVAILABLE


class StorageUnavailableError(MiniKmsError):
    """The disk failed to write. What was durable before still is."""

    status = 503
    code = api.CODE_STORAGE_UNAVAILABLE


class ShuttingDownError(MiniKmsError):
    status = 503
    code = api.CODE_SHUTTING_DOWN


class RequestInterruptedError(MiniKmsError):
    """The daemon stopped during the request, which may have taken effect."""

    status = 503
    code = api.CODE_INTERRUPTED


class ArenaFullError(MiniKmsError):
    """The arena has no free slot for another raw key. The request can be repeated when others have ended."""

    status = 503
    code = api.CODE_INTERNAL


class KeyTextError(InvalidRequestError):
    """A key given as text is not 64 hexadecimal characters. The error never quotes the text."""


class StartError(MiniKmsError):
    """The daemon refuses to start. The text says why and what to do. It is never sent to a client."""
