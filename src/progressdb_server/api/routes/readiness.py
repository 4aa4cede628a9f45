"""Whether the server can do its work: does the disk take writes, does the key service answer.

Owns: `Probe`, a question that is asked at most once at a time and whose answer is kept for a moment; the two questions;
`/readyz` and `/admin/readiness`. Invariants: however many callers ask, the key service and the disk are asked at most
every FAULT_AGE_S; a caller waits at most PROBE_S_MAX, and at most KNOWN_S_MAX once a problem is known; an
expired answer counts only if it names a problem, and for PROBE_AGE_S; a caller without an API key learns ready,
damaged, empty or not ready, and never why; the log has each change of an answer and no single probe. `/healthz` stays
the liveness of this process alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from minikms import api
from minikms.api.errors import KmsError, KmsRefusedError, LimitExceededError
from minikms.platform.logs import Log
from progressdb_server.api.gate.errors import ApiError, retry_after
from progressdb_server.api.gate.keys import OPERATORS
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import ApiResponse, json_response
from progressdb_server.api.openapi.description import NOTHING, TEXT, Operation, list_of, object_of, operations_of, texts
from progressdb_server.conditions import Look
from progressdb_server.conversations.whole import Conversations
from progressdb_server.kms.provider import SEALED, Fault, fault
from progressdb_server.metrics import KmsMetrics
from progressdb_server.store.model import StoreUnavailableError

PROBE_AGE_S: Final = 5.0
FAULT_AGE_S: Final = 1.0
"""How long a good answer counts, and one that names a problem. Each question to the key service is a line of its audit
log."""
PROBE_S_MAX: Final = 3.0
KNOWN_S_MAX: Final = 0.5
"""How long a caller waits for an answer, and how long where a problem is known already."""
NOT_READY: Final = "not ready"
READY_PATH: Final = "/readyz"

_log: Final = Log()


class Probe:
    """Asks whether something works. The answer is a sentence about what is wrong, empty if nothing is."""

    def __init__(
        self, name: str, ask: Callable[[], Awaitable[str]], silent: str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`name` is for the log. `silent`: the answer for as long as `ask` has not returned in time."""
        self._name = name
        self._ask = ask
        self._silent = silent
        self._clock = clock
        self._answer = ""
        self._logged = ""
        self._expires_s = clock()
        self._running: asyncio.Task[None] | None = None

    async def problem(self) -> str:
        if self._running is None:
            if self._clock() < self._expires_s:
                return self._answer
            self._running = asyncio.get_running_loop().create_task(self._run())
        known = self._answer if self._clock() < self._expires_s + PROBE_AGE_S else ""
        done, _ = await asyncio.wait({self._running}, timeout=KNOWN_S_MAX if known else PROBE_S_MAX)
        if not done and not known:
            self._answer, self._expires_s = self._silent, self._clock()
            self._log_change()
        return self._answer

    def _log_change(self) -> None:
        if bool(self._answer) != bool(self._logged):
            level = _log.warning if self._answer else _log.info
            level("not_ready" if self._answer else "ready_again", part=self._name, reason=self._answer or None)
        self._logged = self._answer

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})

    async def _run(self) -> None:
        try:
            self._answer = await self._ask()
        except Exception as error:  # noqa: BLE001 - a defect must not look like a server that is ready
            _log.error("probe_failed", error=type(error).__qualname__)
            self._answer = "internal error"
        finally:
            self._log_change()
            self._expires_s = self._clock() + (FAULT_AGE_S if self._answer else PROBE_AGE_S)
            self._running = None


