"""A machine for meters: a clock that the test sets, a disk that keeps, tears and refuses lines, and restarts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from minikms.errors import LimitExceededError, MiniKmsError, StorageUnavailableError
from minikms.policy import Charge, Clock, Cost, FilePolicy, Meters, Scope, parse_policy
from minikms.policy.rules import Grant

HOUR_MS = 3_600_000


class SameThread(Executor):
    """Runs each job at once."""

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  as an executor does
            done.set_exception(error)
        return done


class Disk:
    """The file of a machine. `fails`: the next writes fail after they have left `kept` of their bytes (0 to 1).
    `during`: is called in each write.
    """

    def __init__(self) -> None:
        self.content: bytes | None = None
        self.appendable = False
        self.fails = 0
        self.kept = 0.0
        self.writes = 0
        self.during: Callable[[], None] = lambda: None

    def read(self) -> bytes | None:
        return self.content

    def append(self, data: bytes) -> None:
        assert self.appendable and self.content is not None
        self.writes += 1
        self.during()
        if self.fails:
            self.fails -= 1
            self.appendable = False
            self.content += data[: int(len(data) * self.kept)]
            raise StorageUnavailableError("the disk refuses")
        self.content += data

    def replace(self, data: bytes) -> None:
        self.writes += 1
        self.during()
        self.appendable = False
        if self.fails:
            self.fails -= 1
            if self.kept == 1:
                self.content = data  # its last sync failed
            raise StorageUnavailableError("the disk refuses")
        self.content, self.appendable = data, True

    def close(self) -> None:
        self.appendable = False


class Machine:
    """`real_ms`: the time that passes in truth, from which no clock of the machine is read. `wall_ahead_ms`: of the
    wall clock. Its boots count from 1.
    """

    def __init__(self, rules: str) -> None:
        self.real_ms = 1_000 * HOUR_MS
        self.wall_ahead_ms = 0
        self.boot = 1
        self.boot_at_ms = self.real_ms - 5_000
        self.disk = Disk()
        self.policy = FilePolicy(parse_policy(rules.encode()))
        self.start()

    def start(self, executor: Executor | None = None) -> None:
        """A process starts, with what is on the disk."""
        self.disk.close()
        clock = Clock(
            f"boot-{self.boot}",
            lambda: self.real_ms - self.boot_at_ms,
            lambda: self.real_ms + self.wall_ahead_ms,
        )
        self.meters = Meters(clock, self.disk, executor or SameThread())

    def reboot(self) -> None:
        self.boot += 1
        self.boot_at_ms = self.real_ms
        self.start()

    def scope(self, name: str) -> Scope:
        """Of a uid by itself, of any other name through uid 992."""
        asked = (int(name[4:]), 1, None) if name.startswith("uid:") else (992, 1, name)
        found = self.policy.principal(*asked)
        assert found is not None
        assert found.scope is not None
        return found.scope

    def grant(self, name: str) -> Grant:
        found = self.scope(name).decide("decrypt", "thread")
        assert found
        return found

    def costs(self, name: str, decrypts: int, reencrypts: int = 0) -> dict[Grant, Cost]:
        return {self.grant(name): Cost(decrypts, reencrypts)}

    def begin(self, name: str, decrypts: int) -> Charge | Awaitable[Charge]:
        """As the service does: charged as a request, and then for what was decided. It counts until
        `Meters.end_turn`.
        """
        scope, costs = self.scope(name), self.costs(name, decrypts)
        return self.meters.charge(scope, costs, self.meters.enter(scope, costs))

    def charge(self, *requests: tuple[str, int]) -> list[Charge | MiniKmsError]:
        """Charges requests in one turn, each of a principal and a number of decrypts; what became of each."""

        async def one(name: str, decrypts: int) -> Charge | MiniKmsError:
            try:
                charged = self.begin(name, decrypts)
                return await charged if isinstance(charged, Awaitable) else charged
            except MiniKmsError as error:
                return error

        async def together() -> Sequence[Charge | MiniKmsError]:
            return await asyncio.gather(*(one(*request) for request in requests))

        return list(asyncio.run(together()))

    def charge_at_once(self, name: str, decrypts: int) -> Charge | None:
        """Charges a request if that needs no waiting; None: it waits or is refused."""
        try:
            charged = self.begin(name, decrypts)
        except LimitExceededError:
            return None
        if isinstance(charged, Coroutine):
            charged.close()
        return charged if isinstance(charged, Charge) else None

    def refused(self, name: str, decrypts: int = 1) -> LimitExceededError:
        """Charges a request, which must be refused by a limit."""
        (found,) = self.charge((name, decrypts))
        assert isinstance(found, LimitExceededError), found
        return found

    def passes(self, name: str, decrypts: int = 1) -> None:
        """Charges a request, which must not be refused, and ends the turn."""
        (found,) = self.charge((name, decrypts))
        assert isinstance(found, Charge), found
        self.meters.end_turn()
