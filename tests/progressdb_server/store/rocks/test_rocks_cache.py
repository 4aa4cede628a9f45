"""What passes over much does not take the place of what requests read."""

import os
from collections.abc import Callable
from pathlib import Path

from progressdb_server.store.rocks.engine import RocksEngine
from tests.harness.reading import bytes_read

ENTRIES = 4000
ENTRY_BYTES = 1000


def bytes_read_by_walk(read: Callable[[bytes], list[bytes]]) -> int:
    """How many bytes come from files while `read` gives all keys, from the first to the last, in parts."""
    before = bytes_read()
    lower, count = b"k", 0
    while keys := read(lower):
        lower = keys[-1] + b"\0"
        count += len(keys)
    assert count == ENTRIES
    return bytes_read() - before


def test_a_pass_over_much_puts_nothing_into_the_cache_and_a_request_does(tmp_path: Path) -> None:
    engine = RocksEngine(str(tmp_path / "db"))

    def bounded(lower: bytes) -> list[bytes]:
        return [key for key, _ in engine.scan(lower, b"l", limit=100, bytes_max=1 << 20)]

    def keys(lower: bytes) -> list[bytes]:
        return engine.keys(lower, b"l", limit=100)

    def request(lower: bytes) -> list[bytes]:
        return [key for key, _ in engine.scan(lower, b"l", limit=100)]

    try:
        engine.write([(b"k%06d" % n, os.urandom(ENTRY_BYTES)) for n in range(ENTRIES)])
        engine.compact()
        for read in (bounded, keys, bounded, request):
            assert bytes_read_by_walk(read) > ENTRIES * ENTRY_BYTES // 2
        assert bytes_read_by_walk(request) < ENTRIES * ENTRY_BYTES // 20
    finally:
        engine.close()
