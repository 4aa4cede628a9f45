"""The error tree of the client libraries.

Owns: every way in which a call can fail. `KmsError` is the base and is never raised itself. Two branches: the key
service was not reached or broke the contract (`KmsUnavailableError`, `KmsTimeoutError`, `KmsProtocolError`,
`KmsUntrustedServerError`, `KmsClosedError`), or it answered and refused (`KmsRefusedError` and one subclass for each
code of `minikms.api`). Invariants: no text holds a key, a plaintext or a ciphertext; a text that the daemon sent is
shortened and made printable. After a failure there is no default: a method must never return its input.
"""

from __future__ import annotations

import re
from typing import ClassVar, Final

from minikms import api

MESSAGE_CHARS_MAX: Final = 512
"""Of a text that the daemon sent."""
_CODE: Final = re.compile(r"[a-z][a-z_]{0,63}", re.ASCII)


class KmsError(Exception):
    """Base of every error that the client libraries raise."""


class KmsUnavailableError(KmsError):
    """No daemon answers: it is not running, refuses connections, or the connection was lost.

    `sent`: the request, or a part of it, may have reached the daemon. If it is false, nothing happened.
    """

    def __init__(self, message: str, sent: bool = False) -> None:
        super().__init__(message, sent)
        self.sent = sent

    def __str__(self) -> str:
        return str(self.args[0])


class KmsTimeoutError(KmsError):
    """No answer within the time allowed. The request may have been carried out."""


class KmsProtocolError(KmsError):
    """The answer breaks the contract: it is malformed, out of bounds, or of another shape."""


class KmsUntrustedServerError(KmsError):
    """An unexpected user serves the socket, or another server than the gateway answers; nothing was sent."""


class KmsCredentialsError(KmsError):
    """The client's certificate, key, CA file or token can't be used, or the gateway refuses the certificate. The text
    says which and what to do; the same call fails again until then. The request was not carried out.
    """


class KmsClosedError(KmsError):
    """The client was closed."""


class KmsRefusedError(KmsError):
    """The key service refused. `status` is the HTTP status, `code` a stable word of `minikms.api`. `retry_after_s`: in
    how many seconds the same call may succeed; 0 where the key service does not say.
    """

    default_status: ClassVar[int] = 500
    retry_after_s: int = 0

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code

    @property
    def message(self) -> str:
        """The sentence that the daemon sent, shortened and made printable."""
        return str(self.args[2])

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class InvalidRequestError(KmsRefusedError):
    default_status = 400


class TooLargeError(KmsRefusedError):
    default_status = 413


class TooManyError(KmsRefusedError):
    default_status = 413


class UnauthorizedError(KmsRefusedError):
    """The daemon does not allow this process's uid."""

    default_status = 401


class ForbiddenError(KmsRefusedError):
    """The caller lacks the role."""

    default_status = 403


class NotFoundError(KmsRefusedError):
    default_status = 404


class MethodNotAllowedError(KmsRefusedError):
    default_status = 405


class KeyNotFoundError(KmsRefusedError):
    default_status = 404


class KeyRetiredError(KmsRefusedError):
    """The key decrypts only."""

    default_status = 409


class KeyDestroyedError(KmsRefusedError):
    default_status = 410


class KeyUnreadableError(KmsRefusedError):
    """The key's file is damaged; other keys are not affected."""

    default_status = 503


class WrongThreadError(KmsRefusedError):
    default_status = 403


class WrongPurposeError(KmsRefusedError):
    default_status = 409


class DecryptionError(KmsRefusedError):
    """The ciphertext does not open: altered, another key, or another aad. The daemon does not say which."""

    default_status = 400


class RequestTimeoutError(KmsRefusedError):
    """The daemon gave up waiting for the request."""

    default_status = 408


class ConflictError(KmsRefusedError):
    default_status = 409


class WrongSlotError(ConflictError):
    """The root key, or the slot that was named, is not one for which this can be done."""


class LastRootError(ConflictError):
    """Without this slot no root key would open the keyring."""


class NotTestedError(ConflictError):
    """No other root key was tested recently: test one first."""


class NotPinnedError(ConflictError):
    """The pin file of the daemon does not name this root key."""


class AuditUnavailableError(KmsRefusedError):
    """The daemon can't write its audit log, so it sends no answers. The request may have been carried out."""

    default_status = 503


class StorageUnavailableError(KmsRefusedError):
    default_status = 503