class Readiness:
    """`status` asks the key service for its status; it should fail fast when the key service is away. `kms` remembers
    what it reports. Once `drain` is set, the server is not ready: it is about to stop."""

    def __init__(
        self,
        store: Conversations,
        status: Callable[[], Awaitable[api.StatusAnswer]],
        kms: KmsMetrics,
        drain: asyncio.Event | None = None,
    ) -> None:
        self._store = store
        self._status = status
        self.kms = kms
        self._drain = drain or asyncio.Event()
        self.status: api.StatusAnswer | None = None
        """What the key service reported the last time; None if it did not."""
        self.writes = Probe("writes", self._ask_store, "the disk has not answered for some seconds")
        hangs = "it has not answered for some seconds: it hangs"
        self.key_service = Probe("key service", self._ask_key_service, hangs)

    async def close(self) -> None:
        await self.writes.close()
        await self.key_service.close()

    async def problems(self) -> tuple[str, str]:
        """What is wrong with writes, and with the key service; empty if nothing is."""
        writes, key_service = await asyncio.gather(self.writes.problem(), self.key_service.problem())
        return writes, key_service

    async def _ask_store(self) -> str:
        try:
            await self._store.check_writes()
        except StoreUnavailableError as error:
            return str(error)
        return ""

    async def _ask_key_service(self) -> str:
        try:
            self.status = status = await self._status()
        except KmsError as error:
            if not isinstance(error, LimitExceededError):
                self.status = None
            if isinstance(error, KmsRefusedError) and fault(error) is not Fault.SERVICE:
                return ""  # it works, and this server lacks the role `monitor`
            if isinstance(error, LimitExceededError):
                return ""  # it works, and this server has reached a limit of its policy
            self.kms.lost()
            return str(error)
        self.kms.seen(status)
        if status.status == api.CODE_SEALED:
            return SEALED
        if status.keys.writable is False:
            return f"it can make no keys, so no thread: {status.keys.unavailable_reason}"
        if status.status == "ok":
            return ""
        return f"it reports {status.status or 'no status'}" + (f": {status.reason}" if status.reason else "")

    def damage(self) -> str:
        """What is damaged; some threads can't be read then, and the others are served. Empty if nothing is."""
        damage = [f"the store is damaged: {', '.join(files)}"] if (files := sorted(self._store.engine.damaged)) else []
        if records := self._store.sealer.unreadable:
            one = next(iter(records.values()))
            damage.append(f"{len(records):,} damaged or unreadable records were met, such as: {one}")
        return "; ".join(damage)

    # --- handlers -------------------------------------------------------------------------------------------------
    @Operation("GET", READY_PATH, response=texts("status"), errors={503: (NOT_READY,)}, needs=NOTHING)
    async def ready(self, request: ApiRequest) -> ApiResponse:
        """Check whether writes and the key service work, and if the store was met damaged or empty; needs no key."""
        if self._drain.is_set() or any(await self.problems()):
            raise ApiError(503, NOT_READY, (retry_after(int(FAULT_AGE_S)),))
        return json_response({"status": "damaged" if self.damage() else "empty" if self._store.empty_notice else "ok"})

    async def explain(self, look: Look) -> _Explained:
        writes, key_service = await self.problems()
        ready = not (self._drain.is_set() or writes or key_service)
        conditions = await look.conditions()
        return _Explained(ready, writes, key_service, self.damage(), self._store.notices, conditions)


class _Explained(msgspec.Struct):
    ready: bool
    writes: str
    key_service: str
    damage: str
    notices: list[str]
    conditions: list[api.Condition]


class ReadinessPage:
    """`/admin/readiness`."""

    def __init__(self, readiness: Readiness, look: Look) -> None:
        self._readiness = readiness
        self._look = look

    @Operation(
        "GET",
        "/admin/readiness",
        roles=OPERATORS,
        response=list_of(
            "conditions",
            object_of(name=TEXT, severity=TEXT, sentence=TEXT, action=TEXT, runbook=TEXT),
            **list_of("notices", TEXT, ready={"type": "boolean"}, writes=TEXT, key_service=TEXT, damage=TEXT)[
                "properties"
            ],
        ),
        needs=NOTHING,
    )
    async def explained(self, request: ApiRequest) -> ApiResponse:
        """Read why the server is not ready: each text is empty where nothing is wrong. `notices` do not stop it.
        `conditions` are all things that are wrong, the worst first."""
        return json_response(await self._readiness.explain(self._look))


def operations(readiness: Readiness, look: Look) -> tuple[Operation, ...]:
    return (*operations_of(readiness), *operations_of(ReadinessPage(readiness, look)))
