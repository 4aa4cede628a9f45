"""What every engine must do. A new engine is added to ENGINES and is done when this file passes."""

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from progressdb_server.store.engine import SCAN_ENTRIES_MAX, EngineUnavailableError, OrderedMap
from progressdb_server.store.model import StoreDamagedError
from progressdb_server.store.rocks import engine as rocks
from progressdb_server.store.rocks.engine import RocksEngine
from tests.harness.disk_faults import flip
from tests.progressdb_server.store.memory_engine import MemoryEngine

ENGINES: dict[str, Callable[[Path], OrderedMap]] = {
    "rocks": lambda path: RocksEngine(str(path / "db")),
    "memory": lambda path: MemoryEngine(),
}
NUMBERED = 4000


@pytest.fixture(params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OrderedMap]:
    made = ENGINES[request.param](tmp_path)
    yield made
    made.close()


def put(engine: OrderedMap, *keys: bytes) -> None:
    engine.write([(key, b"v" + key) for key in keys])
    engine.sync()


def keys(engine: OrderedMap, lower: bytes, upper: bytes, *, limit: int = 100, reverse: bool = False) -> list[bytes]:
    return [key for key, _ in engine.scan(lower, upper, limit=limit, reverse=reverse)]


def test_a_value_reads_back_and_a_missing_key_is_none(engine: OrderedMap) -> None:
    put(engine, b"a")
    assert engine.get(b"a") == b"va"
    assert engine.get(b"b") is None


def test_an_empty_value_is_not_a_missing_one(engine: OrderedMap) -> None:
    engine.write([(b"a", b"")])
    assert engine.get(b"a") == b""
    assert engine.scan(b"a", b"b", limit=9) == [(b"a", b"")]


def test_a_write_is_visible_before_it_is_synced(engine: OrderedMap) -> None:
    engine.write([(b"a", b"1")])
    assert engine.get(b"a") == b"1"


def test_none_deletes_and_the_last_put_of_a_key_wins(engine: OrderedMap) -> None:
    put(engine, b"a", b"b")
    engine.write([(b"a", None), (b"b", b"1"), (b"b", b"2"), (b"c", b"3"), (b"c", None), (b"missing", None)])
    assert engine.scan(b"", b"\xff", limit=9) == [(b"b", b"2")]


def test_the_bounds_of_a_scan_are_inclusive_below_and_exclusive_above(engine: OrderedMap) -> None:
    put(engine, b"a", b"b", b"ba", b"bb", b"c", b"d")
    assert keys(engine, b"b", b"c") == [b"b", b"ba", b"bb"]
    assert keys(engine, b"b\0", b"c\0") == [b"ba", b"bb", b"c"]
    assert keys(engine, b"b", b"b") == []
    assert keys(engine, b"c", b"b") == []
    assert keys(engine, b"x", b"y") == []


def test_a_reverse_scan_starts_below_the_upper_bound(engine: OrderedMap) -> None:
    put(engine, b"a", b"b", b"ba", b"bb", b"c", b"d")
    assert keys(engine, b"b", b"c", reverse=True) == [b"bb", b"ba", b"b"]
    assert keys(engine, b"b", b"bz", reverse=True) == [b"bb", b"ba", b"b"]
    assert keys(engine, b"b", b"\xff", reverse=True, limit=2) == [b"d", b"c"]
    assert keys(engine, b"bb", b"c", reverse=True, limit=1) == [b"bb"]
    assert keys(engine, b"c", b"b", reverse=True) == []


def test_keys_sort_as_unsigned_bytes(engine: OrderedMap) -> None:
    raw = [b"\0", b"\x01", b"A", b"a", b"a\0", b"ab", b"\x7f", b"\x80", b"\xfe"]
    put(engine, *reversed(raw))
    assert keys(engine, b"", b"\xff") == raw


def test_a_scan_is_cut_at_its_limit_and_at_the_bound_of_every_scan(engine: OrderedMap) -> None:
    engine.write([(b"%06d" % number, b"") for number in range(SCAN_ENTRIES_MAX + 10)])
    assert len(keys(engine, b"", b"\xff", limit=3)) == 3
    assert len(keys(engine, b"", b"\xff", limit=10**9)) == SCAN_ENTRIES_MAX
    assert len(engine.keys(b"", b"\xff", limit=10**9)) == SCAN_ENTRIES_MAX
    assert keys(engine, b"", b"\xff", limit=0) == []


def test_a_scan_stops_after_the_entry_that_reaches_its_bound_in_bytes(engine: OrderedMap) -> None:
    engine.write([(b"%d" % number, bytes(100)) for number in range(9)])
    for bound, count in [(1, 1), (100, 1), (101, 2), (250, 3), (10**9, 9)]:
        assert len(engine.scan(b"", b"\xff", limit=9, bytes_max=bound)) == count


def test_big_values_and_long_keys_read_back(engine: OrderedMap) -> None:
    key, value = b"k" * 2000, b"\0\xff" * 1_000_000
    engine.write([(key, value)])
    assert engine.get(key) == value


def test_sync_may_run_in_another_thread_beside_reads_and_writes(engine: OrderedMap) -> None:
    def sync() -> None:
        for _ in range(20):
            engine.sync()

    thread = threading.Thread(target=sync)
    thread.start()
    for number in range(200):
        engine.write([(b"%d" % number, b"x")])
        assert engine.get(b"%d" % number) == b"x"
    thread.join()


