"""The create log: new DEK files are durable with one sync of one file for a whole group.

Owns: `kms-creates` (docs/spec/creates.md): its format, the steps of a group of creates, and the replay at a start.
A group has two steps: a record of each key is written to the log, with one sync for all; then the keys are durable, and
their files are made, without a sync of their own. When the log is full, before a KEK rotation and at a stop, one
`syncfs` makes the files durable, and the log is removed (`settle`).

Invariants:
- A key file is made only after its record is durable. So the content of a file that a power loss emptied is known.
- From the beginning of a group until its files are made, `DekStore.read` answers from memory. The jobs of the
  executor's thread run in order, so every later one finds the files. A file that the disk refuses is written when the
  log is settled; until then no further key is made.
- The log is removed only after every file that it has a record of is durable, and the directory of the files was
  synced: a file that was retired meanwhile may have been renamed by a process that was killed before it synced that.
- The record of a create that was refused does not stay: the log is settled at once, or in the background until the disk
  accepts it. Only a crash before that brings the key back.
- After a failed sync neither the log nor the files are synced again: the files are written anew and renamed, and the
  next create begins a new log (`minikms.custody.files`).
- The record of a destroyed key is overwritten with zeros, durably, before `forget` returns.
- A replay never writes a file of a destroyed key, and never replaces another valid record. It writes every other file
  of the log again, even if the content is equal: it may not be on the disk.
- A damaged record that a power loss does not explain is counted. If its key has no valid file, the record is kept as a
  rotation backup, which goes when the key is destroyed.

Where `syncfs` does not report every failure there is no log, and `minikms.custody.files.write_group` makes the files.
The work on files runs in one thread. It must never hold an unwrapped key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final, NamedTuple

from minikms.api.errors import (
    KeyNotFoundError,
    KeyUnreadableError,
    KmsRefusedError,
    StartError,
    StorageUnavailableError,
    copy_of,
)
from minikms.custody.deks import DekStore, file_name
from minikms.custody.files import (
    GROUP_FILES_MAX,
    FileWrite,
    make_file,
    open_directory,
    read_file_bounded,
    remove_file,
    replace_file,
    syncfs,
    syncfs_reports,
    write_all_at,
    write_files,
    write_group,
)
from minikms.keys import dek
from minikms.keys.dek import FILE_BYTES, KEY_ID_BYTES, bytes_to_key_id, key_id_to_bytes
from minikms.sync import sync_data

NAME: Final = "kms-creates"
MAGIC: Final = b"minikms-creates\x01"
"""The last byte is the version of the format."""
CHECKSUM_BYTES: Final = 32
RECORD_BYTES: Final = KEY_ID_BYTES + FILE_BYTES + CHECKSUM_BYTES
RECORDS_MAX: Final = 2048
"""A start writes at most this many files again."""
SECTOR_BYTES: Final = 512
"""The smallest unit that a disk writes whole."""
HANDOVER_SECONDS: Final = 0.0002
"""The interpreter's switch interval while files are being made: each file takes three system calls, and after each of
them this thread waits that long for the interpreter if the event loop is busy.
"""
RETRY_SECONDS_MIN: Final = 0.25
RETRY_SECONDS_MAX: Final = 5.0
LOG_BYTES: Final = len(MAGIC) + RECORDS_MAX * RECORD_BYTES
"""The size of every log: it begins with zeros for all records, so that a record changes no metadata of the file."""
BLANK: Final = bytes(RECORD_BYTES)


class NewKey(NamedTuple):
    """A key whose file is made. `content` has FILE_BYTES."""

    key_id: str
    content: bytes


class Decoded(NamedTuple):
    """The records of a log: the intact ones, and damaged ones that a power loss does not explain."""

    intact: list[NewKey]
    damaged: list[NewKey]


class Completed(NamedTuple):
    """What a replay did: `files` that were missing or damaged, and `damaged` records of the log."""

    files: int = 0
    damaged: int = 0


# --- the format -----------------------------------------------------------------------------------------------------


def encode(keys: Iterable[NewKey]) -> bytes:
    """The content of a log with these records."""
    return (MAGIC + b"".join(map(_encode_record, keys))).ljust(LOG_BYTES, b"\0")


def _encode_record(key: NewKey) -> bytes:
    body = key_id_to_bytes(key.key_id) + key.content
    return body + _checksum(body)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(MAGIC + body).digest()


def decode(content: bytes) -> Decoded:
    """The records of a log, without those that were not completely written. Raises StartError if another version of the
    program wrote it.
    """
    found = Decoded([], [])
    for offset in range(len(MAGIC), len(content) - RECORD_BYTES + 1, RECORD_BYTES):
        record = content[offset : offset + RECORD_BYTES]
        if record == BLANK:
            continue
        body, checksum = record[:-CHECKSUM_BYTES], record[-CHECKSUM_BYTES:]
        if checksum == _checksum(body):
            found.intact.append(NewKey(bytes_to_key_id(body[:KEY_ID_BYTES]), body[KEY_ID_BYTES:]))
        elif not _has_empty_sector(content, offset):
            found.damaged.append(_damaged(body))
    if not found.intact and dek.is_other_version(content, MAGIC):
        raise StartError(
            f"{NAME} was written by another version of miniKMS, which did not stop in order; start the version that "
            "wrote it once and stop it, then start this one"
        )
    return found


def _has_empty_sector(content: bytes, offset: int) -> bool:
    """Whether a sector of the record is zeros: the file began with zeros, and a power loss came while the record was
    written or overwritten.
    """
    end = offset + RECORD_BYTES
    starts = range(offset - offset % SECTOR_BYTES, end, SECTOR_BYTES)
    return any(not any(content[max(start, offset) : min(start + SECTOR_BYTES, end)]) for start in starts)


def _damaged(body: bytes) -> NewKey:
    """A damaged record: its key has the id in the content if that is valid, else the id in front of it."""
    content = body[KEY_ID_BYTES:]
    named = dek.id_in(content)
    if not named or not dek.is_valid(content, named):
        named = bytes_to_key_id(body[:KEY_ID_BYTES])
    return NewKey(named, content)


def read_logged(data_dir: str) -> dict[str, bytes]:
    """The records of a log that the daemon may be writing, by key id: what a start would make of missing files.

    Raises StorageUnavailableError, StartError.
    """
    content = read_file_bounded(os.path.join(data_dir, NAME), LOG_BYTES)
    return {} if content is None else dict(decode(content).intact)


class _Logged(NamedTuple):
    """A key, and the number of its record."""

    number: int
    key: NewKey


# --- creating -------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """What became of a group: None or the error of each key, and whether all of its files were made."""

    outcomes: list[KmsRefusedError | None]
    made: bool


class CreateLog:
    """The create log of a data directory. `write_group` is for the event loop's thread, `executor` runs all else."""

    def __init__(self, directory_fd: int, store: DekStore, executor: Executor) -> None:
        self._directory_fd = directory_fd
        self._store = store
        self._executor = executor
        self._log_fd: int | None = None
        self._files_fd: int | None = None
        """Of the key files' directory, opened before the first file of the log is made: on each descriptor, `syncfs`
        reports a failure once, and only one that came after its opening.
        """
        self._logged: dict[str, _Logged] = {}
        self._used = 0
        self._failed = False
        """A write or sync of the log failed, or the files could not be synced."""
        self._settling: asyncio.Task[None] | None = None
        self._unmade: dict[str, list[asyncio.Future[None]]] = {}
        """The keys whose groups have not ended, each with the waiters of its group."""

    async def write_group(self, keys: Sequence[NewKey]) -> list[KmsRefusedError | None]:
        """Makes keys, durable on return. Returns for each key None, or the error that refuses it. The files may not be
        made yet: see `file_made`. Raises StorageUnavailableError if all keys are refused.
        """
        return await self._begin_group(keys)

    def _begin_group(self, keys: Sequence[NewKey]) -> asyncio.Future[list[KmsRefusedError | None]]:
        """Not a part of `write_group`, to whose frame the traceback of the future's error leads."""
        loop = asyncio.get_running_loop()
        contents, waiting = dict(keys), list[asyncio.Future[None]]()
        outcomes: asyncio.Future[list[KmsRefusedError | None]] = loop.create_future()

        def answer() -> None:
            if not outcomes.done():
                outcomes.set_result([None] * len(keys))

        def ended(job: asyncio.Future[Written]) -> None:
            failure = asyncio.CancelledError() if job.cancelled() else job.exception()
            if failure is None and job.result().made:
                self._store.made(contents)
            else:
                self._store.made([key_id for key_id in contents if key_id not in self._logged])
                if self._settling is None or self._settling.done():
                    self._settling = loop.create_task(self._settle_failed())
            for key_id in contents:
                del self._unmade[key_id]
            for made in waiting:
                if not made.done():
                    made.set_result(None)
            if outcomes.done():
                if failure is not None:
                    raise failure  # a defect: the log has the keys
            elif failure is None:
                outcomes.set_result(job.result().outcomes)
            else:
                # A copy: the traceback of the error leads to the frame of the job, which has this future too.
                outcomes.set_exception(copy_of(failure) if isinstance(failure, KmsRefusedError) else failure)

        self._store.making(contents)
        self._unmade.update(dict.fromkeys(contents, waiting))
        job = loop.run_in_executor(self._executor, self.write, keys, partial(loop.call_soon_threadsafe, answer))
        job.add_done_callback(ended)
        return outcomes

    async def file_made(self, key_id: str) -> None:
        """Returns when the file of a durable key was made, or when the disk has refused the file: then the log has the
        key until the file is made.
        """
        waiting = self._unmade.get(key_id)
        if waiting is not None:
            made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append(made)
            await made

    async def _settle_failed(self) -> None:
        """Settles the log after a failure, as soon as the disk accepts it: a start would make the refused keys that it
        has, and retire those that they replace.
        """

        def settle() -> None:
            if self._failed:
                self.settle()

        pause = RETRY_SECONDS_MIN
        while self._failed:
            await asyncio.sleep(pause)
            with contextlib.suppress(StorageUnavailableError):
                await asyncio.get_running_loop().run_in_executor(self._executor, settle)
            pause = min(2 * pause, RETRY_SECONDS_MAX)

    def write(self, keys: Sequence[NewKey], durable: Callable[[], object]) -> Written:
        """Makes a group of keys and their files. Calls `durable` when all keys are durable; where there is no log, the
        outcomes say which are. Raises StorageUnavailableError if all keys are refused.
        """
        if not syncfs_reports(self._store.directory_fd):
            writes = [FileWrite(file_name(key.key_id), key.content, exclusive=True) for key in keys]
            return Written(write_group(self._store.directory_fd, writes), made=True)
        try:
            self._append(keys)
        except StorageUnavailableError:
            self._settle_if_failed()
            raise
        self._failed = True  # until all files are made: otherwise they are written again
        durable()
        try:
            with _quick_handover():
                for key in keys:
                    make_file(self._store.directory_fd, file_name(key.key_id), key.content)
        except OSError:
            self._settle_if_failed()
        else:
            self._failed = False
        return Written([None] * len(keys), made=not self._failed)

    def _settle_if_failed(self) -> None:
        """So that no record of a refused create stays. What the disk refuses here is tried again in the background."""
        if self._failed:
            with contextlib.suppress(StorageUnavailableError):
                self.settle()

    def _append(self, keys: Sequence[NewKey]) -> None:
        if self._failed or self._used + len(keys) > RECORDS_MAX:
            self.settle()
        log_fd = self._begin() if self._log_fd is None else self._log_fd
        self._write(log_fd, b"".join(map(_encode_record, keys)), self._used)
        for key in keys:
            self._logged[key.key_id] = _Logged(self._used, key)
            self._used += 1

    def _begin(self) -> int:
        replace_file(self._directory_fd, NAME, encode(()))
        self._failed = True  # until both are open
        try:
            self._files_fd = open_directory(self._store.directory)
            flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._log_fd = os.open(NAME, flags, dir_fd=self._directory_fd)
        except OSError as error:
            raise StorageUnavailableError("the create log can't be opened") from error
        self._failed = False
        return self._log_fd

    def _write(self, log_fd: int, data: bytes, *numbers: int) -> None:
        """Writes `data` at each of these records, durably."""
        self._failed = True  # until it is durable
        try:
            for number in numbers:
                write_all_at(log_fd, data, len(MAGIC) + number * RECORD_BYTES)
            sync_data(log_fd)
        except OSError as error:
            raise StorageUnavailableError("the create log can't be written") from error.with_traceback(None)
        self._failed = False

    def forget(self, key_ids: Iterable[str]) -> None:
        """Removes the records of keys from the log, durably. Raises StorageUnavailableError; then call it again."""
        # First: whatever fails, the log is settled without these keys.
        going = [self._logged.pop(key_id) for key_id in key_ids if key_id in self._logged]
        self._store.made([logged.key.key_id for logged in going])
        if self._failed:
            self.settle()
        elif going and self._log_fd is not None:
            self._write(self._log_fd, BLANK, *(logged.number for logged in going))

    def settle(self) -> None:
        """Makes the files of the log durable, and removes it. Raises StorageUnavailableError; then call it again."""
        if self._log_fd is None and not self._failed:
            return
        if not self._failed and self._files_fd is not None:
            try:
                syncfs(self._files_fd)
            except OSError:
                self._failed = True
        if self._failed:
            _write_anew(self._store, [logged.key for logged in self._logged.values()])
            self._store.made(self._logged)
        self._failed = True  # if the removal fails: what is written to a removed file is lost
        remove_file(self._directory_fd, NAME)
        self._close_files()
        self._logged.clear()
        self._used, self._failed = 0, False

    def _close_files(self) -> None:
        descriptors = (self._log_fd, self._files_fd)
        self._log_fd = self._files_fd = None  # first: the kernel frees a number even if its close fails
        for descriptor in descriptors:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    async def drain(self) -> None:
        """Returns when the log is settled. No create may be under way. What the disk refuses is left to the replay of
        the next start.
        """

        def settle() -> None:
            with contextlib.suppress(StorageUnavailableError):
                self.settle()

        while self._unmade:
            await self.file_made(next(iter(self._unmade)))
        if self._settling is not None:
            self._settling.cancel()
            await asyncio.wait([self._settling])
        await asyncio.get_running_loop().run_in_executor(self._executor, settle)

    def close(self) -> None:
        """Closes the files, after `drain`."""
        self._close_files()


