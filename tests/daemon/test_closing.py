"""No descriptor is closed and no key zeroed under a thread that still works with them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from minikms.daemon.parts import Assembly, Workers


class Recorded:
    """Any part of an assembly: its calls are noted by name, in `calls`."""

    def __init__(self, name: str, calls: list[str], awaited: tuple[str, ...] = ()) -> None:
        self._name = name
        self._calls = calls
        self._awaited = awaited

    def __getattr__(self, method: str) -> Any:
        def note(*_: object) -> None:
            self._calls.append(f"{self._name}.{method}")

        async def note_later() -> None:
            note()

        return note_later if method in self._awaited else note


@pytest.mark.parametrize("worker", ["disk", "reader"])
def test_what_a_worker_has_begun_ends_before_its_directory_is_closed(worker: str) -> None:
    """A request that was cut off at the end of a stop leaves its job behind."""

    async def main() -> list[str]:
        calls: list[str] = []
        workers = Workers.start()
        assembly = object.__new__(Assembly)
        assembly._workers = workers
        parts: dict[str, Any] = {
            "store": Recorded("store", calls, ("drain",)),
            "leases": Recorded("leases", calls, ("drain",)),
            "keks": Recorded("keks", calls, ("stop",)),
        }
        parts |= {name: Recorded(name, calls) for name in ("upkeep", "log", "vault", "backups")}
        for name, part in parts.items():
            setattr(assembly, name, part)
        assembly._files = Recorded("files", calls)  # type: ignore[assignment]  # only its lease store is closed
        assembly._files.leases = Recorded("lease files", calls)  # type: ignore[misc, assignment]  # the double, not a tuple

        def work() -> None:
            time.sleep(0.1)
            calls.append("work")

        getattr(workers, worker).submit(work)
        try:
            await assembly.close()
        finally:
            workers.shutdown()
        return calls

    calls = asyncio.run(main())
    assert calls[0] == "keks.stop"
    assert calls.index("work") < min(calls.index(f"{name}.close") for name in ("store", "backups", "vault"))