def test_what_was_synced_is_there_after_reopening(engine: OrderedMap) -> None:
    put(engine, b"a")
    engine.reopen()
    assert engine.get(b"a") == b"va"
    put(engine, b"b")
    assert engine.get(b"b") == b"vb"


def test_a_closed_engine_refuses_to_write(engine: OrderedMap) -> None:
    engine.close()
    with pytest.raises(EngineUnavailableError):
        engine.write([(b"a", b"1")])


@pytest.fixture(params=["byte", "cut"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[RocksEngine, str]]:
    """Entries NUMBERED in one file, part of which is damaged; and the file's name."""
    path = tmp_path / "db"
    engine = RocksEngine(str(path))
    engine.write([(b"%06d" % number, b"%06d" % number * 20) for number in range(NUMBERED)])
    engine.compact()
    engine.close()
    (file,) = path.glob("*.sst")
    if request.param == "byte":
        flip(file, file.stat().st_size // 2)
    else:
        with file.open("r+b") as content:  # what a bad sector may read as
            content.seek(file.stat().st_size // 2)
            content.write(bytes(4096))
    engine = RocksEngine(str(path))
    yield engine, file.name
    engine.close()


def test_a_read_that_meets_damage_raises_and_names_the_file(damaged: tuple[RocksEngine, str]) -> None:
    engine, file = damaged
    reads: list[Callable[[], object]] = [
        lambda: engine.scan(b"0", b"9", limit=SCAN_ENTRIES_MAX),
        lambda: engine.scan(b"0", b"9", limit=SCAN_ENTRIES_MAX, bytes_max=10**9),
        lambda: engine.scan(b"0", b"9", limit=SCAN_ENTRIES_MAX, reverse=True),
        lambda: engine.keys(b"0", b"9", limit=SCAN_ENTRIES_MAX),
        lambda: engine.keys(b"0", b"9", limit=SCAN_ENTRIES_MAX, reverse=True),
        lambda: [engine.get(b"%06d" % number) for number in range(NUMBERED)],
    ]
    errors = []
    for read in reads:
        with pytest.raises(StoreDamagedError) as raised:
            read()
        errors.append(raised.value)
    assert [error.file for error in errors] == [file] * len(reads)
    engine.reopen()  # the errors, which somebody may keep, have no iterator


@pytest.mark.parametrize("reverse", [False, True])
def test_an_iterator_that_ends_early_is_not_taken_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    """As after a read that failed once: the second look finds entries."""
    engine = RocksEngine(str(tmp_path / "db"))
    put(engine, *(b"%d" % number for number in range(9)))
    for at_most in (0, 3, 8):
        monkeypatch.setattr(rocks, "islice", lambda entries, limit, ends=at_most: islice(entries, min(limit, ends)))
        for read in (engine.scan, engine.keys):
            with pytest.raises(EngineUnavailableError):
                read(b"0", b"9", limit=9, reverse=reverse)
            assert len(read(b"0", b"9", limit=at_most, reverse=reverse)) == at_most
    engine.close()


def test_entries_before_and_behind_damage_are_read(damaged: tuple[RocksEngine, str]) -> None:
    engine, _ = damaged
    quarter = NUMBERED // 4
    assert len(engine.scan(b"0", b"%06d" % quarter, limit=SCAN_ENTRIES_MAX)) == quarter
    assert len(engine.keys(b"%06d" % (3 * quarter), b"9", limit=SCAN_ENTRIES_MAX, reverse=True)) == quarter


@given(
    st.lists(st.lists(st.tuples(st.binary(max_size=3), st.none() | st.binary(max_size=3)), max_size=6), max_size=8),
    st.binary(max_size=3),
    st.binary(max_size=3),
    st.integers(0, 5),
    st.booleans(),
)
def test_both_engines_answer_every_scan_alike(
    groups: list[list[tuple[bytes, bytes | None]]], lower: bytes, upper: bytes, limit: int, reverse: bool
) -> None:
    model: dict[bytes, bytes] = {}
    memory = MemoryEngine()
    for group in groups:
        memory.write(group)
        for key, value in group:
            model.pop(key, None)
            if value is not None:
                model[key] = value
    expected = sorted((key for key in model if lower <= key < upper), reverse=reverse)[:limit]
    assert keys(memory, lower, upper, limit=limit, reverse=reverse) == expected
    assert memory.keys(lower, upper, limit=limit, reverse=reverse) == expected
    _SHARED.write([(key, None) for key, _ in _SHARED.scan(b"", b"\xff" * 9, limit=SCAN_ENTRIES_MAX)])
    for group in groups:
        _SHARED.write(group)
    assert keys(_SHARED, lower, upper, limit=limit, reverse=reverse) == expected
    assert _SHARED.keys(lower, upper, limit=limit, reverse=reverse) == expected


_SHARED: OrderedMap


@pytest.fixture(autouse=True, scope="module")
def shared_rocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One database for all examples of a property: opening one takes longer than an example."""
    global _SHARED  # noqa: PLW0603 - hypothesis does not reset a fixture between examples
    _SHARED = RocksEngine(str(tmp_path_factory.mktemp("shared") / "db"))
    yield
    _SHARED.close()
