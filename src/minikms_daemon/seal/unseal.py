"""Attempts to unseal the daemon, with a root key, a share of one, or the daemon's own source.

Owns: the records of the attempts since the last unseal, how much wrong ones are slowed down, the steps of an attempt
until the data directory is opened with a root key, and the shares that were entered. Invariants: one attempt at a time;
one that can't be recorded (`minikms.seal_files`) is not made; the rights are those of the policy in force after
each wait; an attempt that fails at any step leaves the daemon sealed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Final

from minikms import api
from minikms.api.errors import (
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    KmsRefusedError,
    NotSealedError,
    SealedError,
    StartError,
    StorageUnavailableError,
    TooManyAttemptsError,
    UnauthorizedError,
    UnknownRootError,
    UnsealFailedError,
    WrongRootError,
    WrongShareError,
)
from minikms.crypto.shares import ShareInfo
from minikms.datadir import read_keyring
from minikms.keys import keyring
from minikms.keys.collected_shares import COLLECT_SECONDS_MAX, CollectedShares
from minikms.keys.keyring import ShareSet
from minikms.memory.arena import SecretSlot
from minikms.platform import clock
from minikms.platform.workers import in_worker
from minikms.policy.policy import renewed
from minikms.policy.principal import Principal
from minikms.roots.providers import GivenKey, RootAwayError, RootProvider, RootRefusedError
from minikms.seal_files import Attempt, AttemptRecords, Kind, Outcome, write_attempts
from minikms_daemon.seal.opening import Opener
from minikms_daemon.seal.state import SealState
from minikms_daemon.server.keybody import SecretText
from minikms_daemon.server.run_context import RunContext
from minikms_daemon.service.encoding import Reply, json_answer

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
        wall_ns = clock.now_ns()
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


class UnsealAttempts:
    """The attempts since the last unseal, also those of an earlier process."""

    def __init__(self, directory: int, worker: Executor) -> None:
        self._directory = directory
        self._worker = worker
        self.records = AttemptRecords.load(directory)
        self._slow_down = SlowDown()
        self._slow_down.seed(self.records, time.monotonic())

    def forget(self) -> None:
        """Drops records that are in the audit log, or older than a seal. The pauses that they cause stay."""
        self.records = AttemptRecords([], 0)

    def check_pause(self, who: Principal) -> None:
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


@dataclass(eq=False, repr=False)
class Unsealing:
    """The attempts to unseal one process."""

    process: RunContext
    state: SealState
    opener: Opener
    files_closed: Callable[[], Awaitable[None]]
    open_and_serve: Callable[[Attempt, RootProvider, int], Awaitable[None]]

    def __post_init__(self) -> None:
        self.attempts = UnsealAttempts(self.process.lock.directory_fd, self.process.workers.seal)
        self.one_attempt = asyncio.Lock()
        self._shares = CollectedShares(self.process.arena)

    def status(self) -> api.UnsealStatusAnswer:
        state, attempts = self.state, self.attempts.records
        if not state.is_sealed:
            return api.UnsealStatusAnswer(sealed=False)
        return api.UnsealStatusAnswer(
            sealed=True,
            since=state.marker.at,
            by=state.marker.actor,
            stays_sealed=state.is_marked or self.process.settings.flags.sealed,
            from_source=self.opener.source_is_readable,
            shares=self._shares_progress(),
            failed_attempts=len(attempts.failed()) + attempts.dropped,
        )

    def forget_keys(self) -> None:
        """What was given, and what a source that can be read once still holds."""
        self._shares.clear()
        self.opener.discard_source()

    def unseal(self, who: Principal, text: SecretSlot | SecretText | None) -> Awaitable[Reply]:
        """Tries a root key, takes the text of a share, or (None) tries the daemon's own source. After a
        KmsRefusedError the daemon is sealed. The caller releases `text`.
        """
        return self._unseal(who, text, self.state.seals)

    async def _unseal(self, who: Principal, text: SecretSlot | SecretText | None, seals: int) -> Reply:
        async with self.one_attempt:
            self._require_rights(who)
            self._check_may_try(who, text)
            kind: Kind = "from_source" if text is None else "share" if isinstance(text, SecretText) else "root_hex"
            attempt = await self.attempts.begin(who, kind)
            await self.files_closed()
            self.state.check_no_seal_since(seals)
            try:
                self._require_rights(who)
            except KmsRefusedError:
                await self.attempts.end(attempt, "failed")
                raise
            if isinstance(text, SecretText):
                share, root = await self._take_share(attempt, text)
                if root is None:
                    return json_answer(self.status())
                try:
                    with root:
                        await self._try(who, attempt, GivenKey(root), seals)
                except WrongRootError:
                    self._shares.drop(share)
                    raise
                finally:
                    self._shares.take_back(share)  # unless it was zeroed meanwhile
            else:
                await self._try(who, attempt, self.process.settings.root if text is None else GivenKey(text), seals)
            return json_answer(api.UnsealStatusAnswer(sealed=False))

    def _require_rights(self, who: Principal) -> None:
        """After a wait, before a key is used: the policy may have changed. Raises UnauthorizedError, ForbiddenError."""
        renewed(who, self.process.policy.policy, api.UNSEAL)

    def _check_may_try(self, who: Principal, text: SecretSlot | SecretText | None) -> None:
        if not self.state.is_sealed:
            raise NotSealedError("the key service is not sealed")
        self.attempts.check_pause(who)
        if text is None and not self.opener.source_is_readable:
            raise ConflictError(
                "the daemon's source of the root key can be read once only, and was read or closed: give the root key, "
                "or restart the daemon with its source"
            )

    async def _try(self, who: Principal, attempt: Attempt, root: RootProvider, seals: int) -> None:
        """Tries to unseal. Raises WrongRootError, UnsealFailedError, SealedError, and the errors of
        `_require_rights`."""
        try:
            received = await root.ask("start", self.process.arena)
            if received is None:
                await self.open_and_serve(attempt, root, seals)
            else:
                with received.slot:
                    self.state.check_no_seal_since(seals)
                    self._require_rights(who)
                    await self.open_and_serve(attempt, received, seals)
        except UnknownRootError:
            await self.attempts.end(attempt, "wrong_root")
            given = {
                "root_hex": "this root key",
                "from_source": "the root key of the daemon's own source",
                "share": "the root key that these shares give",
            }[attempt.kind]
            raise WrongRootError(
                f"{given} does not open the keyring, or is not pinned; the daemon stays sealed"
            ) from None
        except SealedError:
            raise
        except (UnauthorizedError, ForbiddenError):
            await self.attempts.end(attempt, "failed")
            raise
        except (RootAwayError, RootRefusedError) as error:
            self.state.check_no_seal_since(seals)
            await self.attempts.end(attempt, "failed")
            raise UnsealFailedError(f"the daemon stays sealed: {error}") from None
        except (KmsRefusedError, OSError) as error:
            self.process.log.warning("unseal failed", why=str(error))
            again = "try again"
            if attempt.kind == "share":
                again = f"enter share {attempt.share} again; the others are still there"
            await self.attempts.end(attempt, "failed")
            raise UnsealFailedError(
                "the daemon stays sealed: its data directory could not be opened. Its own log says why; correct "
                f"that and {again}"
            ) from None

    # --- shares ------------------------------------------------------------------------------------------------------

    async def _take_share(self, attempt: Attempt, text: SecretText) -> tuple[ShareInfo, SecretSlot | None]:
        """The share, and the root key if it was the last one that its set needs. Raises KmsRefusedError."""
        try:
            keyring_id, sets = self._known_sets()
            info = self._shares.add(text.views(), keyring_id, sets, time.monotonic())
            attempt.share = info.number
        except WrongShareError:
            await self.attempts.end(attempt, "wrong_share")
            raise
        except (InvalidRequestError, ConflictError):
            await self.attempts.end(attempt, "refused")
            raise
        except KmsRefusedError:
            await self.attempts.end(attempt, "failed")
            raise
        finally:
            text.release()
        if self._shares.complete:
            try:
                return info, self._shares.combine()
            except KmsRefusedError:
                self._shares.take_back(info)
                await self.attempts.end(attempt, "failed")
                raise
        asyncio.get_running_loop().call_later(COLLECT_SECONDS_MAX + 1, lambda: self._shares.expire(time.monotonic()))
        await self.attempts.end(attempt, "share_kept")
        return info, None

    def _known_sets(self) -> tuple[str, list[ShareSet]]:
        """The keyring's id and sets. It is not authenticated: that decides only which shares are refused."""
        try:
            body, _, _ = keyring.parse_file(read_keyring(self.process.lock.directory))
        except StartError as error:
            self.process.log.warning("unseal failed", why=str(error))
            raise UnsealFailedError("the keyring could not be read; the daemon's own log says why") from None
        return body.keyring_id, [slot.shares for slot in body.slots if slot.shares is not None]

    def _shares_progress(self) -> api.SharesProgress | None:
        self._shares.expire(time.monotonic())
        if not self._shares.numbers:
            return None
        left_ns = int((self._shares.expires_at - time.monotonic()) * 1_000_000_000)
        return api.SharesProgress(
            set_id=self._shares.set_id,
            numbers=list(self._shares.numbers),
            threshold=self._shares.threshold,
            expires_at=clock.rfc3339(clock.now_ns() + left_ns),
        )
