"""The door for changes of key files and of the keyring, and the commit in the database that comes first.

Owns: the order of the two writes, where several hosts have the same keys. Invariant: a change is on this disk only
after the database has confirmed it, so a directory never has what the database lacks. A follower alone writes what is
confirmed already, without this door.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import NamedTuple, Protocol

from minikms.custody.deks import HeldKeys
from minikms.custody.journal import Journal
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

    def require_serving(self) -> None:
        """Checks that changes are taken. Raises StandbyError."""

    async def serving(self) -> None:
        """Returns when changes are taken. For work that a member goes on with only while it serves."""


class Changes:
    """Writes changes in a data directory. `replication` is None where this host alone has the keys."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.replication: Replication | None = None

    async def create(self, changes: Sequence[Change]) -> None:
        """Makes the files of new keys, as `Journal.create`."""
        await self.write(Written(changes), partial(self._journal.create, changes))

    async def replace(self, held: HeldKeys, changes: Sequence[Change], stamp: str = "") -> None:
        """Changes the files of keys, as `Journal.replace`."""
        await self.write(Written(changes), partial(self._journal.replace, held, changes, stamp))

    async def write(self, written: Written, write: Callable[[], Awaitable[None]]) -> None:
        """Awaits `write`, after the change is confirmed."""
        if self.replication is None:
            await write()
        else:
            await _committed_first(self.replication, written, write)

    def require_serving(self) -> None:
        """Checks that changes are taken. Raises StandbyError."""
        if self.replication is not None:
            self.replication.require_serving()

    async def serving(self) -> None:
        """Returns when changes are taken: at once, unless this is the directory of a member that does not serve."""
        if self.replication is not None:
            await self.replication.serving()


async def _committed_first(replication: Replication, written: Written, write: Callable[[], Awaitable[None]]) -> None:
    """Awaits `write` after the change is confirmed. Both end before this does, even if the caller is cancelled: it may
    hold the locks of what changes.
    """

    async def change() -> None:
        async with replication.committed(written):
            await write()

    changing = asyncio.ensure_future(change())
    try:
        await asyncio.shield(changing)
    except asyncio.CancelledError:
        while not changing.done():
            try:
                await asyncio.wait([changing])
            except asyncio.CancelledError:
                continue
        if not changing.cancelled():
            changing.exception()  # nobody waits for it
        raise
    finally:
        del changing  # the traceback of its error leads to this frame
