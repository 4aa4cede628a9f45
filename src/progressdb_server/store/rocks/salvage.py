"""What a damaged RocksDB still has, and a store made of that.

Owns: `Remains`, which reads around damaged files, and `rebuild`, which replaces a damaged store. Invariants:
- Every entry of a block with the right checksum is read, also where another file's block of the same range is damaged.
  There, an older version of a lost entry may be found, because only the lost one says that it was replaced.
- A disk that fails to read is no damage: EngineUnavailableError, and nothing is replaced.
- The damaged store is read through links in a directory of its own, and never written. `rebuild` sets it aside as a
  whole and deletes nothing of it.
- The new store is complete and durable before one system call puts it into the other's place. A call that was killed
  is made again.

rocksdict has no way to read one file. A reader of the store without a damaged one is opened on a copy of the manifest
with one more record: that the file was deleted (RocksDB's version_edit.cc and log_format.h).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import cache
from itertools import count
from typing import Any, Final, TypeAlias

import msgspec
from rocksdict import AccessType, DBRecoveryMode, Rdict

from minikms.platform.sync import sync_directory
from progressdb_server.store import keyspace, local
from progressdb_server.store.engine import SCAN_ENTRIES_MAX, EngineUnavailableError
from progressdb_server.store.model import RegisteredBackup, StoreDamagedError
from progressdb_server.store.offline import WALK_BYTES_MAX, LocalView, Lost
from progressdb_server.store.rocks.engine import (
    LOG_HEADER_BYTES,
    RocksRead,
    engine_options,
    exclusive,
    failure,
    not_opened,
    refuse_root_for_another,
    up_to,
)
from progressdb_server.store.rocks.offline import open_copy

Entry: TypeAlias = tuple[bytes, bytes]
REPAIRING: Final = ".repair"
"""Suffix of the directory of the new store. After the exchange it is that of the damaged one."""
DAMAGED: Final = ".damaged-"
"""Suffix, before a number, of a damaged store that was set aside."""
UNFINISHED: Final = "REPAIR"
"""A file in the new store until it is in its place."""
PROBED_BYTES: Final = (32, 128, 4096)
"""Keys between two others are tried as numbers of so many bytes. The last is more than any key has."""
SEEN_MAX: Final = 10_000
"""Entries of one damaged part that are named."""
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
_LOG_BLOCK_BYTES: Final = 32 * 1024
_DELETED_FILE: Final = 6


class Remains(RocksRead):
    """A read-only view of a store that no process writes. Reads of a damaged part raise StoreDamagedError; `walk` goes
    around it."""

    def __init__(self, path: str) -> None:
        """Opens the files. Raises StoreDamagedError where there is nothing to read, EngineUnavailableError."""
        super().__init__()
        self._path = path
        self._scratch = tempfile.TemporaryDirectory(prefix="progressdb-remains-")
        self._parts: dict[frozenset[str], Any] = {}
        try:
            self._levels: dict[str, int] = {}
            self._db = self._part(frozenset())
            self._levels = {str(one["name"]).lstrip("/"): int(one["level"]) for one in self._db.live_files()}
            self.lost_logs = self._lost_logs()
        except BaseException:
            self.close()
            raise

    def walk(self) -> Iterator[list[Entry] | Lost]:
        """All entries that can be read, in pages, and what can't."""
        if self.lost_logs:
            yield Lost(self.lost_logs, b"", b"", [])
        page: list[Entry] = []
        size = 0
        for part in self._walk(b"", keyspace.END, frozenset()):
            if isinstance(part, Lost):
                yield part
                continue
            page.append(part)
            size += len(part[1])
            if len(page) >= SCAN_ENTRIES_MAX or size >= WALK_BYTES_MAX:
                yield page
                page, size = [], 0
        yield page

    def close(self) -> None:
        for part in self._parts.values():
            part.close()
        self._parts.clear()
        self._scratch.cleanup()

    def _walk(self, lower: bytes, upper: bytes, without: frozenset[str]) -> Iterator[Entry | Lost]:
        part = self._part(without)
        while lower < upper:
            walk = part.iter(up_to(upper, cached=False))
            walk.seek(lower)
            while walk.valid():
                key = walk.key()
                yield key, walk.value()
                lower = keyspace.next_key(key)
                walk.next()
            reason = why_ended(walk)
            if not reason:
                return
            damage = failure(Exception(reason))
            if not isinstance(damage, StoreDamagedError) or damage.file not in self._levels.keys() - without:
                raise damage
            end = _end(part, lower, upper, reason)
            others = without | {damage.file}
            yield from self._walk(lower, end, others)
            yield Lost(damage.file, lower, end, _seen(part, lower, end, self._part(others)))
            lower = end

    def _part(self, without: frozenset[str], *, strict: bool = False) -> Any:
        """A reader of all files but these. `strict`: a damaged log is an error, and not passed over."""
        if without in self._parts and not strict:
            return self._parts[without]
        directory = tempfile.mkdtemp(dir=self._scratch.name)
        try:
            self._link(directory, without)
            options = engine_options()
            options.set_max_open_files(-1)
            options.set_paranoid_checks(strict)  # else a file that is missing or cut refuses all
            mode = (
                DBRecoveryMode.tolerate_corrupted_tail_records if strict else DBRecoveryMode.skip_any_corrupted_record
            )
            options.set_wal_recovery_mode(mode())
            part = Rdict(directory, options, access_type=AccessType.read_only(False))
        except Exception as error:
            raise not_opened(self._path, error) from error
        if strict:
            part.close()
        else:
            self._parts[without] = part
        return part

    def _lost_logs(self) -> str:
        """The names of the logs if one of them is damaged."""
        try:
            self._part(frozenset(self._levels), strict=True)
        except StoreDamagedError:
            return ", ".join(sorted(name for name in os.listdir(self._path) if name.endswith(".log")))
        return ""

    def _link(self, directory: str, without: frozenset[str]) -> None:
        with open(os.path.join(self._path, "CURRENT"), "rb") as file:
            manifest = os.path.basename(file.read().decode("ascii", "replace").strip())
        for name in os.listdir(self._path):
            if name.endswith((".sst", ".log")):
                os.symlink(os.path.join(os.path.abspath(self._path), name), os.path.join(directory, name))
        for name in ("CURRENT", manifest):
            shutil.copyfile(os.path.join(self._path, name), os.path.join(directory, name))
        if without:
            edit = bytearray()
            for name in sorted(without):
                for number in (_DELETED_FILE, self._levels[name], int(name.partition(".")[0])):
                    edit += _varint(number)
            with open(os.path.join(directory, manifest), "ab") as file:
                file.write(_log_record(bytes(edit), file.tell()))


