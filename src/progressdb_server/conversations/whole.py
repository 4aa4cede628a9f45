"""The whole store of a running server: the parts of a store with a key service, and the work that it does by itself.

Owns: the composition, the format check at opening, the hourly sweep of retries and of the claims of killed servers, and
the watches over the key service's epoch and the clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from minikms import api
from minikms.api.errors import KmsError, KmsProtocolError, KmsRefusedError, SealedError
from minikms.platform.clock import boot_ns
from minikms.platform.logs import Log
from progressdb_server.conversations.members import Members
from progressdb_server.conversations.membership import Rule
from progressdb_server.conversations.messages import Messages
from progressdb_server.conversations.purging import Purging
from progressdb_server.conversations.reading import Reading
from progressdb_server.conversations.rekeying import Rekeying
from progressdb_server.conversations.threads import NamedLocks, Threads
from progressdb_server.conversations.validators import Validators
from progressdb_server.kms.provider import SEALED, Fault, Provider, fault
from progressdb_server.metrics import StoreMetrics
from progressdb_server.store import idempotency
from progressdb_server.store.backup import Backups
from progressdb_server.store.claims import Claims
from progressdb_server.store.engine import Engine
from progressdb_server.store.epoch import OLDER_STATE, EpochMemory, RestoredError
from progressdb_server.store.idempotency import Retries
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import Page, StoreError, StoreUnavailableError
from progressdb_server.store.sealer import Sealer, store_error

SWEEP_S: Final = 3600
EPOCH_S: Final = 10
"""Between two looks at the key service's epoch and audit head."""
LOOK_S_MAX: Final = 2.0
"""For the look at a clean stop, and for one that a caller waits for."""
SEALED_S: Final = 1
"""The same, while the key service is sealed."""
CLOCK_S: Final = 10
"""Between two looks at the clock."""
CLOCK_JUMP_S: Final = 60
"""A step of the system clock, or a distance of it to the newest stamp, that is worth a warning."""

CLOCK_DIFFERS: Final = (
    "the clocks of this machine and of the database differ: set the wrong one. The server takes the database's time"
)
CLOCK_OF_NODE: Final = (
    "the clock of the database's node jumped by {} seconds, and the clock of this machine did not: set it. Until then, "
    "or until a restart, the server goes on with the earlier time"
)
STORE_EMPTY: Final = (
    "the store had no thread at the start, and its key service has keys in use ({:,} active). Unless this is a new "
    "store beside the keys of others, stop the server: a disk is not mounted, or another directory was named"
)
CLOCK_BEHIND: Final = (
    "the newest record is from the future of the system clock: the clock was ahead before, or is behind now. Check it. "
    "Ids and lists keep their order"
)
CLOCK_JUMPED: Final = (
    "the system clock was set. Check that it is right: times of messages come from it. Ids and lists keep their order"
)

_log = Log()


def _era_begun(before: Stamp, first: Stamp) -> None:
    _log.warning(
        "clock_was_in_the_future",
        seconds=(before.time_ns - first.time_ns) // 1_000_000_000,
        era=first.era,
        reason="new records get the time of the system clock again, and sort after those from the future",
    )


def _are_near(one_ns: int, other_ns: int) -> bool:
    return abs(one_ns - other_ns) <= CLOCK_JUMP_S * 1_000_000_000


