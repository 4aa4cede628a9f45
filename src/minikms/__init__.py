"""miniKMS: a local, hardened key service. Start reading at `minikms.service`.

`minikms.Client` and `minikms.AsyncClient` are the libraries. They, the items of batches and every error of
`minikms.api.errors` load when they are first asked for, so that the daemon never imports them and the command starts
fast. `minikms.__version__` is the version of the installed distribution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minikms.api.errors import (
        AuditUnavailableError,
        ConflictError,
        DecryptionError,
        ForbiddenError,
        InternalError,
        InvalidPolicyError,
        InvalidRequestError,
        KeyDestroyedError,
        KeyNotFoundError,
        KeyRetiredError,
        KeyUnreadableError,
        KmsClosedError,
        KmsCredentialsError,
        KmsError,
        KmsProtocolError,
        KmsRefusedError,
        KmsTimeoutError,
        KmsUnavailableError,
        KmsUntrustedServerError,
        LastRootError,
        LimitExceededError,
        MethodNotAllowedError,
        NotFoundError,
        NotPinnedError,
        NotSealedError,
        NotTestedError,
        RequestInterruptedError,
        RequestTimeoutError,
        SealedError,
        ShuttingDownError,
        StorageUnavailableError,
        TooLargeError,
        TooManyAttemptsError,
        TooManyError,
        UnauthorizedError,
        UnsealFailedError,
        WrongPurposeError,
        WrongRootError,
        WrongShareError,
        WrongSlotError,
        WrongThreadError,
    )
    from minikms.client import AsyncClient, Client, DecryptItem, EncryptItem, ReencryptItem

    __version__: str

__all__ = [
    "AsyncClient",
    "AuditUnavailableError",
    "Client",
    "ConflictError",
    "DecryptItem",
    "DecryptionError",
    "EncryptItem",
    "ForbiddenError",
    "InternalError",
    "InvalidPolicyError",
    "InvalidRequestError",
    "KeyDestroyedError",
    "KeyNotFoundError",
    "KeyRetiredError",
    "KeyUnreadableError",
    "KmsClosedError",
    "KmsCredentialsError",
    "KmsError",
    "KmsProtocolError",
    "KmsRefusedError",
    "KmsTimeoutError",
    "KmsUnavailableError",
    "KmsUntrustedServerError",
    "LastRootError",
    "LimitExceededError",
    "MethodNotAllowedError",
    "NotFoundError",
    "NotPinnedError",
    "NotSealedError",
    "NotTestedError",
    "ReencryptItem",
    "RequestInterruptedError",
    "RequestTimeoutError",
    "SealedError",
    "ShuttingDownError",
    "StorageUnavailableError",
    "TooLargeError",
    "TooManyAttemptsError",
    "TooManyError",
    "UnauthorizedError",
    "UnsealFailedError",
    "WrongPurposeError",
    "WrongRootError",
    "WrongShareError",
    "WrongSlotError",
    "WrongThreadError",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("progressdb-minikms")
    if name in __all__:
        from minikms import client
        from minikms.api import errors

        return getattr(errors if name.endswith("Error") else client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
