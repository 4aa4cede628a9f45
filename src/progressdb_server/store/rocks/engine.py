"""The RocksDB engine, through `rocksdict` in raw mode (bytes in, bytes out).

Owns: the options, the one database handle, recovery by reopening. Invariants:
- One process has the directory open for writing (RocksDB's own lock); `RocksReader` reads beside it.
- The write-ahead log is always on. `write` puts a group into it without waiting for the disk; `sync` waits, and gives
  up the interpreter lock while it does, so it belongs in a worker thread (docs/decisions/0020-the-store.md).
- A scan with a bound of bytes, or of keys alone, passes over much. It puts nothing into the cache, where that would
  take the place of what requests read.
- A read gives all that is stored in its range, or raises: StoreDamagedError names the file.
- Writes that would have to wait for compaction fail at once (`no_slowdown`) instead of stopping the event loop.

Known of rocksdict 0.3.29, each the reason for a line here: `set_iterate_lower_bound` sets the upper bound, so it is
never used; a reverse iterator starts at its key inclusively; an iterator that is still alive keeps the lock after
`close`; `items` and `keys` end at an error as they do at the end, and only `RdictIter.status` tells which it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from typing import Any, Final

from rocksdict import (
    AccessType,
    BlockBasedIndexType,
    BlockBasedOptions,
    Cache,
    Checkpoint,
    DBCompressionType,
    DBRecoveryMode,
    Options,
    Rdict,
    ReadOptions,
    WriteBatch,
    WriteOptions,
)

from minikms.platform.logs import Log
from minikms.platform.sync import sync_file
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, EngineBusyError, EngineUnavailableError
from progressdb_server.store.keyspace import next_key
from progressdb_server.store.local import LocalEngine
from progressdb_server.store.model import StoreDamagedError, StoreLockedError, StoreUnavailableError
from progressdb_server.store.rocks import acknowledged
from progressdb_server.store.rocks.acknowledged import Acknowledged

BLOCK_CACHE_BYTES: Final = 32 * 1024 * 1024
WRITE_BUFFER_BYTES: Final = 16 * 1024 * 1024
WRITE_BUFFERS_MAX: Final = 4
LEVEL_ZERO_FILES: Final = 8
"""Flushed files that are merged into the next level at a time. RocksDB's 4 costs a rotation a fifth more merging."""
BASE_LEVEL_BYTES: Final = LEVEL_ZERO_FILES * WRITE_BUFFER_BYTES
"""The size of the level that flushed files are merged into: as much as is merged into it at a time. Every group writes
to all parts of the key space, so each merge rewrites all of that level; with 256 MiB a rotation of a million records
merges a third more, with 64 MiB one of a few hundred thousand twice as much.
"""
OPEN_FILES_MAX: Final = 512
LOG_FILE_BYTES_MAX: Final = 4 * 1024 * 1024
LOG_FILES_MAX: Final = 4
BLOCK_BYTES: Final = 16 * 1024
"""What is read, checked and cached as one: some 25 messages. RocksDB's 4 KiB costs a scan half as much again."""
BLOOM_BITS_PER_KEY: Final = 10
DELETIONS: Final = (1024, 512, 0.5)
"""A file is merged soon if so many of so many neighbouring entries, or this part of all, are deletions. Otherwise the
space of what was removed by age is not given back, because nothing is written there again."""
PROBE_BYTES: Final = 4 * 1024 * 1024
"""Space that must be free for a disk to count as one that takes writes; before a reopening is tried, the size of the
log must be free too."""
OPENINGS: Final = 3
"""How often a reader is opened before a file that is missing counts as damage."""
_FILE: Final = re.compile(r"\b(?:\d+\.(?:sst|log)|MANIFEST-\d+|CURRENT)\b")
_DROPPED: Final = re.compile(rb"(\d+\.log): dropping ")
LOG_TAIL_BYTES: Final = 64 * 1024
LOG_HEADER_BYTES: Final = 7
"""The header of a record in the write-ahead log, before the number of its write (RocksDB's log_format.h)."""

_IN_USE: Final = "{} is in use by another process"

_log = Log()


