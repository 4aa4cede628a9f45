"""Attempts to unseal: recorded before each is made, and slowed down after wrong ones.

Owns: the records since the last unseal, in memory and (`minikms.daemon.seal.files`) on disk, and the pauses. Invariant:
an attempt that can't be recorded is not made.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from concurrent.futures import Executor
from functools import partial
from typing import Final

from minikms.api.errors import StorageUnavailableError, TooManyAttemptsError
from minikms.daemon.seal.files import Attempt, AttemptRecords, Kind, Outcome, write_attempts
from minikms.platform.clock import now_ns
from minikms.platform.workers import in_worker
from minikms.policy import Principal

FREE_FAILURES: Final = 5
"""So many wrong attempts of one caller in FAILURE_SECONDS cost no pause. Each further one doubles it, from 1 s."""
FREE_FAILURES_IN_ALL: Final = 20
PAUSE_SECONDS_MAX: Final = 60
PAUSE_IN_ALL_SECONDS_MAX: Final = 10
"""Shorter, so that one caller's wrong attempts can't keep out the others for long."""
FAILURE_SECONDS: Final = 3600
FAILURES_KEPT: Final = 64


class SlowDown:
    """When a caller may try again. Times are seconds of a monotonic clock, passed in.

    A wrong or refused attempt counts for FAILURE_SECONDS. Attempts before a restart count too (`seed`).
    """

    def __init__(self) -> None:
        self._by_actor: dict[str, deque[float]] = {}
        self._in_all: deque[float] = deque(maxlen=FAILURES_KEPT)

    def seed(self, records: AttemptRecords, now_s: float) -> None:
        """Adds the failures of an earlier process, by the wall clock. A time in the future counts as now."""
        wall_ns = now_ns()
        for record in records.slowed():
            self.failed(record.actor, now_s - max(0, wall_ns - record.at_ns) / 1_000_000_000)

    def failed(self, actor: str, at_s: float) -> None:
        """A wrong attempt. Only callers with the role `unseal` get here, so there are few actors."""
        self._by_actor.setdefault(actor, deque(maxlen=FAILURES_KEPT)).append(at_s)
        self._in_all.append(at_s)

    def wait_s(self, actor: str, now_s: float) -> int:
        """Whole seconds until this caller may try; 0: now."""
        own = _pause_left(self._by_actor.get(actor, deque()), FREE_FAILURES, PAUSE_SECONDS_MAX, now_s)
        return max(own, _pause_left(self._in_all, FREE_FAILURES_IN_ALL, PAUSE_IN_ALL_SECONDS_MAX, now_s))


def _pause_left(failures: deque[float], free: int, pause_max: int, now_s: float) -> int:
    recent = [at_s for at_s in failures if now_s - at_s < FAILURE_SECONDS]
    if len(recent) < free:
        return 0
    pause = min(pause_max, 1 << min(len(recent) - free, 16))
    left = max(recent) + pause - now_s
    return 0 if left <= 0 else int(left) + 1


class Attempts:
    """The attempts since the last unseal, also those of an earlier process."""

    def __init__(self, directory: int, worker: Executor) -> None:
        self._directory = directory
        self._worker = worker
        self.records = AttemptRecords.load(directory)
        self._slow_down = SlowDown()
        self._slow_down.seed(self.records, time.monotonic())

    def forget(self) -> None:
        """They are in the audit log, or of before a seal. What they slow down stays."""
        self.records = AttemptRecords([], 0)

    def check_pause(self, who: Principal) -> None:
        """Raises TooManyAttemptsError."""
        wait_s = self._slow_down.wait_s(who.actor, time.monotonic())
        if wait_s:
            raise TooManyAttemptsError(
                f"too many wrong attempts: this one was not made; try again in {wait_s} s", wait_s
            )

    async def begin(self, who: Principal, kind: Kind) -> Attempt:
        """The attempt, durable. Raises StorageUnavailableError; then it is not made."""
        attempt = self.records.begin(who, kind)
        try:
            await self._store()
        except StorageUnavailableError:
            self.records.take_back(attempt)
            raise StorageUnavailableError(
                "the attempt could not be recorded in the data directory, so it was not made: free space there"
            ) from None
        return attempt

    async def end(self, attempt: Attempt, outcome: Outcome) -> None:
        attempt.outcome = outcome
        if attempt in self.records.slowed():
            self._slow_down.failed(attempt.actor, time.monotonic())
        with contextlib.suppress(StorageUnavailableError):  # then it stands on disk as `begun`
            await self._store()

    async def _store(self) -> None:
        await in_worker(self._worker, partial(write_attempts, self._directory, self.records.encode()))