def why_ended(walk: Any) -> str:
    """Why an iterator has ended; empty at the end of its range."""
    try:
        walk.status()
    except Exception as error:  # noqa: BLE001  rocksdict raises no other class
        return str(error)
    return ""


def _end(part: Any, lower: bytes, upper: bytes, reason: str) -> bytes:
    """The end of the part that can't be read for this reason, which names file and place: reads from any key of it fail
    with the same reason.
    """

    def fails(key: bytes) -> bool:
        walk = part.iter()
        walk.seek(key)
        return why_ended(walk) == reason

    if fails(upper):
        return upper
    inside, behind = lower, upper
    for width in PROBED_BYTES:
        low, high = (int.from_bytes(key[:width].ljust(width, b"\0")) for key in (inside, behind))
        while high - low > 1:
            middle = (low + high) // 2
            if fails(key := middle.to_bytes(width).rstrip(b"\0")):
                low, inside = middle, key
            else:
                high, behind = middle, key
        if not fails(keyspace.next_key(inside)):
            return min(upper, keyspace.next_key(inside))
    return behind


def _seen(part: Any, lower: bytes, upper: bytes, others: Any) -> list[Entry]:
    """What a damaged part holds that the others do not, read without checksums and as far as that goes."""
    unchecked = up_to(upper, cached=False)
    unchecked.set_verify_checksums(False)
    seen: list[Entry] = []
    walk = part.iter(unchecked)
    walk.seek(lower)
    while walk.valid() and len(seen) < SEEN_MAX:
        key, value = walk.key(), walk.value()
        known = None
        with contextlib.suppress(Exception):  # their part is damaged too
            known = others.get(key)
        if known != value:
            seen.append((key, value))
        walk.next()
    return seen


