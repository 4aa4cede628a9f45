"""What a change of a data directory asks before it is written here, where several hosts have the same keys.

Owns: the two types that join `minikms.custody` to whoever commits a change elsewhere first. Invariant: a change is on
this disk only after the database has confirmed it, so a directory never has what the database lacks. Without
replication nobody is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

from minikms.custody.journal_format import Change


class Written(NamedTuple):
    """One change: key files; the content of the keyring's file, empty if it stays; records that follow those of the
    tombstone file, and the keys that they name.
    """

    files: Sequence[Change] = ()
    keyring: bytes = b""
    tombstones: bytes = b""
    destroyed: Sequence[str] = ()


class Replication(Protocol):
    def committed(self, written: Written) -> AbstractAsyncContextManager[None]:
        """Inside the block the database has the change, and the caller writes it here. If the block raises, the member
        lacks a change that the database has: it serves no more until it has followed.

        Raises StandbyError, also when the outcome is not known: then the member follows.
        """
