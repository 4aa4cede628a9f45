"""A program: copies a store, and is killed at a given write. Arguments: number of the write, source, target."""

import asyncio
import os
import signal
import sys
from typing import Any

from progressdb_server.store import copying, offline
from progressdb_server.store.offline import LocalEntries
from progressdb_server.store.postgres import offline as postgres_offline
from progressdb_server.store.postgres.offline import PostgresEntries

PAGE_ENTRIES = 10


def main() -> None:
    number, source, target = int(sys.argv[1]), *sys.argv[2:]
    left = [number]
    for module in (offline, postgres_offline):
        setattr(module, "SCAN_ENTRIES_MAX", PAGE_ENTRIES)  # noqa: B010  final in production
    for kind in (LocalEntries, PostgresEntries):
        _count(kind, left)
    asyncio.run(copying.copy(source, target, lambda done, total: None))


def _count(kind: Any, left: list[int]) -> None:
    real = kind.put

    async def put(self: Any, puts: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        await real(self, puts)

    kind.put = put


if __name__ == "__main__":
    main()
    sys.exit()
