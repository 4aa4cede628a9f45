"""What passes over much does not take the place of what requests read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from progressdb_server.store.rocks import RocksEngine

ENTRIES = 4000
ENTRY_BYTES = 1000


def walk(read: Callable[[bytes], list[bytes]]) -> int:
    """From the first key to the last, in parts; how many there were."""
    lower, count = b"k", 0
    while keys := read(lower):
        lower = keys[-1] + b"\0"
        count += len(keys)
    return count


def test_a_pass_over_much_puts_nothing_into_the_cache_and_a_request_does(tmp_path: Path) -> None:
    engine = RocksEngine(str(tmp_path / "db"))

    def cached_bytes() -> int:
        used: int = engine._db.property_int_value("rocksdb.block-cache-usage")
        return used

    def bounded(lower: bytes) -> list[bytes]:
        return [key for key, _ in engine.scan(lower, b"l", limit=100, bytes_max=1 << 20)]

    try:
        engine.write([(b"k%06d" % n, os.urandom(ENTRY_BYTES)) for n in range(ENTRIES)])
        engine.compact()
        before = cached_bytes()
        assert walk(bounded) == ENTRIES
        assert walk(lambda lower: engine.keys(lower, b"l", limit=100)) == ENTRIES
        assert cached_bytes() < before + ENTRIES * ENTRY_BYTES // 20
        assert walk(lambda lower: [key for key, _ in engine.scan(lower, b"l", limit=100)]) == ENTRIES
        assert cached_bytes() > before + ENTRIES * ENTRY_BYTES // 2
    finally:
        engine.close()
