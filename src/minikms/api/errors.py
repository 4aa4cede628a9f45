"""The error tree of the key service and of its clients.

    KmsError
    ├── KmsRefusedError: the key service refuses; one subclass for each code
    ├── KmsUnavailableError, KmsTimeoutError: no answer
    ├── KmsProtocolError: the answer breaks the contract
    ├── KmsUntrustedServerError: nothing was sent
    ├── KmsCredentialsError: the client has nothing that the gateway accepts
    └── KmsClosedError: the client was closed

Owns: every way in which a verb can fail, with its HTTP status and stable code. The daemon raises a `KmsRefusedError`,
and the client raises the same class again; the other branches are the client's own. Invariants: the text of a refusal
is written for the caller and contains no key, no plaintext, no ciphertext, no path and no internal text; a text that a
daemon sent is shortened and made printable; `KmsError` itself is never raised; a verb that raises one of these errors
has changed nothing, unless the error says so. After a failure there is no default: no method returns its input.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Final, TypeVar

from minikms.api import contract
from minikms.api.printable import clean

MESSAGE_CHARS_MAX: Final = 512
"""The length of a text that a daemon sent."""
_CODE: Final = re.compile(r"[a-z][a-z_]{0,63}", re.ASCII)


class KmsError(Exception):
    """The base of the tree."""


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
    """The key service refuses. status: the HTTP status. code: one of the CODE_ constants of `minikms.api`, or a word
    that this version does not know. retry_after_s: in how many seconds the same call may succeed; 0 where that is not
    known.
    """

    status: int = 500
    code: str = contract.CODE_INTERNAL
    retry_after_s: int = 0

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def message(self) -> str:
        """The sentence for the caller."""
        return str(self)


class InvalidRequestError(KmsRefusedError):
    """The caller's request is malformed or out of bounds."""

    status, code = 400, contract.CODE_INVALID_REQUEST


class TooLargeError(KmsRefusedError):
    status, code = 413, contract.CODE_TOO_LARGE


class TooManyError(KmsRefusedError):
    status, code = 413, contract.CODE_TOO_MANY


class UnauthorizedError(KmsRefusedError):
    """The caller's uid is not allowed."""

    status, code = 401, contract.CODE_UNAUTHORIZED


class ForbiddenError(KmsRefusedError):
    """The caller lacks the role."""

    status, code = 403, contract.CODE_FORBIDDEN


class NotFoundError(KmsRefusedError):
    status, code = 404, contract.CODE_NOT_FOUND


class MethodNotAllowedError(KmsRefusedError):
    status, code = 405, contract.CODE_METHOD_NOT_ALLOWED


class RequestTimeoutError(KmsRefusedError):
    """The request did not arrive in time."""

    status, code = 408, contract.CODE_TIMEOUT


class KeyNotFoundError(KmsRefusedError):
    status, code = 404, contract.CODE_KEY_NOT_FOUND


class KeyRetiredError(KmsRefusedError):
    """The key can only decrypt."""

    status, code = 409, contract.CODE_KEY_RETIRED


class KeyDestroyedError(KmsRefusedError):
    status, code = 410, contract.CODE_KEY_DESTROYED


class KeyUnreadableError(KmsRefusedError):
    """The key's file is damaged, of another installation or of an unknown version. Other keys are not affected."""

    status, code = 503, contract.CODE_KEY_UNREADABLE


class WrongThreadError(KmsRefusedError):
    status, code = 403, contract.CODE_WRONG_THREAD


class WrongPurposeError(KmsRefusedError):
    status, code = 409, contract.CODE_WRONG_PURPOSE


class DecryptionError(KmsRefusedError):
    """The ciphertext does not open. The error does not say why: it was altered, or key or aad is another one."""

    status, code = 400, contract.CODE_DECRYPTION_FAILED


class ConflictError(KmsRefusedError):
    status, code = 409, contract.CODE_CONFLICT


class WrongSlotError(ConflictError):
    """The root key, or the slot that was named, is not one for which this can be done."""

    code = contract.CODE_WRONG_SLOT


class LastRootError(ConflictError):
    """Without this slot no root key would open the keyring."""

    code = contract.CODE_LAST_ROOT


class NotTestedError(ConflictError):
    """No other root key was tested recently, so nobody knows whether one still opens the keyring."""

    code = contract.CODE_NOT_TESTED


class NotPinnedError(ConflictError):
    """The pin file does not name this root key."""

    code = contract.CODE_NOT_PINNED


class InvalidPolicyError(KmsRefusedError):
    """The policy file can't be taken into force; the policy before it stays. The text says what to correct."""

    status, code = 409, contract.CODE_INVALID_POLICY


class AuditUnavailableError(KmsRefusedError):
    """The audit log can't be written, so no answer is sent. The request may have been carried out."""

    status, code = 503, contract.CODE_AUDIT_UNAVAILABLE


class AuditLaggingError(KmsRefusedError):
    """More lines of the audit log than allowed wait for the auditor. The request was not carried out."""

    status, code = 503, contract.CODE_AUDIT_LAGGING
    retry_after_s = contract.AUDIT_LAGGING_RETRY_SECONDS


