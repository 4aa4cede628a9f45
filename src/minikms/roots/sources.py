"""The text that names where a root key is, such as `file:PATH`.

Invariants: a root key is never a part of a source, and an error never quotes a source, since a key could have been
given by mistake. It imports nothing that a command would wait for.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, cast, get_args

from minikms.api.errors import StartError

SourceName = Literal["file", "fd", "dev", "systemd-credential", "unlock", "shares", "passphrase"]


class Source(NamedTuple):
    """`argument`: what follows the colon."""

    name: SourceName
    argument: str


def parse_source(text: str) -> Source:
    """Parses the text of a source; an error lists the sources that exist."""
    name, colon, argument = text.partition(":")
    if not colon or name not in get_args(SourceName):
        raise StartError(
            "a source of a root key is file:PATH, fd:NUMBER, dev:, systemd-credential:NAME or unlock:SOCKET (and for "
            "some commands shares: and passphrase:); the key itself is never given on the command line"
        )
    return Source(cast("SourceName", name), argument)
