"""The error tree of the key service.

Owns: every way in which a verb can fail, with its HTTP status and stable code. Invariants: the text of an error is
written for the caller and contains no key, no plaintext, no path and no internal text; `MiniKmsError` itself is never
raised; a verb that raises one of these errors has changed nothing, unless the error says so.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

from minikms import api


class MiniKmsError(Exception):
    """The base of the tree. status: the HTTP status. code: one of the CODE_ constants of `api`. retry_after_s: the
    `Retry-After` of the answer; 0 for none.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = api.CODE_INTERNAL
    retry_after_s: int = 0


E = TypeVar("E", bound=MiniKmsError)


def copied(error: E) -> E:
    """An error that has only its text, once more for another caller: each raises an object of its own."""
    other = type(error)(str(error))
    other.__cause__ = error.__cause__
    return other


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


class WrongSlotError(ConflictError):
    """The root key, or the slot that was named, is not one for which this can be done."""

    code = api.CODE_WRONG_SLOT


class LastRootError(ConflictError):
    """Without this slot no root key would open the keyring."""

    code = api.CODE_LAST_ROOT


class NotTestedError(ConflictError):
    """No other root key was tested recently, so nobody knows whether one still opens the keyring."""

    code = api.CODE_NOT_TESTED


class NotPinnedError(ConflictError):
    """The pin file does not name this root key."""

    code = api.CODE_NOT_PINNED


class InvalidPolicyError(MiniKmsError):
    """The policy file can't be taken into force; the policy before it stays. The text says what to correct."""

    status = 409
    code = api.CODE_INVALID_POLICY


class AuditUnavailableError(MiniKmsError):
    """The audit log can't be written, so requests are refused."""

    status = 503
    code = api.CODE_AUDIT_UNAVAILABLE


class StorageUnavailableError(MiniKmsError):
    """The disk failed to write. What was durable before still is."""

    status = 503
    code = api.CODE_STORAGE_UNAVAILABLE


class StorageUncertainError(StorageUnavailableError):
    """The disk failed, and either the former or the new content may be what a later start finds."""


class KeysNotReadError(StorageUnavailableError):
    """Key files are still being read after the start, so it is not known which threads their keys belong to."""

    retry_after_s = api.INDEXING_RETRY_SECONDS


class ShuttingDownError(MiniKmsError):
    status = 503
    code = api.CODE_SHUTTING_DOWN


class RequestInterruptedError(MiniKmsError):
    """The daemon stopped during the request, which may have taken effect."""

    status = 503
    code = api.CODE_INTERRUPTED


class SealedError(MiniKmsError):
    """The daemon is sealed: it has no key. A request that was in flight may have taken effect."""

    status = 503
    code = api.CODE_SEALED
    retry_after_s = api.SEALED_RETRY_SECONDS


class NotSealedError(MiniKmsError):
    """There is nothing to unseal."""

    status = 409
    code = api.CODE_NOT_SEALED


class WrongRootKeyError(MiniKmsError):
    """The root key that a caller gave does not open the keyring."""

    status = 403
    code = api.CODE_WRONG_ROOT


class TooManyAttemptsError(MiniKmsError):
    """Wrong attempts are slowed down. This one was not made."""

    status = 429
    code = api.CODE_TOO_MANY_ATTEMPTS

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitExceededError(MiniKmsError):
    """A limit of the policy file is used up. `limit` is its name; `of_all`: it is shared by all principals of the grant
    or proxy `holder`.
    """

    status = 429
    code = api.CODE_LIMIT_EXCEEDED

    def __init__(self, message: str, retry_after_s: int, *, limit: str, holder: str, of_all: bool) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit
        self.holder = holder
        self.of_all = of_all


class UnsealFailedError(MiniKmsError):
    """The root key is not wrong, and the data directory could not be opened. The daemon's own log says why."""

    status = 503
    code = api.CODE_UNSEAL_FAILED


class ArenaFullError(MiniKmsError):
    """The arena has no free slot for another raw key. The request can be repeated when others have ended."""

    status = 503
    code = api.CODE_INTERNAL


class KeyTextError(InvalidRequestError):
    """A key given as text is not 64 hexadecimal characters. The error never quotes the text."""


class ShareTextError(InvalidRequestError):
    """The text is not a share of a root key, or has a typing mistake. The error never quotes the text."""


class WrongShareError(MiniKmsError):
    """The share is whole, but the keyring does not know it."""

    status = 403
    code = api.CODE_WRONG_SHARE


class StartError(MiniKmsError):
    """The daemon refuses to start. The text says why and what to do. It is never sent to a client."""


class WrongRootError(StartError):
    """The root key of a start does not open this keyring."""
