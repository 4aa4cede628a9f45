"""Orphaned keys: active keys of the key service that no thread of this store names. And lost ones: keys that a thread
names and the key service does not have.

They come from creates whose answer was lost, and from a server or a key service that was killed between the making of a
key and the write that names it. Owns: which key is an orphan, and their retirement, at a start and on request; which
is lost.
Invariants:
- A key is retired, never destroyed: what it has encrypted can still be decrypted.
- Only where this server alone makes keys of purpose `thread` (`kms.exclusive`): on a shared key service, a key that
  this store does not name may be another server's.
- Never a key that a thread names, that a create in flight may name, or of a thread that a job works on; nor one that is
  younger than ORPHAN_AGE_S.
- At a start, never a key that was made after the newest record of this store: the store may be an older copy.
- A walk reads a page of keys at a time and pauses after it, and retires at most ORPHANS_MAX keys.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import KW_ONLY, dataclass
from typing import Final, NamedTuple

from minikms import api
from minikms.api import KeyAnswer
from minikms.api.errors import KmsError, KmsRefusedError
from minikms.platform.logs import Log
from progressdb_server.conversations.whole import Conversations
from progressdb_server.jobs.runner import Kind
from progressdb_server.kms.provider import Fault, Provider, fault, key_pages
from progressdb_server.store.model import Page, StoreUnavailableError

ORPHAN_AGE_S: Final = 60
"""Longer than a create of a key may be on its way (`kms.provider`)."""
ORPHANS_MAX: Final = 10_000
"""The orphans of one walk."""
PAGE_PAUSE_S: Final = 0.1
"""Between two pages: a million keys take some minutes, in which the key service is idle most of the time."""
FOUND_PAGES_MAX: Final = 10
"""Pages of keys of which one page of orphans is chosen; so it may be short, and others follow."""
RETRY_S: Final = 30.0
RETRY_AFTER_S: Final = 10
SHARED: Final = (
    "the key service may have other users: set kms.exclusive (PROGRESSDB_KMS_EXCLUSIVE=1) if only this server makes "
    "keys of threads there"
)
MORE: Final = "more are left: repeat it"

_log = Log()


class Retired(NamedTuple):
    """How many were retired, how many orphans are left, and why."""

    retired: int
    left: int
    why: str


@dataclass(eq=False)
class OrphanedKeys(Kind):
    """`has_job`: whether a job works on a thread. Belongs to one event loop."""

    every_s = RETRY_S

    store: Conversations
    provider: Provider
    has_job: Callable[[str], bool]
    _: KW_ONLY
    exclusive: bool
    age_s: float = ORPHAN_AGE_S
    now_s: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.first_s = self.age_s  # every key of earlier runs is old enough then
        self._walking = asyncio.Lock()
        # Read now: what is written during this run says nothing about the age of the store.
        self._made_before = _rfc3339(min(self.now_s(), self.store.rekeying.newest_ns / 1_000_000_000))

    async def begin(self) -> None:
        """Retire the orphans of earlier runs, in one walk."""
        if self.exclusive:
            try:
                await self.retire(made_before=self._made_before)
            except KmsError as error:
                if fault(error) is Fault.SERVICE:
                    raise
                _log.warning("orphaned_keys_not_retired", reason=str(error))  # it would refuse again
        self.every_s = math.inf

    async def find(self, first_page: Page | None = None) -> AsyncIterator[list[KeyAnswer]]:
        """The orphans among each page of keys; all, or a page of them. Raises KmsError, StoreUnavailableError."""
        before = _rfc3339(self.now_s() - self.age_s)
        left, pages = 0 if first_page is None else first_page.limit, 0
        cursor = None if first_page is None else first_page.cursor or None
        async for page in key_pages(self.provider, state="active", cursor=cursor):
            if page.indexing:
                raise StoreUnavailableError("the key service is still reading its keys", RETRY_AFTER_S)
            # The thread's key is looked up first, so that a failing disk is noticed whatever the keys are.
            orphans = [key for key in page.keys if await self._is_orphan(key) and key.created_at < before]
            if first_page is not None:
                pages += 1
                more, orphans = len(orphans) > left, orphans[:left]
                left -= len(orphans)
                if not left or pages == FOUND_PAGES_MAX:
                    first_page.following = page.next_cursor or "" if not more else orphans[-1].key_id if orphans else ""
                    yield orphans
                    return
            yield orphans
            await asyncio.sleep(0 if page.next_cursor is None else PAGE_PAUSE_S)

    async def lost(self, page: Page | None = None) -> AsyncIterator[list[tuple[str, str]]]:
        """The threads whose key the key service does not have, with the key; those among a page of threads. Raises
        KmsError, StoreUnavailableError."""
        looked_at = 0
        async for thread in self.store.rekeying.threads("" if page is None else page.cursor):
            key_id = await self.store.rekeying.key_of_thread(thread)
            if key_id is not None and not await self._has(key_id):
                yield [(thread, key_id)]
            looked_at += 1
            if page is not None and looked_at == page.limit:
                page.following = thread
                return

    async def _has(self, key_id: str) -> bool:
        """Whether the key service has the key, or has had it: a destroyed key is not lost."""
        try:
            await self.provider.get_key(key_id)
        except KmsRefusedError as error:
            if fault(error) is Fault.SERVICE:
                raise
            return error.code != api.CODE_KEY_NOT_FOUND
        return True

    async def _is_orphan(self, key: KeyAnswer) -> bool:
        return (
            await self.store.rekeying.key_of_thread(key.thread_id) != key.key_id
            and key.purpose == "thread"
            and not self.store.rekeying.making_key(key.thread_id)
            and not self.has_job(key.thread_id)
        )

    async def retire(self, *, made_before: str = "") -> Retired:
        """Retire the orphans; with `made_before` (RFC 3339) only those that are older. One walk at a time. Raises
        KmsError, StoreUnavailableError."""
        async with self._walking:
            retired = left = 0
            async for page in self.find():
                for key in page:
                    if not self.exclusive or retired == ORPHANS_MAX or (made_before and key.created_at >= made_before):
                        left += 1
                        continue
                    if not await self._is_orphan(key):  # asked again: other tasks ran meanwhile
                        continue
                    await self.provider.retire_key(key.key_id)
                    retired += 1
                    _log.warning("orphaned_key_retired", key=key.key_id, thread=key.thread_id, made=key.created_at)
            why = "" if not left else SHARED if not self.exclusive else MORE
            return Retired(retired, left, why)


def _rfc3339(unix_s: float) -> str:
    """The time in the form of the key service, which sorts as text."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(max(0.0, unix_s)))
