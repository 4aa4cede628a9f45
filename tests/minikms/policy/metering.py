"""A machine for meters: a clock that the test sets, a file, orderly stops and crashes."""

import asyncio
from collections.abc import Awaitable, Callable

from minikms.api.errors import KmsRefusedError, LimitExceededError
from minikms.policy.file_policy import FilePolicy
from minikms.policy.meters import Charge, Cost, Meters
from minikms.policy.rules import Grant, Scope, parse_policy

HOUR_MS = 3_600_000


class Machine:
    """`now_ms`: of the clock. `file`: what is durable. `writes`: how often it was written. `keep` writes it."""

    def __init__(self, rules: str) -> None:
        self.now_ms = 1_000 * HOUR_MS
        self.policy = FilePolicy(parse_policy(rules.encode()))
        self.file: bytes | None = None
        self.writes = 0
        self.keep: Callable[[bytes], Awaitable[None]] = self._keep
        self.crash()

    def crash(self) -> None:
        """Another process starts, with what is durable."""
        self.meters = Meters(self.file, keep=self._write, now_ns=lambda: self.now_ms * 1_000_000)

    def restart(self, *, after_ms: int = 0) -> None:
        """An orderly stop, and a start after some time."""
        self.file = self.meters.save()
        self.now_ms += after_ms
        self.crash()

    def refresh(self) -> None:
        """As every minute."""

        async def main() -> None:
            self.meters.refresh()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        asyncio.run(main())

    async def _write(self, content: bytes) -> None:
        await self.keep(content)

    async def _keep(self, content: bytes) -> None:
        self.file = content
        self.writes += 1

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

    def begin(self, name: str, decrypts: int, reencrypts: int = 0) -> Charge:
        """As the service does: charged as a request, and then for what was decided. It counts until
        `Meters.end_turn`. Raises KmsRefusedError.
        """
        scope, costs = self.scope(name), self.costs(name, decrypts, reencrypts)
        entered = self.meters.enter(scope, costs)
        if taken := self.meters.charge(scope, costs, entered):
            asyncio.run(self.meters.reserve(taken))
        return entered

    def charge(self, *requests: tuple[str, int]) -> list[Charge | KmsRefusedError]:
        """Charges requests in one turn, each of a principal and a number of decrypts; what became of each."""
        found: list[Charge | KmsRefusedError] = []
        for name, decrypts in requests:
            try:
                found.append(self.begin(name, decrypts))
            except KmsRefusedError as error:
                found.append(error)
        return found

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