class RemainsView(LocalView):
    """`lost`: what `walk` could not read."""

    def __init__(self, remains: Remains) -> None:
        super().__init__(remains)
        self._remains = remains
        self.lost: list[Lost] = []

    async def walk(self) -> AsyncIterator[list[Entry]]:
        for part in self._remains.walk():
            if isinstance(part, Lost):
                self.lost.append(part)
            else:
                yield part


@contextlib.contextmanager
def open_remains(path: str) -> Iterator[RemainsView]:
    remains = Remains(path)
    try:
        with contextlib.suppress(StoreDamagedError):
            if remains.get(keyspace.FORMAT) is not None or not remains.lost_logs:
                local.check(remains)
        yield RemainsView(remains)
    finally:
        remains.close()


async def rebuild(path: str, prove: Callable[[list[Entry]], Awaitable[list[Entry]]]) -> list[Lost]:
    """Make a store of what can be read and of what `prove` returns of the rest, and put it into the place of the
    damaged one, which is set aside and registered as a backup. Raises StoreLockedError, StoreDamagedError if nothing
    is left, StoreUnavailableError, FormatError."""
    path = os.path.abspath(path)  # noqa: ASYNC240  no lookup
    refuse_root_for_another(path)
    target = path + REPAIRING
    try:
        with exclusive(path), open_remains(path) as view:
            _clear(path)
            aside = _free(path)
            os.mkdir(target, mode=0o700)
            os.mknod(os.path.join(target, UNFINISHED), mode=0o600)
            await _fill(target, path, RegisteredBackup(aside, time.time_ns()), view, prove)
            sync_directory(target)
            sync_directory(os.path.dirname(path))
            _exchange(path, target)
            os.rename(target, aside)
            os.unlink(os.path.join(path, UNFINISHED))
            sync_directory(os.path.dirname(path))
    except OSError as error:
        raise EngineUnavailableError(f"the damaged store could not be replaced: {error.strerror}") from error
    return view.lost


async def _fill(
    target: str,
    path: str,
    known: RegisteredBackup,
    view: RemainsView,
    prove: Callable[[list[Entry]], Awaitable[list[Entry]]],
) -> None:
    async with open_copy(target, path) as entries:
        count = 0
        async for page in view.walk():
            count += len(page)
            await entries.put([entry for entry in page if entry[0] != keyspace.FORMAT])
        for lost in view.lost:
            proved = await prove(lost.seen)
            count += len(proved)
            await entries.put(proved)
        if not count:
            raise StoreDamagedError("", path)
        await entries.put([(keyspace.backup(known.created_ns), msgspec.json.encode(known))])


def _clear(path: str) -> None:
    """Remove what a call that was killed has left: an unfinished store is deleted, a damaged one is set aside."""
    target = path + REPAIRING
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(path, UNFINISHED))
        sync_directory(path)
    if not os.path.lexists(target):
        return
    names = os.listdir(target)
    if UNFINISHED in names or not names:
        for name in names:
            if name != UNFINISHED:
                os.unlink(os.path.join(target, name))
        shutil.rmtree(target)
    else:
        os.rename(target, _free(path))


def _free(path: str) -> str:
    return next(name for number in count(1) if not os.path.lexists(name := f"{path}{DAMAGED}{number}"))


def _exchange(one: str, other: str) -> None:
    """Swap two directories in one step (renameat2(2)). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), other)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def _log_record(payload: bytes, at: int) -> bytes:
    """The log record as it is appended to a file of `at` bytes."""
    left = _LOG_BLOCK_BYTES - at % _LOG_BLOCK_BYTES
    record = b""
    kinds = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}
    first = True
    while True:
        if left < LOG_HEADER_BYTES:
            record += bytes(left)
            left = _LOG_BLOCK_BYTES
        part, payload = payload[: left - LOG_HEADER_BYTES], payload[left - LOG_HEADER_BYTES :]
        kind = bytes((kinds[first, not payload],))
        checksum = _crc32c(kind + part)
        masked = ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
        record += masked.to_bytes(4, "little") + len(part).to_bytes(2, "little") + kind + part
        if not payload:
            return record
        first, left = False, _LOG_BLOCK_BYTES


@cache
def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        crc = value
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


def _crc32c(content: bytes) -> int:
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
