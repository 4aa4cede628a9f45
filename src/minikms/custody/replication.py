"""The hook that commits a change in the database before it is written here, where several hosts have the same keys.

Owns: the types of the hook. Invariant: a change is on this disk only after the database has confirmed it, so a
directory never has what the database lacks. Without replication there is no hook.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
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

    def require_serving(self) -> None:
        """Checks that changes are taken. Raises StandbyError."""

    async def serving(self) -> None:
        """Returns when changes are taken. For work that a member goes on with only while it serves."""


async def committed_first(replication: Replication, written: Written, write: Callable[[], Awaitable[None]]) -> None:
    """`write` after the change is confirmed. Both end before this does, even if the caller is cancelled: it may hold
    the locks of what changes.
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