@contextlib.contextmanager
def _quick_handover() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, HANDOVER_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


# --- the replay -----------------------------------------------------------------------------------------------------


def replay(
    directory_fd: int,
    store: DekStore,
    *,
    destroyed: Container[str],
    has_kek: Callable[[int], bool],
    keep: Callable[[str, bytes], None],
) -> Completed:
    """Completes the files of a log that an interrupted run left, and removes it. Call it before any DEK file is read,
    except by the replay of a rotation's journal.

    `has_kek`: whether the keyring can use a KEK version. A key under another one is left out: the keyring was restored
    from a backup that is older than the key. `keep` keeps the content of a damaged record durably, by key id. Raises
    StorageUnavailableError, StartError.
    """
    content = read_file_bounded(NAME, LOG_BYTES, dir_fd=directory_fd)
    if content is None:
        return Completed()
    found = decode(content)
    usable = (key for key in found.intact if dek.is_usable(key.content, key.key_id, has_kek))
    completed = _write_anew(store, [key for key in usable if key.key_id not in destroyed])
    for key in found.damaged:
        if key.key_id not in destroyed and not dek.is_valid(_content(store, key.key_id), key.key_id):
            keep(key.key_id, key.content)
    remove_file(directory_fd, NAME)
    return Completed(completed, len(found.damaged))


