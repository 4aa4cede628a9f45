"""Reaching the running daemon.

Owns: which client a command uses. Invariant: the daemon's user is checked before anything is sent (the client does
so). It must never fall back to the files of a data directory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from minikms.cli.console import CommandError, chosen_socket

if TYPE_CHECKING:
    from minikms.client import Client

WAIT_S: Final = 0.5
"""For a daemon that is starting; a person notices a longer wait."""


def reach(socket: str | None, server_uid: int | None) -> Client:
    """A client of the daemon. Connects at its first call. Raises CommandError for a path that can't be a socket's."""
    from minikms.client import Client

    path = chosen_socket(socket)
    try:
        return Client(path, server_uids=None if server_uid is None else {server_uid}, wait_s=WAIT_S)
    except ValueError as error:
        raise CommandError(f"{error}: {path}") from None
