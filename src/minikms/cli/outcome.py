"""How a command ends: exit statuses, and errors as sentences.

Owns: the one rule from an error to its text and exit status. 0: done, or judged and found good. 1: judged and found
wanting, or refused. 2: wrong usage, or something that is needed (a daemon, a file, a key) is not there. Invariants: a
text says what happened, why, and what to do next; it goes to standard error and holds no key. It must never turn an
error into a success.
"""

from __future__ import annotations

import sys
from typing import Final

EXIT_GOOD: Final = 0
EXIT_WANTING: Final = 1
EXIT_MISSING: Final = 2
EXIT_INTERRUPTED: Final = 130
"""128 and SIGINT, as shells have it."""
EXIT_READER_LEFT: Final = 141
"""128 and SIGPIPE: who read the output closed it, and did not get all of it."""


class CommandError(Exception):
    """A command that can't go on; the text is for the person who typed it."""

    def __init__(self, text: str, exit_status: int = EXIT_MISSING) -> None:
        super().__init__(text)
        self.exit_status = exit_status


def complain(text: str) -> None:
    """One sentence on standard error."""
    print(f"minikms: {text}", file=sys.stderr)


def explained(error: Exception) -> tuple[str, int]:
    """The text and the exit status of an error that ends a command. Errors that are defects are raised again."""
    from minikms.client.errors import KmsError
    from minikms.errors import InvalidRequestError, MiniKmsError, StartError, StorageUnavailableError

    if isinstance(error, CommandError):
        return str(error), error.exit_status
    if isinstance(error, KmsError):
        return _explained_client(error)
    if isinstance(error, MiniKmsError):
        missing = isinstance(error, StartError | StorageUnavailableError | InvalidRequestError)
        return str(error), EXIT_MISSING if missing else EXIT_WANTING
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}", EXIT_MISSING
    raise error


def _explained_client(error: Exception) -> tuple[str, int]:
    from minikms.client import errors

    advice: dict[type[Exception], str] = {
        errors.KmsUnavailableError: "Is the daemon running? Start it with `minikms --socket … --data-dir …`, or name "
        "its socket with --socket or PROGRESSDB_KMS_SOCKET",
        errors.KmsTimeoutError: "It may have been carried out: look with `minikms status`",
        errors.KmsUntrustedServerError: "If that user is meant to serve it, say so with --server-uid",
        errors.UnauthorizedError: "Run this as a user of the daemon's --allowed-uids",
        errors.ForbiddenError: "Run this as a user of the daemon's --admin-uids",
        errors.AuditUnavailableError: "Free space on the file system of the audit log; see docs/runbook.md",
        errors.KeyNotFoundError: "List what there is with `minikms keys list`",
    }
    text = error.message if isinstance(error, errors.KmsRefusedError) else str(error)
    way_out = next((advice[kind] for kind in type(error).__mro__ if kind in advice), "")
    usage_or_missing = isinstance(error, errors.KeyNotFoundError | errors.InvalidRequestError)
    judged = isinstance(error, errors.KmsRefusedError | errors.KmsUntrustedServerError) and not usage_or_missing
    return f"{text}. {way_out}." if way_out else text, EXIT_WANTING if judged else EXIT_MISSING
