"""Which threads' keys are due: by age, by uses, by the KEK that they are wrapped under, or all.

Owns: the rules. Invariants: only a thread's current key of purpose `thread` counts; memory is bounded by pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Final

import msgspec

from minikms.api import KeyAnswer
from progressdb_server.kms.provider import Provider
from progressdb_server.store import keyspace
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, Reader

USES_MAX: Final = 1 << 31
"""Half of what a key may seal under random nonces (2^32): such a key is rotated by itself, whatever is configured."""
PAGE_PAUSE_S: Final = 0.02
"""Between two pages of keys, each of which the key service reads from files."""


class Due(msgspec.Struct, frozen=True):
    """A key is due when it is at least this old, has at least so many uses, or is under this KEK version; None: never
    for that."""

    age_s: int | None = None
    uses: int | None = None
    kek_version: int | None = None

    def why(self, key: KeyAnswer, now_ns: int) -> str:
        """The reason in a word, empty when the key is not due."""
        if self.uses is not None and key.uses_max >= self.uses:
            return "uses"
        if self.age_s is not None and now_ns - _nanoseconds(key.created_at) >= self.age_s * 1_000_000_000:
            return "age"
        return "kek_version" if self.kek_version is not None and key.kek_version == self.kek_version else ""


async def due_threads(reader: Reader, provider: Provider, due: Due, now_ns: int) -> AsyncIterator[tuple[str, str]]:
    """Each thread whose current key is due, with the reason. Raises ProviderError."""
    cursor: str | None = None
    while True:
        page = await provider.list_keys(state="active", cursor=cursor)
        for key in page.keys:
            why = due.why(key, now_ns) if key.purpose == "thread" else ""
            if why and reader.get(keyspace.key_map(key.thread_id)) == key.key_id.encode():
                yield key.thread_id, why
        cursor = page.next_cursor
        if cursor is None:
            return
        await asyncio.sleep(PAGE_PAUSE_S)


async def all_threads(reader: Reader) -> AsyncIterator[str]:
    """Every thread that has a key."""
    lower, upper = keyspace.MAP, keyspace.after(keyspace.MAP)
    while entries := reader.scan(lower, upper, limit=SCAN_ENTRIES_MAX):
        lower = entries[-1][0] + b"\0"
        for key, _ in entries:
            yield keyspace.unpart(key[len(keyspace.MAP) :])
        await asyncio.sleep(0)


def _nanoseconds(rfc3339: str) -> int:
    moment = datetime.fromisoformat(rfc3339)
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