def _write_anew(store: DekStore, keys: Iterable[NewKey]) -> int:
    """Writes the files of keys to fresh files, except those that have another valid record; the number of files that
    were missing or damaged. All files are durable on return.
    """
    writes: list[FileWrite] = []
    completed = 0
    for key in keys:
        found = _content(store, key.key_id)
        if not _is_other(found, key):
            completed += found != key.content
            writes.append(FileWrite(file_name(key.key_id), key.content))
    for start in range(0, len(writes), GROUP_FILES_MAX):
        write_files(store.directory_fd, writes[start : start + GROUP_FILES_MAX])
    store.sync_directory()  # even without a write: the names of the others may not be on the disk
    return completed


def _content(store: DekStore, key_id: str) -> bytes:
    """The content of a key's file; empty if it is absent or can't be read."""
    try:
        return store.read(key_id, of_making=False)
    except (KeyNotFoundError, KeyUnreadableError):
        return b""


def _is_other(content: bytes, key: NewKey) -> bool:
    """Whether the content of a key's file is a valid record of the key that differs from that of the log. Then it is
    newer, whatever its version. A file that was cut in its padding does not differ.
    """
    return dek.is_valid(content, key.key_id) and dek.parse(content, key.key_id) != dek.parse(key.content, key.key_id)