def engine_options() -> Options:
    table = BlockBasedOptions()
    table.set_block_cache(Cache(BLOCK_CACHE_BYTES))
    table.set_block_size(BLOCK_BYTES)
    table.set_bloom_filter(BLOOM_BITS_PER_KEY, False)
    table.set_cache_index_and_filter_blocks(True)
    # In parts of 4 KiB: whole filters, of some 100 KiB a file, push each other out of the cache once there are many.
    table.set_index_type(BlockBasedIndexType.two_level_index_search())
    table.set_partition_filters(True)
    table.set_metadata_block_size(4096)
    table.set_pin_top_level_index_and_filter(True)
    table.set_pin_l0_filter_and_index_blocks_in_cache(True)
    options = Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_block_based_table_factory(table)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_max_write_buffer_number(WRITE_BUFFERS_MAX)
    options.set_max_open_files(OPEN_FILES_MAX)
    options.set_max_background_jobs(2)
    options.set_level_zero_file_num_compaction_trigger(LEVEL_ZERO_FILES)
    options.set_max_bytes_for_level_base(BASE_LEVEL_BYTES)
    options.set_bytes_per_sync(1024 * 1024)  # spreads the write-back of big files, so that no commit waits for one
    options.set_level_compaction_dynamic_level_bytes(True)
    options.add_compact_on_deletion_collector_factory(*DELETIONS)
    # Keys and indexes compress, ciphertext does not: worth the time where entries stay.
    options.set_compression_type(DBCompressionType.none())
    options.set_bottommost_compression_type(DBCompressionType.lz4())
    options.set_max_log_file_size(LOG_FILE_BYTES_MAX)
    options.set_keep_log_file_num(LOG_FILES_MAX)
    options.set_stats_dump_period_sec(0)
    options.set_paranoid_checks(True)
    # A start is refused where the log is damaged, except at an end that a kill or a power failure has torn.
    options.set_wal_recovery_mode(DBRecoveryMode.tolerate_corrupted_tail_records())
    return options


def check_exists(path: str) -> None:
    """Checks that the directory holds a database. Raises EngineUnavailableError, or OSError if that can't be seen."""
    try:
        os.stat(os.path.join(path, "CURRENT"))
    except (FileNotFoundError, NotADirectoryError):
        raise EngineUnavailableError(f"{path} holds no store") from None


@contextlib.contextmanager
def exclusive(path: str) -> Iterator[None]:
    """Nobody opens the store for writing meanwhile. Raises StoreLockedError, FileNotFoundError."""
    with open(os.path.join(path, "LOCK"), "r+b") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as RocksDB does
        except BlockingIOError:
            raise StoreLockedError(_IN_USE.format(path)) from None
        yield


def refuse_root_for_another(path: str) -> None:
    """Root would leave files that the directory's user can't open.

    Raises EngineUnavailableError, or StoreLockedError if that user's process has the store open.
    """
    owner = os.stat(path).st_uid
    if os.geteuid() == 0 and owner != 0:
        with contextlib.suppress(FileNotFoundError), exclusive(path):
            pass
        raise EngineUnavailableError(
            f"{path} belongs to uid {owner}, who could not open the files that root makes there: run this as that user"
        )


