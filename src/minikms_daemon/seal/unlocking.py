"""The daemon asks the unlock service: for its root key while it waits for it, and to renew its lease.

Owns: when it asks, the lease, and what `/status`, `/metrics` and the log say about both. Invariants: the event loop
never waits for the service; a lease is renewed only before its end, by a root key of the open keyring; what a question
gave is zeroed. It must never unseal what a request has sealed.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Final, Literal

from minikms.api.errors import KmsRefusedError
from minikms.crypto import roots
from minikms.http import Application
from minikms.keys import keyring
from minikms.platform import clock
from minikms.roots.providers import RootAwayError, RootRefusedError
from minikms.roots.unlock_service import ReceivedKey, UnlockService
from minikms.seal_files import SEALED_TEXT, LeaseEnd
from minikms_daemon.server.admission import Session
from minikms_daemon.server.lease import Lease, LeasedApplication
from minikms_daemon.server.run_context import RunContext

RETRY_SECONDS: Final = 1.0
"""Before the second question; doubled before each further one, up to the next."""
RETRY_SECONDS_MAX: Final = 15.0
CHECK_SECONDS: Final = 0.5
"""How often the end of the lease is looked for. Each request and each answer looks for it too."""

NANOSECONDS: Final = 1_000_000_000

Outcome = Literal["granted", "refused", "away"]
WAITING_TEXT: Final = (
    "the key service is sealed: it waits for the unlock service to give the root key, and then it goes on by itself"
)


@dataclass(eq=False, repr=False)
class Unlocking:
    """One task at a time; none where another source has the root key. `unseal` opens the data directory; `lapse` seals,
    because the lease was `refused` or has `ended`; `body` is that of the open keyring.
    """

    process: RunContext
    unseal: Callable[[ReceivedKey], Awaitable[None]]
    lapse: Callable[[LeaseEnd, str], Application[Session]]
    body: Callable[[], keyring.Body | None]

    def __post_init__(self) -> None:
        source = self.process.settings.root
        self._service = source if isinstance(source, UnlockService) else None
        seconds = self.process.settings.flags.root_lease
        self._lease = None if seconds is None else Lease(seconds)
        self._outcomes: Counter[Outcome] = Counter()
        self._granted_at = ""
        self._failure = ""
        self._task: asyncio.Task[None] | None = None
        self._waits = False

    # --- what happens to the daemon ----------------------------------------------------------------------------------

    @property
    def asks(self) -> bool:
        """Whether the root key comes from the unlock service."""
        return self._service is not None

    def wait(self) -> None:
        """The daemon has no key, and nobody has sealed it."""
        if self._service is not None:
            self._go_on_with(self._until_unsealed(self._service))
            self._waits = True

    def served(self, asked_ns: int) -> None:
        """It is unsealed, by a root key that was asked for, or given, at `asked_ns`."""
        self._failure = ""
        work = None
        if self._lease is not None and self._service is not None:
            work = self._keep_lease(self._lease, self._service)
        self._go_on_with(work)
        self._granted(asked_ns)

    def stop(self) -> None:
        """A request has sealed it, or the process ends: nothing is asked any more."""
        self._go_on_with(None)

    def stop_waiting(self) -> None:
        """The process is about to end: a daemon without a key stays so."""
        if self._waits:
            self.stop()

    def _go_on_with(self, work: Coroutine[object, object, None] | None) -> None:
        self._waits = False
        if self._lease is not None:
            self._lease.end()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = None if work is None else asyncio.ensure_future(work)

    # --- the two tasks -----------------------------------------------------------------------------------------------

    async def _until_unsealed(self, service: UnlockService) -> None:
        own, pause_s = self._task, RETRY_SECONDS
        while True:
            try:
                received = await service.ask("start", self.process.arena)
                with received.slot:
                    await self.unseal(received)
            except Exception as error:  # noqa: BLE001  after any failure the daemon waits on
                if self._task is own:
                    self._failed(error)
                elif not isinstance(error, KmsRefusedError):  # a refusal: it was sealed after the unseal
                    self.process.on_internal_error(f"{type(error).__name__} after an unseal")
            if self._task is not own:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_SECONDS_MAX)

    async def _keep_lease(self, lease: Lease, service: UnlockService) -> None:
        next_s, pause_s = 0.0, RETRY_SECONDS
        now_s = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if lease.is_due(clock.boot_ns()) and now_s() >= next_s:
                try:
                    await self._renew(lease, service)
                    pause_s = RETRY_SECONDS
                except RootRefusedError as error:
                    self._failed(error)
                    self.lapse("refused", str(error))
                    return
                except Exception as error:  # noqa: BLE001  whatever it is, the lease has its end
                    self._failed(error)
                    next_s, pause_s = now_s() + pause_s, min(2 * pause_s, RETRY_SECONDS_MAX)
            if not lease.left_ns(clock.boot_ns()):
                self.lapse("ended", self._failure)
                return

    async def _renew(self, lease: Lease, service: UnlockService) -> None:
        """Renews the lease. Raises the errors of `UnlockService.ask`, and RootAwayError for another root key."""
        left_s = lease.left_ns(clock.boot_ns()) / NANOSECONDS
        try:
            async with asyncio.timeout(left_s):
                received = await service.ask("renew", self.process.arena)
        except TimeoutError:
            raise RootAwayError("the unlock service has not answered before the end of the lease") from None
        with received.slot as root:
            body = self.body()
            slot = None if body is None else body.slot_for(roots.fingerprint(root.view))
            if slot is None or not hmac.compare_digest(roots.commitment(root.view, slot.slot_id), slot.commitment):
                raise RootAwayError("the unlock service has given a root key that does not open the keyring in use")
        if lease.left_ns(clock.boot_ns()):
            self._granted(received.asked_ns)

    def _granted(self, asked_ns: int) -> None:
        if self._lease is not None:
            self._lease.grant(asked_ns)
        if self._failure:
            self.process.log.info("root key lease renewed")
        self._failure = ""
        self._granted_at = clock.now_rfc3339()
        self._outcomes["granted"] += 1

    def _failed(self, error: Exception) -> None:
        """Logs it, unless the last question failed in the same way."""
        self._outcomes["refused" if isinstance(error, RootRefusedError) else "away"] += 1
        if not isinstance(error, KmsRefusedError | OSError):
            self.process.on_internal_error(f"{type(error).__name__} while the unlock service was asked")
        why = str(error) if isinstance(error, KmsRefusedError) else type(error).__name__
        if why != self._failure:
            self.process.log.warning("no root key from the unlock service", why=why)
        self._failure = why

    # --- what is shown -----------------------------------------------------------------------------------------------

    def leased(self, app: Application[Session]) -> Application[Session]:
        """The application of an unsealed daemon, behind the lease if there is one."""
        if self._lease is None:
            return app
        return LeasedApplication(app, lease=self._lease, ended=lambda: self.lapse("ended", self._failure))

    def why_sealed(self, whole: bool) -> str:
        """The sentence that says why the daemon is sealed. `whole`: with the reason of the last failure."""
        if not self._waits:
            return SEALED_TEXT
        return f"{WAITING_TEXT}; the last try: {self._failure}" if whole and self._failure else WAITING_TEXT

    def status(self) -> dict[str, object] | None:
        """The lease in `/status`; None without one."""
        if self._lease is None:
            return None
        return {
            "seconds": self._lease.length_ns // NANOSECONDS,
            "left_seconds": self._lease.left_ns(clock.boot_ns()) // NANOSECONDS,
            "granted_at": self._granted_at,
            "last_failure": self._failure,
            "outcomes": {outcome: self._outcomes[outcome] for outcome in ("granted", "refused", "away")},
        }
