"""A second engine, to hold the seam narrow: an ordered map in memory with faults on demand.

`fail_write` and `fail_sync` make the next call fail; what was written since the last sync is then gone after
`reopen`, as it may be after a power failure, unless `survives` is set. `busy` refuses that many writes as a stalled
engine does.
"""

import threading
from bisect import bisect_left, insort
from collections.abc import Iterable

from progressdb_server.store.engine import SCAN_ENTRIES_MAX, EngineBusyError, EngineUnavailableError
from progressdb_server.store.local import LocalEngine


class MemoryEngine(LocalEngine):
    def __init__(self) -> None:
        self._map: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []
        self._durable: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self._failed = False
        self.damaged: set[str] = set()
        self.fail_write = False
        self.fail_sync = False
        self.fail_reopen = 0
        self.survives = False
        self.busy = 0
        self.writes = 0
        self.syncs = 0
        self.gate = threading.Event()
        self.gate.set()

    def get(self, key: bytes) -> bytes | None:
        return self._map.get(key)

    def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        low, high = bisect_left(self._keys, lower), bisect_left(self._keys, upper)
        count = max(0, min(limit, SCAN_ENTRIES_MAX))
        keys = self._keys[low:high]
        keys = keys[::-1][:count] if reverse else keys[:count]
        found: list[tuple[bytes, bytes]] = []
        for key in keys:
            found.append((key, self._map[key]))
            if bytes_max is not None and sum(len(value) for _, value in found) >= bytes_max:
                break
        return found

    def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]:
        low, high = bisect_left(self._keys, lower), bisect_left(self._keys, upper)
        keys = self._keys[low:high]
        return (keys[::-1] if reverse else keys)[: max(0, min(limit, SCAN_ENTRIES_MAX))]

    def put(self, key: bytes, value: bytes | None) -> None:
        if value is None:
            if self._map.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]
        else:
            if key not in self._map:
                insort(self._keys, key)
            self._map[key] = value

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        if self._failed:
            raise EngineUnavailableError
        if self.busy:
            self.busy -= 1
            raise EngineBusyError
        if self.fail_write:
            self.fail_write = False
            self._failed = True
            raise EngineUnavailableError
        self.writes += 1
        for key, value in list(puts):
            self.put(key, value)

    def sync(self) -> None:
        self.gate.wait()
        if self.fail_sync:
            self.fail_sync = False
            self._failed = True
            raise EngineUnavailableError
        self.syncs += 1
        self._durable = dict(self._map)

    def reopen(self) -> None:
        if self.fail_reopen:
            self.fail_reopen -= 1
            raise EngineUnavailableError
        if not self.survives:
            self._map = dict(self._durable)
            self._keys = sorted(self._map)
        self._durable = dict(self._map)
        self._failed = False

    def probe(self) -> None:
        if self._failed:
            raise EngineUnavailableError

    def checkpoint(self, path: str) -> None:
        raise EngineUnavailableError

    def close(self) -> None:
        self._failed = True