class StorageUnavailableError(KmsRefusedError):
    """The disk failed to write. What was durable before still is."""

    status, code = 503, contract.CODE_STORAGE_UNAVAILABLE


class StorageUncertainError(StorageUnavailableError):
    """The disk failed, and either the former or the new content may be what a later start finds."""


class KeysNotReadError(StorageUnavailableError):
    """Key files are still being read after the start, so it is not known which threads their keys belong to."""

    retry_after_s = contract.INDEXING_RETRY_SECONDS


class ShuttingDownError(KmsRefusedError):
    """The daemon is stopping and did not begin the request."""

    status, code = 503, contract.CODE_SHUTTING_DOWN


class RequestInterruptedError(KmsRefusedError):
    """The daemon stopped during the request, which may have taken effect."""

    status, code = 503, contract.CODE_INTERRUPTED


class SealedError(KmsRefusedError):
    """The daemon is sealed: it has no key. A request that was in flight may have taken effect."""

    status, code = 503, contract.CODE_SEALED
    retry_after_s = contract.SEALED_RETRY_SECONDS


class ReplicaRolledBackError(KmsRefusedError):
    """The database, or what came from it, is older than what this host has seen."""

    status, code = 409, contract.CODE_REPLICA_ROLLED_BACK


class ReplicaForkedError(KmsRefusedError):
    """The database has another history than this host has seen, or something that the keyring did not authenticate."""

    status, code = 409, contract.CODE_REPLICA_FORKED


class StandbyError(KmsRefusedError):
    """Another host of the key service serves. The request was not begun."""

    status, code = 503, contract.CODE_STANDBY

    def __init__(self, message: str = "this host of the key service is a standby: another one serves") -> None:
        super().__init__(message)


class NotSealedError(KmsRefusedError):
    """There is nothing to unseal."""

    status, code = 409, contract.CODE_NOT_SEALED


class WrongRootError(KmsRefusedError):
    """The root key that a caller gave does not open the keyring."""

    status, code = 403, contract.CODE_WRONG_ROOT


class TooManyAttemptsError(KmsRefusedError):
    """Wrong attempts are slowed down. This one was not made."""

    status, code = 429, contract.CODE_TOO_MANY_ATTEMPTS

    def __init__(self, message: str, retry_after_s: int = 0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitExceededError(KmsRefusedError):
    """A limit of the policy file is used up: the call was not carried out. `limit` is its name, which only the daemon
    knows; `of_all`: it is shared by all principals of the grant or proxy `holder`.
    """

    status, code = 429, contract.CODE_LIMIT_EXCEEDED

    def __init__(
        self, message: str, retry_after_s: int = 0, *, limit: str = "", holder: str = "", of_all: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit
        self.holder = holder
        self.of_all = of_all


class UnsealFailedError(KmsRefusedError):
    """The root key is not wrong, and the data directory could not be opened. The daemon's own log says why."""

    status, code = 503, contract.CODE_UNSEAL_FAILED


class InternalError(KmsRefusedError):
    """A defect of the daemon. Its own log says more."""

    code = contract.CODE_INTERNAL


class ArenaFullError(InternalError):
    """The arena has no free slot for another raw key. The request can be repeated when others have ended."""

    status = 503


class KeyTextError(InvalidRequestError):
    """A key given as text is not 64 hexadecimal characters. The error never quotes the text."""


class ShareTextError(InvalidRequestError):
    """The text is not a share of a root key, or has a typing mistake. The error never quotes the text."""


class WrongShareError(KmsRefusedError):
    """The share is whole, but the keyring does not know it."""

    status, code = 403, contract.CODE_WRONG_SHARE


class StartError(KmsRefusedError):
    """The daemon refuses to start. The text says why and what to do. It is never sent to a client."""


class StartLaterError(StartError):
    """Something that the start needs is in use, away or fails: a later start may succeed without a change."""


class UnknownRootError(StartError):
    """The root key of a start does not open this keyring."""


def _kinds_of(kind: type[KmsRefusedError]) -> Iterator[type[KmsRefusedError]]:
    for each in kind.__subclasses__():
        yield each
        yield from _kinds_of(each)


BY_CODE: Final[dict[str, type[KmsRefusedError]]] = {
    kind.code: kind for kind in _kinds_of(KmsRefusedError) if "code" in vars(kind)
}
"""One class for each code: a class that inherits its code is not in the table."""

E = TypeVar("E", bound=KmsError)


def copy_of(error: E) -> E:
    """The error once more for another caller: each raises an object of its own."""
    other = copy.copy(error)
    other.__cause__ = error.__cause__
    return other


def refusal(code: str, message: str, status: int | None = None, retry_after_s: int = 0) -> KmsRefusedError:
    """The error for a refusal of the daemon; `status` is None for an item of a batch. Both texts are untrusted."""
    if _CODE.fullmatch(code) is None:
        code = contract.CODE_INTERNAL
    kind = BY_CODE.get(code, KmsRefusedError)
    error = kind(clean(message[:MESSAGE_CHARS_MAX]))
    error.code = code
    error.status = kind.status if status is None else status
    error.retry_after_s = retry_after_s
    return error
