"""RocksDB's write-ahead log with damage: a start has all that was acknowledged, or is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rocksdict import Rdict

from progressdb_server.store.engine import SCAN_ENTRIES_MAX
from progressdb_server.store.model import StoreDamagedError
from progressdb_server.store.rocks import acknowledged
from progressdb_server.store.rocks.engine import RocksEngine, RocksReader, engine_options
from tests.harness.disk_faults import flip

ACKNOWLEDGED = 60


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a kill leaves of a store: ACKNOWLEDGED writes that were synced, and one that was not."""
    engine = RocksEngine(str(tmp_path_factory.mktemp("store") / "db"))
    for number in range(ACKNOWLEDGED):
        engine.write([(b"%03d" % number, os.urandom(1000))])
        engine.sync()
    engine.write([(b"later", bytes(1000))])
    left = tmp_path_factory.mktemp("killed") / "db"
    shutil.copytree(engine.path, left)
    engine.close()
    return left


@pytest.fixture
def store(killed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it, and its log."""
    shutil.copytree(killed, tmp_path / "db")
    (log,) = (tmp_path / "db").glob("*.log")
    return tmp_path / "db", log


def _zero(log: Path) -> None:
    with log.open("r+b") as file:
        file.seek(log.stat().st_size // 2)
        file.write(bytes(4096))


def _cut(log: Path, to: int) -> None:
    with log.open("r+b") as file:
        file.truncate(to)


def entries(path: Path) -> int:
    engine = RocksEngine(str(path))
    try:
        return len(engine.keys(b"", b"9", limit=SCAN_ENTRIES_MAX))
    finally:
        engine.close()


@pytest.mark.parametrize(
    "damage",
    [lambda log: flip(log, log.stat().st_size // 2), lambda log: flip(log, 4), _zero],
    ids=["bit", "length", "zeros"],
)
def test_damage_in_the_log_refuses_the_start_and_changes_nothing(
    store: tuple[Path, Path], damage: Callable[[Path], None]
) -> None:
    path, log = store
    good = log.read_bytes()
    damage(log)
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match=f"is damaged: the file {log.name}"):
            RocksEngine(str(path))
    log.write_bytes(good)
    assert entries(path) == ACKNOWLEDGED


@pytest.mark.parametrize(
    "damage",
    [lambda log: _cut(log, log.stat().st_size // 2), lambda log: _cut(log, 0), Path.unlink],
    ids=["cut", "empty", "missing"],
)
def test_a_log_that_lacks_acknowledged_writes_is_named(
    store: tuple[Path, Path], damage: Callable[[Path], None]
) -> None:
    """Also by a view, before a start."""
    path, log = store
    damage(log)
    with pytest.raises(StoreDamagedError, match="its log is cut or missing"):
        RocksReader(str(path))
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match="its log is cut or missing"):
            RocksEngine(str(path))
    (path / acknowledged.NAME).unlink()  # the way out that the runbook has
    assert entries(path) < ACKNOWLEDGED


@pytest.fixture
def two_logs(tmp_path: Path) -> tuple[Path, Path]:
    """A store that was killed before its older log was flushed, and that log."""
    options = engine_options()
    options.set_write_buffer_size(64 * 1024)
    options.set_min_write_buffer_number_to_merge(3)
    (tmp_path / "made").mkdir()
    engine = Rdict(str(tmp_path / "made"), options)
    for number in range(ACKNOWLEDGED + 40):
        engine.put(b"%03d" % number, os.urandom(1000))
    engine.flush_wal(True)
    path = tmp_path / "db"
    shutil.copytree(tmp_path / "made", path)
    engine.close()
    noted = acknowledged.Acknowledged(str(path))
    noted.note(ACKNOWLEDGED + 40)
    noted.close()
    older, _ = sorted(path.glob("*.log"))
    return path, older


@pytest.mark.parametrize(
    "damage", [lambda log: _cut(log, log.stat().st_size // 2), Path.unlink], ids=["cut", "missing"]
)
def test_a_start_without_all_of_an_older_log_changes_nothing(
    two_logs: tuple[Path, Path], damage: Callable[[Path], None]
) -> None:
    path, older = two_logs
    good = older.read_bytes()
    damage(older)
    for _ in range(2):
        with pytest.raises(StoreDamagedError, match="its log is cut or missing"):
            RocksEngine(str(path))
    older.write_bytes(good)
    assert entries(path) == ACKNOWLEDGED + 40


@pytest.mark.parametrize(
    "tear",
    [
        lambda log: None,
        lambda log: _cut(log, log.stat().st_size - 7),
        lambda log: flip(log, log.stat().st_size - 7),
        lambda log: log.write_bytes(log.read_bytes()[:-500] + bytes(500)),
        lambda log: log.write_bytes(log.read_bytes() + bytes(40_000)),
    ],
    ids=["whole", "cut", "bit", "zeros", "longer"],
)
def test_a_torn_end_of_the_log_loses_nothing_that_was_acknowledged(
    store: tuple[Path, Path], tear: Callable[[Path], None]
) -> None:
    path, log = store
    tear(log)
    assert entries(path) == ACKNOWLEDGED
    assert entries(path) == ACKNOWLEDGED, "the next start does not find it damaged"


@pytest.mark.parametrize(
    "content",
    [None, b"", b"\0" * 20, b"12", b"%020d 7a2f8b3e\n" % (ACKNOWLEDGED + 8)],
    ids=["missing", "empty", "zeros", "short", "checksum"],
)
def test_without_a_number_of_acknowledged_writes_any_whole_log_opens(
    store: tuple[Path, Path], content: bytes | None
) -> None:
    path, log = store
    number = path / acknowledged.NAME
    number.unlink()
    if content is not None:
        number.write_bytes(content)
    _cut(log, log.stat().st_size - 7)
    assert entries(path) == ACKNOWLEDGED
    assert acknowledged.last(str(path)) == ACKNOWLEDGED


def test_the_number_has_this_checksum_and_one_without_it_is_read(tmp_path: Path) -> None:
    noted = acknowledged.Acknowledged(str(tmp_path))
    noted.note(1234)
    noted.close()
    path = tmp_path / acknowledged.NAME
    assert path.read_bytes() == b"00000000000000001234 53fd66f2\n"
    assert acknowledged.last(str(tmp_path)) == 1234
    path.write_bytes(b"00000000000000001234")
    assert acknowledged.last(str(tmp_path)) == 1234