class ShuttingDownError(KmsRefusedError):
    """The daemon is stopping and did not begin the request."""

    default_status = 503


class RequestInterruptedError(KmsRefusedError):
    """The daemon stopped while it worked on the request, which may have been carried out."""

    default_status = 503


class SealedError(KmsRefusedError):
    """The key service is sealed: it has no key until an operator unseals it (`minikms unseal`). Try again later.

    A request that was in flight when it was sealed may have been carried out.
    """

    default_status = 503


class NotSealedError(KmsRefusedError):
    """There is nothing to unseal."""

    default_status = 409


class WrongRootError(KmsRefusedError):
    """The root key does not open the keyring."""

    default_status = 403


class WrongShareError(KmsRefusedError):
    """The share is not one of this keyring, or not of the set that is being entered."""

    default_status = 403


class TooManyAttemptsError(KmsRefusedError):
    """Wrong attempts are slowed down: this one was not made. The text says when to try again."""

    default_status = 429


class LimitExceededError(KmsRefusedError):
    """A limit of the policy is used up: this call was not carried out. `retry_after_s` says when to try again."""

    default_status = 429


class InvalidPolicyError(KmsRefusedError):
    """The policy file is not valid, so the policy before it stays in force. The text names the mistake."""

    default_status = 409


class UnsealFailedError(KmsRefusedError):
    """The daemon stays sealed, although the root key is not wrong. Its own log says why."""

    default_status = 503


class InternalError(KmsRefusedError):
    default_status = 500


BY_CODE: Final[dict[str, type[KmsRefusedError]]] = {
    api.CODE_INVALID_REQUEST: InvalidRequestError,
    api.CODE_UNAUTHORIZED: UnauthorizedError,
    api.CODE_FORBIDDEN: ForbiddenError,
    api.CODE_NOT_FOUND: NotFoundError,
    api.CODE_METHOD_NOT_ALLOWED: MethodNotAllowedError,
    api.CODE_KEY_NOT_FOUND: KeyNotFoundError,
    api.CODE_KEY_RETIRED: KeyRetiredError,
    api.CODE_KEY_DESTROYED: KeyDestroyedError,
    api.CODE_KEY_UNREADABLE: KeyUnreadableError,
    api.CODE_WRONG_THREAD: WrongThreadError,
    api.CODE_WRONG_PURPOSE: WrongPurposeError,
    api.CODE_DECRYPTION_FAILED: DecryptionError,
    api.CODE_TOO_LARGE: TooLargeError,
    api.CODE_TOO_MANY: TooManyError,
    api.CODE_TIMEOUT: RequestTimeoutError,
    api.CODE_CONFLICT: ConflictError,
    api.CODE_WRONG_SLOT: WrongSlotError,
    api.CODE_LAST_ROOT: LastRootError,
    api.CODE_NOT_TESTED: NotTestedError,
    api.CODE_NOT_PINNED: NotPinnedError,
    api.CODE_AUDIT_UNAVAILABLE: AuditUnavailableError,
    api.CODE_STORAGE_UNAVAILABLE: StorageUnavailableError,
    api.CODE_SHUTTING_DOWN: ShuttingDownError,
    api.CODE_INTERRUPTED: RequestInterruptedError,
    api.CODE_SEALED: SealedError,
    api.CODE_NOT_SEALED: NotSealedError,
    api.CODE_WRONG_ROOT: WrongRootError,
    api.CODE_WRONG_SHARE: WrongShareError,
    api.CODE_TOO_MANY_ATTEMPTS: TooManyAttemptsError,
    api.CODE_LIMIT_EXCEEDED: LimitExceededError,
    api.CODE_INVALID_POLICY: InvalidPolicyError,
    api.CODE_UNSEAL_FAILED: UnsealFailedError,
    api.CODE_INTERNAL: InternalError,
}


def refusal(code: str, message: str, status: int | None = None, retry_after_s: int = 0) -> KmsRefusedError:
    """The error for a refusal of the daemon; `status` is None for an item of a batch. Both texts are untrusted."""
    if _CODE.fullmatch(code) is None:
        code = api.CODE_INTERNAL
    kind = BY_CODE.get(code, KmsRefusedError)
    cleaned = "".join(char if char.isprintable() else "?" for char in message[:MESSAGE_CHARS_MAX])
    made = kind(kind.default_status if status is None else status, code, cleaned)
    made.retry_after_s = retry_after_s
    return made