class RocksRead:
    """The reads of the engine on RocksDB."""

    _db: Any

    def __init__(self) -> None:
        self.damaged: set[str] = set()

    def _failure(self, error: Exception) -> StoreUnavailableError:
        known = failure(error)
        if isinstance(known, StoreDamagedError):
            self.damaged.add(known.file)
        return known

    def get(self, key: bytes) -> bytes | None:
        try:
            value: bytes | None = self._db.get(key)
        except Exception as error:
            raise self._failure(error) from error
        return value

    def scan(
        self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False, bytes_max: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        limit = min(limit, SCAN_ENTRIES_MAX)
        if lower >= upper or limit <= 0:
            return []
        try:
            return self._scan(lower, upper, limit, bytes_max, reverse=reverse)
        except Exception as error:
            error.__traceback__ = None  # it leads to iterators
            raise self._failure(error) from error

    def keys(self, lower: bytes, upper: bytes, *, limit: int, reverse: bool = False) -> list[bytes]:
        limit = min(limit, SCAN_ENTRIES_MAX)
        if lower >= upper or limit <= 0:
            return []
        try:
            return self._keys(lower, upper, limit, reverse=reverse)
        except Exception as error:
            error.__traceback__ = None
            raise self._failure(error) from error

    def _scan(
        self, lower: bytes, upper: bytes, limit: int, bytes_max: int | None, *, reverse: bool
    ) -> list[tuple[bytes, bytes]]:
        if reverse:
            entries = self._db.items(backwards=True, from_key=upper)
            page = list(islice(takewhile(lambda entry: entry[0] >= lower, entries), limit + 1))
            if page and page[0][0] == upper:
                del page[0]
            if len(page) < limit:
                self._check_empty(lower, page[-1][0] if page else upper, reverse=True)
            return page[:limit]
        entries = islice(self._db.items(from_key=lower, read_opt=up_to(upper, cached=bytes_max is None)), limit)
        full = False
        if bytes_max is None:
            page = list(entries)
        else:
            page, full = _until(entries, bytes_max)
        if len(page) < limit and not full:
            self._check_empty(next_key(page[-1][0]) if page else lower, upper)
        return page

    def _keys(self, lower: bytes, upper: bytes, limit: int, *, reverse: bool) -> list[bytes]:
        page: list[bytes]
        if reverse:
            keys = self._db.keys(backwards=True, from_key=upper)
            page = list(islice(takewhile(lambda key: key >= lower, keys), limit + 1))
            if page and page[0] == upper:
                del page[0]
            if len(page) < limit:
                self._check_empty(lower, page[-1] if page else upper, reverse=True)
            return page[:limit]
        page = list(islice(self._db.keys(from_key=lower, read_opt=up_to(upper, cached=False)), limit))
        if len(page) < limit:
            self._check_empty(next_key(page[-1]) if page else lower, upper)
        return page

    def _check_empty(self, lower: bytes, upper: bytes, *, reverse: bool = False) -> None:
        """Checks that nothing is stored in the part of a range that a scan has not given. This second look costs less
        than a whole walk with an iterator that has a status.
        """
        if lower >= upper:
            return
        left = self._db.iter(up_to(upper, cached=False))
        if reverse:
            left.seek_for_prev(upper)
        else:
            left.seek(lower)
        left.status()
        if left.valid() and left.key() >= lower:
            raise OSError("IO error: a scan ended before the end of its range")


class RocksEngine(RocksRead, LocalEngine):
    """The engine on RocksDB."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        os.makedirs(path, mode=0o700, exist_ok=True)
        refuse_root_for_another(path)
        self._write_options = WriteOptions()
        self._write_options.no_slowdown = True
        self._failed = False
        self._sync_lock = threading.Lock()  # the handle must not be closed while `sync` uses it
        self._db = self._open()

    def _open(self) -> Any:
        known = acknowledged.last(self.path)
        reached = _reached(self.path) if known else 0
        if 0 <= reached < known and not isinstance(_refusal(self.path), StoreDamagedError):  # RocksDB would open it
            with contextlib.suppress(FileNotFoundError), exclusive(self.path):
                pass
            raise _cut(self.path)
        try:
            try:
                db = Rdict(self.path, engine_options())
            except Exception as error:
                if "LOCK:" in str(error) or not 0 < known <= reached:
                    raise
                _log.warning("store_log_torn", reason=f"{self.path}: writes behind the damage of its log are dropped")
                db = Rdict(self.path, _to_the_damage())
        except Exception as error:
            if "LOCK:" in str(error):
                raise StoreLockedError(_IN_USE.format(self.path)) from error
            raise not_opened(self.path, error) from error
        if db.latest_sequence_number() < known:
            db.close()
            raise _cut(self.path)
        self._acknowledged = Acknowledged(self.path)
        self._acknowledged.note(db.latest_sequence_number())
        return db

    def write(self, puts: Iterable[tuple[bytes, bytes | None]]) -> None:
        if self._failed:
            raise EngineUnavailableError
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for key, value in puts:
            if value is None:
                batch.delete(key)
            else:
                put(key, value)
        try:
            self._db.write(batch, self._write_options)
        except Exception as error:
            if "Write stall" in str(error):
                raise EngineBusyError from error
            self._failed = True
            raise self._failure(error) from error

    def sync(self) -> None:
        with self._sync_lock:
            try:
                last = self._db.latest_sequence_number()
                self._db.flush_wal(True)
            except Exception as error:
                self._failed = True
                raise self._failure(error) from error
            self._acknowledged.note(last)

    def reopen(self) -> None:
        """Opening replays the log into new files and syncs them, so what is readable afterwards is durable. Before
        the old handle is given up, the disk must show that it takes that much: until then reads go on from the old
        one."""
        with self._sync_lock:
            self._failed = True
            self._check_room(PROBE_BYTES + self._log_bytes())
            self._close()
            self._db = self._open()
            self._failed = False

    def probe(self) -> None:
        try:
            self._check_room(PROBE_BYTES)
        except EngineUnavailableError as error:
            reason = getattr(error.__cause__, "strerror", None) or "the reason is unknown"
            raise EngineUnavailableError(f"the store's disk does not take writes: {reason}") from error

    def _check_room(self, wanted_bytes: int) -> None:
        """Checks that the disk takes so much now. Raises EngineUnavailableError."""
        try:
            with tempfile.TemporaryFile(dir=self.path, prefix="probe-") as file:
                _reserve(file.fileno(), wanted_bytes)
                file.write(b"\0" * 4096)
                file.flush()
                sync_file(file.fileno())
        except OSError as error:
            raise EngineUnavailableError from error

    def _log_bytes(self) -> int:
        """The size of the write-ahead log, which opening writes out again."""
        with os.scandir(self.path) as entries:
            return sum(entry.stat().st_size for entry in entries if entry.name.endswith(".log"))

    def checkpoint(self, path: str) -> None:
        try:
            Checkpoint(self._db).create_checkpoint(path)
        except Exception as error:
            raise self._failure(error) from error

    def compact(self) -> None:
        """Rewrites everything; blocks for as long as that takes."""
        self._db.flush(True)
        self._db.compact_range(None, None)

    def close(self) -> None:
        with self._sync_lock:
            self._failed = True
            self._close()

    def _close(self) -> None:
        self._acknowledged.close()
        with contextlib.suppress(Exception):  # after a failed log this fails again, but releases handle and lock
            self._db.close()


class RocksReader(RocksRead):
    """A read-only view of a directory that a server may have open; it does not change until `refresh`. See
    `store.engine.Reader`."""

    def __init__(self, path: str) -> None:
        super().__init__()
        check_exists(path)
        for attempt in reversed(range(OPENINGS)):  # a server may delete or write a file meanwhile
            try:
                self._open(path)
            except StoreDamagedError:
                if not attempt:
                    raise
            else:
                break

    def _open(self, path: str) -> None:
        known = acknowledged.last(path)
        self._scratch = tempfile.TemporaryDirectory(prefix="progressdb-reader-")
        try:
            options = engine_options()
            options.set_max_open_files(-1)  # files that the server deletes meanwhile stay readable
            named = _tables(path)
            self._db = Rdict(path, options, access_type=AccessType.secondary(self._scratch.name))
        except Exception as error:
            self._scratch.cleanup()
            raise not_opened(path, error) from error
        # A secondary takes the newest state whose files all open: without one of them, that may be an empty one.
        if (named - _names(self._db)) & _tables(path):
            self.close()
            raise _refusal(path)
        if self._db.latest_sequence_number() < known:
            self.close()
            raise _cut(path)

    def refresh(self) -> None:
        try:
            self._db.try_catch_up_with_primary()
        except Exception as error:
            raise self._failure(error) from error

    def close(self) -> None:
        self._db.close()
        with contextlib.suppress(OSError):
            self._scratch.cleanup()


def _refusal(path: str) -> StoreUnavailableError:
    """Why not all files of the store open."""
    try:
        Rdict(path, engine_options(), access_type=AccessType.read_only(False)).close()
    except Exception as error:  # noqa: BLE001  rocksdict raises no other class
        return not_opened(path, error)
    return EngineUnavailableError(f"{path} is being changed: try again")


def _tables(path: str) -> set[str]:
    """The files that the manifest names, whatever is left of them."""
    options = engine_options()
    options.set_paranoid_checks(False)  # else a file that is missing or cut is an error
    reader = Rdict(path, options, access_type=AccessType.read_only(False))
    try:
        return _names(reader)
    finally:
        reader.close()


def _names(db: Any) -> set[str]:
    return {str(file["name"]).lstrip("/") for file in db.live_files()}


def up_to(upper: bytes, *, cached: bool) -> ReadOptions:
    bounds = ReadOptions()
    bounds.set_iterate_upper_bound(upper)
    bounds.fill_cache(cached)  # type: ignore[call-arg]  # the stub lacks the argument
    return bounds


def _until(entries: Iterator[tuple[bytes, bytes]], bytes_max: int) -> tuple[list[tuple[bytes, bytes]], bool]:
    """The entries up to `bytes_max`, and whether their values together have so much."""
    page: list[tuple[bytes, bytes]] = []
    for entry in entries:
        page.append(entry)
        bytes_max -= len(entry[1])
        if bytes_max <= 0:
            return page, True
    return page, False


def failure(error: Exception) -> StoreUnavailableError:
    """What an error of RocksDB says: its text begins with its kind and names the file. A missing file is damage."""
    text = str(error)
    if text.startswith("Corruption") or "No such file" in text:
        named = _FILE.search(text)
        return StoreDamagedError(named.group() if named else "")
    return EngineUnavailableError()


def _to_the_damage() -> Options:
    """Options that open a store with what its log has before the first damage."""
    options = engine_options()
    options.set_wal_recovery_mode(DBRecoveryMode.point_in_time())
    return options


def _reached(path: str) -> int:
    """The number of the last write that a store has before the first damage in its logs, -1 if it does not open.
    Changes nothing."""
    try:
        with tempfile.TemporaryDirectory(prefix="progressdb-no-log-") as none:
            options = engine_options()
            options.set_wal_dir(none)
            tables = Rdict(path, options, access_type=AccessType.read_only(False))
            flushed = tables.latest_sequence_number()
            tables.close()
        if _first_logged(path) > flushed + 1:  # an earlier log is missing, which RocksDB does not notice
            return int(flushed)
        view = Rdict(path, _to_the_damage(), access_type=AccessType.read_only(False))
    except Exception:  # noqa: BLE001  whatever it is, it is not the end of the log
        return -1
    try:
        return int(view.latest_sequence_number())
    finally:
        view.close()


def _first_logged(path: str) -> int:
    """The number of the first write in the oldest log that has one; 0 if none has."""
    for name in sorted(name for name in os.listdir(path) if name.endswith(".log")):
        with open(os.path.join(path, name), "rb") as file:
            raw = file.read(LOG_HEADER_BYTES + 8)
        if len(raw) == LOG_HEADER_BYTES + 8:
            return int.from_bytes(raw[LOG_HEADER_BYTES:], "little")
    return 0


def _cut(path: str) -> StoreDamagedError:
    return StoreDamagedError("", path, "its log is cut or missing, with writes that were acknowledged")


def _damaged_log(path: str) -> str:
    """The log that was read last, as RocksDB's own log says; empty if it does not."""
    try:
        with open(os.path.join(path, "LOG"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            drops = _DROPPED.findall(file.read(LOG_TAIL_BYTES))
    except OSError:
        return ""
    return drops[-1].decode() if drops else ""


def not_opened(path: str, error: Exception) -> StoreUnavailableError:
    known = failure(error)
    if isinstance(known, StoreDamagedError):
        return StoreDamagedError(known.file or _damaged_log(path), path)
    return EngineUnavailableError(f"cannot open {path}: {error}")


def _reserve(descriptor: int, wanted_bytes: int) -> None:
    """Makes a file take so much of the disk; where there is no posix_fallocate(3), looks for so much free space.

    Raises OSError.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, wanted_bytes)
        return
    free = os.fstatvfs(descriptor)
    if free.f_bavail * free.f_frsize < wanted_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