class Conversations:
    """The whole store, for routes, jobs, the viewer and commands. Open it in the event loop that uses it.

    Its parts make all times and ids. In their methods `author=None` means that the caller may act for anybody (admin).
    Each method may raise StoreUnavailableError and KeyServiceRefusedError; each that reads may raise
    RecordUnreadableError, each that changes an existing thread ThreadKeyDestroyedError. `Messages.update` and
    `Messages.set_reaction` raise TooManyVersionsError.
    """

    def __init__(
        self, engine: Engine, provider: Provider, *, rule: Rule = "members", now_ns: Callable[[], int] = time.time_ns
    ) -> None:
        """Opens the store. Raises FormatError when a newer version wrote the directory; StoreUnavailableError."""
        self.engine = engine
        self.metrics = StoreMetrics()
        self.clock = Clock(now_ns)
        self.reads = engine.reads
        self.writer = engine.writer(self.clock, self.metrics, self._reopened)
        self.claims = Claims(engine, self.writer)
        self.sealer = Sealer(self.reads, self.writer, provider, self.clock, self.metrics)
        locks, retries = NamedLocks(), Retries(engine, self.writer, self.clock)
        parts = self.reads, self.writer, self.clock, self.sealer
        self.threads = Threads(*parts, locks, retries)
        self.members = Members(engine, self.writer, self.threads, locks, rule)
        self.reading = Reading(self.reads, self.sealer, Validators(remembers=engine.sole))
        self.messages = Messages(*parts, self.threads, self.members, self.reading, locks, retries)
        self.rekeying = Rekeying(self.reads, self.writer, self.sealer, self.claims, self.reading.validators)
        self.purging = Purging(self.reads, self.writer, self.sealer, self.threads, self.reading)
        self.backups = Backups(engine, self.writer, self.clock)
        self.clock_notice = ""
        self.empty_notice = ""
        self._is_emptiness_judged = False
        self.epoch = EpochMemory(self.reads, self.writer)
        self._epoch_lock = asyncio.Lock()
        self._accepts_restore = False
        """Whether the first state that is judged may be an older one: the key service was sealed at the start."""
        self._provider = provider
        self._offset_ns = 0
        self._background: list[asyncio.Task[None]] = []
        self.clock.on_era = _era_begun
        self.metrics.gauges |= {
            "progressdb_store_queued_writes": ("Writes that wait for the next group.", lambda: self.writer.queued),
            "progressdb_store_clock_ahead_seconds": (
                "How far the newest stamp is ahead of the system clock.",
                lambda: self.clock.ahead_ns / 1_000_000_000,
            ),
            "progressdb_store_backup_timestamp_seconds": (
                "When the newest registered backup was begun; 0 without one, NaN while that can't be read.",
                lambda: self.backups.newest_ns / 1_000_000_000,
            ),
            "progressdb_store_unreadable_records": (
                "Records that could not be read at their last reading, without those whose key was destroyed.",
                lambda: len(self.sealer.unreadable),
            ),
            "progressdb_store_damaged_files": (
                "Files of the store in which damage was met since the start.",
                lambda: len(engine.damaged),
            ),
            "progressdb_store_available": ("1 when the store takes writes.", lambda: self.writer.available),
        }

    async def start(self, *, accept_restore: bool = False) -> None:
        """Ask the key service for its epoch, and begin the background work.

        While the key service is sealed it reports no epoch: no record is sealed before it was judged. Reads work as
        soon as the key service is unsealed.

        Raises RestoredError when the key service's state is older than what this store has seen, unless
        `accept_restore`; StoreUnavailableError when it does not answer, or says that it can't serve.
        """
        offset_ns = await self._take_time()
        await self.backups.look_at_newest()
        try:
            status = await self.epoch.observe(self._provider.status, accept_restore=accept_restore)
            if status.status == api.CODE_SEALED:
                _log.warning("kms_sealed", reason=SEALED)
                self.sealer.halt_sealed()
            if status.status not in ("ok", api.CODE_SEALED):
                reason = status.reason or status.status or "it reports no status"
                raise StoreUnavailableError(f"the key service can't serve: {reason}")
            await self._judge_emptiness(status)
        except KmsError as error:
            if not isinstance(error, KmsRefusedError) or fault(error) is Fault.SERVICE:
                raise store_error(error) from error
            # Without the role `monitor` there is nothing to judge by.
            _log.warning("kms_status_refused", code=error.code)
        self._accepts_restore = accept_restore and self.sealer.halted is not None
        loop = asyncio.get_running_loop()
        self._judge_clock()
        self._background = [
            loop.create_task(work)
            for work in (
                self._sweep(),
                self.claims.keep(),
                self._watch_epoch(),
                self._watch_clock(offset_ns),
            )
        ]

    async def close(self) -> None:
        """Remembers how far the key service is, commits what is queued, then closes the engine. The provider is the
        caller's.
        """
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._background:
            with contextlib.suppress(KmsError, StoreError, RestoredError, TimeoutError):  # the next start judges
                async with asyncio.timeout(LOOK_S_MAX):
                    await self.epoch.observe(self._provider.status)
        await self.writer.close()
        await self.engine.end()

    def _reopened(self) -> None:
        """Writes that were read before may have been lost."""
        self.sealer.forget()
        self.reading.validators.forget()

    @property
    def notices(self) -> list[str]:
        """What an operator should know although the store works."""
        return [notice for notice in (self.empty_notice, self.clock_notice, self.engine.notice) if notice]

    async def _sweep(self) -> None:
        while True:
            try:
                await self.claims.sweep()
                await idempotency.sweep(self.reads, self.writer, self.clock.now_ns())
            except Exception as error:  # noqa: BLE001 - whatever ends one sweep, the next one is made
                _log.warning("sweep_failed", error=type(error).__qualname__, again_s=SWEEP_S)
            await asyncio.sleep(SWEEP_S)

    async def _take_time(self) -> int:
        """How far the clock is ahead of CLOCK_BOOTTIME, which no one sets and which goes on while the machine sleeps.

        On a database that several servers share, it is the database's clock, from here on also for stamps and for
        what expires: one server with a wrong clock would delete what the others have just made, and move their stamps
        into the future. So would a new node of the database with a wrong clock: its time is not taken if the clock of
        this machine agrees with the earlier one. Raises StoreUnavailableError."""
        shared = not self.engine.sole
        now_ns = await self.engine.now_ns() if shared else self.clock.now_ns()
        offset_ns = now_ns - boot_ns()
        if shared:
            own_ns = time.time_ns() - boot_ns()
            jump_s = (offset_ns - self._offset_ns) // 1_000_000_000
            if self._offset_ns and abs(jump_s) > CLOCK_JUMP_S and _are_near(own_ns, self._offset_ns):
                if not self.clock_notice:
                    _log.error("clock_of_node_refused", seconds=jump_s, reason=CLOCK_OF_NODE.format(jump_s))
                self.clock_notice = CLOCK_OF_NODE.format(jump_s)
                return self._offset_ns
            self.clock_notice = "" if _are_near(own_ns, offset_ns) else CLOCK_DIFFERS
            self._offset_ns = offset_ns
            self.clock.now_ns = lambda: self._offset_ns + boot_ns()
        return offset_ns

    async def _judge_emptiness(self, status: api.StatusAnswer) -> None:
        """Says until the end of the process that the store was empty beside keys in use, once the keys are counted."""
        if self._is_emptiness_judged or status.keys.indexing:
            return
        self._is_emptiness_judged = True
        active = status.keys.by_state.get("active", 0)
        if active and not (await self.engine.counted()).threads:
            self.empty_notice = STORE_EMPTY.format(active)
            _log.warning("store_is_empty", reason=self.empty_notice)

    def _judge_clock(self) -> None:
        """Warn if the newest stamp is in the future: the clock was there before, or is wrong now. Warn if the machine
        has another time than the database."""
        differs_s = (time.time_ns() - self.clock.now_ns()) // 1_000_000_000
        if self._offset_ns and abs(differs_s) > CLOCK_JUMP_S:
            _log.warning("clock_differs_from_database", seconds=differs_s, reason=CLOCK_DIFFERS)
        ahead_s = self.clock.ahead_ns // 1_000_000_000
        if ahead_s > CLOCK_JUMP_S:
            _log.warning("clock_behind_store", seconds=ahead_s, reason=CLOCK_BEHIND)

    async def _watch_clock(self, offset_ns: int) -> None:
        """Warn when the clock is set. Look whether somebody has registered a backup."""
        while True:
            await asyncio.sleep(CLOCK_S)
            try:
                await self.backups.look_at_newest()
                now_ns = await self._take_time()
            except StoreUnavailableError:
                continue  # the clock goes on as it was
            jump_s = (now_ns - offset_ns) // 1_000_000_000
            offset_ns = now_ns
            if abs(jump_s) > CLOCK_JUMP_S:
                _log.warning("clock_jumped", seconds=jump_s, reason=CLOCK_JUMPED)

    async def _watch_epoch(self) -> None:
        """An older key service that replaces the right one while the server runs must not encrypt anything."""
        while True:
            if self.sealer.halted == SEALED:
                await asyncio.sleep(SEALED_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(EPOCH_S):
                        await self.sealer.seen_sealed.wait()
            await self._judge_epoch()

    async def _judge_epoch(self) -> None:
        """Lets records be sealed, or no longer, by what the key service says now."""
        async with self._epoch_lock:
            seen_sealed = self.sealer.seen_sealed
            seen_sealed.clear()
            try:
                status = await self.epoch.observe(self._provider.status, accept_restore=self._accepts_restore)
                if status.status == api.CODE_SEALED:
                    self.sealer.halt_sealed()
                    return
                await self._judge_emptiness(status)
                if not seen_sealed.is_set():  # else the answer may be older than the seal
                    self.sealer.halted = None
                    self._accepts_restore = False
            except RestoredError as error:
                _log.error("kms_restored", reason=str(error))
                self.sealer.halted = OLDER_STATE
            except KmsProtocolError as error:
                _log.error("kms_epoch_unknown", reason=type(error).__name__)
                self.sealer.halted = "the key service's answer to /status is not valid, so its age is not known"
            except (KmsError, StoreError) as error:
                if isinstance(error, SealedError):
                    self.sealer.halt_sealed()
                _log.warning("kms_epoch_unknown", reason=type(error).__name__)
            except Exception as error:  # noqa: BLE001 - whatever ends one look, the next one is made
                _log.error("kms_epoch_unknown", reason=type(error).__qualname__)
                self.sealer.halted = "the age of the key service's state could not be judged"

    async def check_writes(self) -> None:
        """Returns if a write would be taken now; it writes nothing that lasts. A key service that was sealed is asked
        whether it still is. Raises StoreUnavailableError, whose text says why not."""
        if self.sealer.halted == SEALED:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S_MAX):
                    await self._judge_epoch()
        self.sealer.check_halted()
        await self.engine.check_writable()
        await self.writer.check_writable()

    # --- for operators --------------------------------------------------------------------------------------------
    async def stats(self) -> dict[str, int]:
        """`threads` and `messages` (stored versions)."""
        counted = await self.engine.counted()
        return {"threads": counted.threads, "messages": counted.messages}

    async def stored_keys(self, prefix: str, page: Page | None = None) -> AsyncIterator[list[str]]:
        """Storage keys, for an operator: all, or a page."""
        last, left = "", 0 if page is None else page.limit
        async for keys in self.reads.walk_keys(prefix.encode(), b"" if page is None else page.cursor.encode()):
            key_ids = [key.decode() for key in keys]
            if page is not None and len(key_ids) > left:
                key_ids = key_ids[:left]
                page.following = key_ids[-1] if key_ids else last
                yield key_ids
                return
            last, left = key_ids[-1] if key_ids else last, left - len(key_ids)
            yield key_ids

    async def raw_value(self, key: str) -> bytes | None:
        """What is stored at a storage key, as it is stored."""
        return await self.reads.get(key.encode())
