"""The journal of key files: a change of a key's file is in `kms-journal` before the file changes
(docs/spec/journal.md).

Owns: the one way in which key files are made and changed, for creates, retirements and the batches of a rotation; the
end of a journal; the replay at a start. The work on files runs in one thread, so at most one journal is live. A group
of changes has these steps:
1. Its records are appended to the journal, with one sync; then the changes are durable.
2. Its files are made, or overwritten in place, without a sync of their own where `syncfs` reports every failure.
3. `flush`, when the journal is full, before and after a batch of a rotation, and at a stop: one `syncfs`, and the
   journal is removed. That of a batch is renamed into the directory of backups.

Invariants:
- A file changes only after its record is durable. The journal is removed or renamed only after every file that it has a
  record of is durable, and the directory of the files was synced.
- While the disk thread writes files, `DekStore.read` answers from memory. A file that the disk refuses is written by
  `flush`, and answered from memory until then; until then nothing else is changed. `refusal` says it.
- The record of a change that was refused does not stay: the journal is flushed at once, or in the background.
- After a failed sync neither journal nor files are synced again: the contents are written to fresh files and renamed.
- The records of a destroyed key are overwritten with zeros, durably, before `forget` returns.
- A replay never writes a file of a destroyed key, never makes a file that a change found, and never replaces another
  valid content. A journal with damaged records is kept, with whole records, as a backup.

It must never hold an unwrapped key.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from minikms.custody.deks import DekStore, HeldKeys, file_name
from minikms.custody.journal_format import (
    BLANK,
    BYTES_MAX,
    MAGIC,
    PART_RECORDS,
    RECORD_BYTES,
    RECORDS_MAX,
    Change,
    chains,
    completed,
    decode,
    encode_records,
    ids_in_journal,
    is_whole,
)
from minikms.custody.rotation_backups import RotationBackups
from minikms.keys.dek import KEY_ID_BYTES, bytes_to_key_id
from minikms.platform.files import (
    GROUP_FILES_MAX,
    FileWrite,
    check_room,
    make_file,
    open_directory,
    overwrite_file,
    read_file_bounded,
    remove_file,
    replace_file_from,
    write_all_at,
    write_files,
)
from minikms.platform.logs import Log
from minikms.platform.sync import sync_data, sync_file, syncfs, syncfs_reports
from minikms.platform.workers import in_worker

NAME: Final = "kms-journal"
HANDOVER_SECONDS: Final = 0.0002
"""The interpreter's switch interval while files are being written: each file takes three system calls, and after each
of them this thread waits that long for the interpreter if the event loop is busy.
"""
RETRY_SECONDS_MIN: Final = 0.25
RETRY_SECONDS_MAX: Final = 5.0


class Replayed(NamedTuple):
    """What a replay did: `written` files that did not have their content; `damaged` records."""

    written: int = 0
    damaged: int = 0


class Journal:
    """The journal of a data directory. Its coroutines are for the event loop's thread, `executor` runs all else."""

    def __init__(self, directory_fd: int, store: DekStore, backups: RotationBackups, executor: Executor) -> None:
        self._directory_fd = directory_fd
        self._store = store
        self._backups = backups
        self._executor = executor
        self._by_syncfs = syncfs_reports(store.directory_fd)
        self._fd: int | None = None
        self._files_fd: int | None = None
        """The key files' directory, opened before the first file of the journal is changed: on each descriptor,
        `syncfs` reports a failure once, and only one that came after its opening.
        """
        self._records: list[Change | None] = []
        """The changes since the journal was begun, at their places; None: blanked."""
        self._stamp = ""
        """The rotation whose batch the journal has; empty: it has other changes."""
        self._failed = False
        """A write or sync of the journal failed, or the files could not be written."""
        self.refusal = ""
        """Why the last change was refused, or its files not written; empty once the disk accepts changes again."""
        self._retrying: asyncio.Task[None] | None = None
        self._unwritten: dict[str, asyncio.Future[None]] = {}
        """The keys of the groups that have not ended, each with the end of its group."""

    # --- changes -----------------------------------------------------------------------------------------------------

    async def create(self, changes: Sequence[Change]) -> None:
        """Makes the files of new keys; durable on return. The files may not be written yet: see `file_written`. Raises
        StorageUnavailableError; then none of the keys is made.
        """
        outcome = self._submit(changes, "")
        try:
            await outcome
        finally:
            del outcome  # the traceback of its error leads to this frame

    async def replace(self, held: HeldKeys, changes: Sequence[Change], stamp: str = "") -> None:
        """Changes the files of keys whose locks are held; written and durable on return, or durable only, if the disk
        refuses the files. `stamp`: of the rotation, for a batch, whose old contents are kept under it. At most
        `journal_format.RECORDS_MAX` changes. Raises StorageUnavailableError; then none of the files is changed.
        """
        held.require(*(change.key_id for change in changes))
        outcome = self._submit(changes, stamp)
        try:
            await outcome
        finally:
            del outcome  # the traceback of its error leads to this frame
        await self.file_written(changes[0].key_id)  # for other processes, which read files

    async def file_written(self, key_id: str) -> None:
        """Returns when the file of a durable change was written, or when the disk has refused the file: then the
        journal has the content until it is written.
        """
        ended = self._unwritten.get(key_id)
        if ended is not None:
            await asyncio.shield(ended)

    def _submit(self, changes: Sequence[Change], stamp: str) -> asyncio.Future[None]:
        """Has the disk thread write a group. The result comes when the changes are durable."""
        loop = asyncio.get_running_loop()
        durable: asyncio.Future[None] = loop.create_future()
        ended: asyncio.Future[None] = loop.create_future()

        def acknowledge() -> None:
            if not durable.done():
                durable.set_result(None)

        def end(job: asyncio.Future[bool]) -> None:
            failure = asyncio.CancelledError() if job.cancelled() else job.exception()
            if failure is not None or not job.result():
                self.check_soon()
            for change in changes:
                self._unwritten.pop(change.key_id, None)
            ended.set_result(None)
            if failure is None:
                acknowledge()
            elif not durable.done():
                durable.set_exception(copy_of(failure) if isinstance(failure, KmsRefusedError) else failure)
            elif not isinstance(failure, StorageUnavailableError):
                raise failure  # a defect: the journal has the changes

        self._unwritten.update(dict.fromkeys((change.key_id for change in changes), ended))
        write = partial(self.write, changes, partial(loop.call_soon_threadsafe, acknowledge), stamp)
        in_worker(self._executor, write).add_done_callback(end)
        return durable

    def check_soon(self) -> None:
        """Finds out in the background whether the disk accepts changes, and goes on until it does: `refusal` says it.
        After a failure the journal is flushed so: a start would make the refused changes that it has.
        """
        if self._retrying is None or self._retrying.done():
            self._retrying = asyncio.get_running_loop().create_task(self._retry())

    async def _retry(self) -> None:
        logger = Log()
        pause, logged = RETRY_SECONDS_MIN, ""
        while True:
            if self.refusal and not logged:
                logged = self.refusal
                logger.warning("key files refused", reason=logged)
            await in_worker(self._executor, self._check)
            if not self.refusal:
                break
            await asyncio.sleep(pause)
            pause = min(2 * pause, RETRY_SECONDS_MAX)
        if logged:
            logger.info("key files written again")

    def _check(self) -> None:
        try:
            if self._failed:
                self.flush()
            if self._fd is None:
                self._begin((), "")
            check_room(self._store.directory_fd)
        except StorageUnavailableError as error:
            self._refuse(error)
        else:
            self.refusal = ""

    def _refuse(self, error: StorageUnavailableError) -> None:
        """No record of a refused change may stay. `_retry` takes over when the disk refuses that too."""
        cause = error.__cause__
        self.refusal = f"{error}: {os.strerror(cause.errno or 0)}" if isinstance(cause, OSError) else str(error)
        if self._failed:
            with contextlib.suppress(StorageUnavailableError):
                self.flush()

    def write(self, changes: Sequence[Change], durable: Callable[[], object], stamp: str = "") -> bool:
        """Writes a group of changes, and calls `durable` when they are. Returns whether their files are written. Raises
        StorageUnavailableError if the changes are refused.
        """
        try:
            self._append(changes, stamp)
        except StorageUnavailableError as error:
            self._refuse(error)
            raise
        self._store.answer_from_memory({change.key_id: change.new for change in changes})
        self._failed = True  # until all files are written: otherwise they are written again
        durable()
        try:
            with _quick_handover() if not stamp else contextlib.nullcontext():
                directory, sync = self._store.directory_fd, not self._by_syncfs
                for change in changes:
                    put = overwrite_file if change.old else make_file
                    put(directory, file_name(change.key_id), change.new, sync=sync)
            self._failed = False
            self._store.answer_from_memory({})
        except OSError as error:
            failure = StorageUnavailableError("a key file cannot be written")
            failure.__cause__ = error.with_traceback(None)
            self._refuse(failure)
        if not self._failed:
            self.refusal = ""
        return not self._failed

    def _append(self, changes: Sequence[Change], stamp: str) -> None:
        """Writes the records, durably. A batch of a rotation has a journal of its own, since that becomes a backup."""
        if self._failed or stamp or self._stamp or len(self._records) + len(changes) > RECORDS_MAX:
            self.flush()
        if self._fd is None:
            self._begin(changes, stamp)
        else:
            self._put(self._fd, b"".join(encode_records(changes)), len(self._records))
        self._records += changes

    def _begin(self, changes: Sequence[Change], stamp: str) -> None:
        self._failed = True  # until it is durable and open
        replace_file_from(self._directory_fd, NAME, _content_of(changes, padded=not stamp))
        try:
            self._files_fd = open_directory(self._store.directory)
            self._fd = os.open(NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd)
        except OSError as error:
            raise StorageUnavailableError("the journal of key files can't be opened") from error
        self._stamp, self._failed = stamp, False

    def _put(self, fd: int, data: bytes, *numbers: int) -> None:
        """Writes `data` at each of these records, durably."""
        self._failed = True  # until it is durable
        try:
            for number in numbers:
                write_all_at(fd, data, len(MAGIC) + number * RECORD_BYTES)
            sync_data(fd)
        except OSError as error:
            raise StorageUnavailableError("the journal of key files can't be written") from error.with_traceback(None)
        self._failed = False

    def forget(self, key_ids: Iterable[str]) -> None:
        """Blanks the records of keys, durably. Raises StorageUnavailableError; then call it again."""
        removed_ids = set(key_ids)
        numbers = [at for at, change in enumerate(self._records) if change is not None and change.key_id in removed_ids]
        for number in numbers:  # first: whatever fails, the journal is flushed without these keys
            self._records[number] = None
        if self._failed:
            self.flush()
        elif numbers and self._fd is not None:
            self._put(self._fd, BLANK, *numbers)

    # --- the end of a journal ----------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Makes the files of the journal durable, and removes it or keeps it as a backup. Raises
        StorageUnavailableError; then call it again.
        """
        if self._fd is None and not self._failed:
            return
        changes = [change for change in self._records if change is not None]
        if not self._failed and self._files_fd is not None:
            try:
                (syncfs if self._by_syncfs else sync_file)(self._files_fd)
            except OSError:
                self._failed = True
        if self._failed:
            # Of what a failed sync left, the page cache may lose any part.
            self._store.answer_from_memory({change.key_id: change.new for change in changes})
            due = (chain for chain in chains(changes).values() if chain.is_due(_content(self._store, chain.key_id)))
            _write_all(self._store, [FileWrite(file_name(chain.key_id), chain.contents[-1]) for chain in due])
            self._store.answer_from_memory({})
            if self._stamp and read_file_bounded(NAME, BYTES_MAX, dir_fd=self._directory_fd) is not None:
                # Records that should be blank may be there still, and it becomes a backup.
                replace_file_from(self._directory_fd, NAME, _content_of(changes, padded=False))
        self._failed = True  # if this fails: what is written to a removed file is lost
        if self._stamp and changes:
            key_ids = [change.key_id for change in changes]
            self._backups.adopt(self._directory_fd, NAME, self._stamp, min(key_ids), max(key_ids))
        else:
            remove_file(self._directory_fd, NAME)
        self.close()
        self._records.clear()
        self._stamp, self._failed = "", False

    async def drain(self) -> None:
        """Returns when the journal is flushed. No change may be under way. What the disk refuses is left to the replay
        of the next start.
        """

        def flush() -> None:
            with contextlib.suppress(StorageUnavailableError):
                self.flush()

        while self._unwritten:
            await self.file_written(next(iter(self._unwritten)))
        if self._retrying is not None:
            self._retrying.cancel()
            await asyncio.wait([self._retrying])
        await in_worker(self._executor, flush)

    def close(self) -> None:
        """Closes the files. After `drain`."""
        descriptors = (self._fd, self._files_fd)
        self._fd = self._files_fd = None  # first: the kernel frees a number even if its close fails
        for descriptor in descriptors:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)


def _content_of(changes: Sequence[Change], *, padded: bool) -> Iterator[bytes]:
    """The parts of a new journal. `padded`: with zeros for all records, so that one that follows changes no metadata of
    the file.
    """
    yield MAGIC
    for at in range(0, len(changes), PART_RECORDS):
        yield b"".join(encode_records(changes[at : at + PART_RECORDS]))
    if padded:
        yield bytes((RECORDS_MAX - len(changes)) * RECORD_BYTES)


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
    backups: RotationBackups,
    *,
    destroyed: Container[str],
    has_kek: Callable[[int], bool],
    stamp: str,
) -> Replayed:
    """Completes the changes that an interrupted run left, and removes the journal or keeps it as a backup. Call it
    before any DEK file is read. `has_kek`: whether the keyring can use a KEK version. `stamp`: of what is kept.

    Raises StorageUnavailableError, StartError.
    """
    content = read_file_bounded(NAME, BYTES_MAX, dir_fd=directory_fd)
    if content is None:
        return Replayed()
    journal = decode(content)
    written = 0
    writes: list[FileWrite] = []
    for chain in chains(change for change in journal.intact if change.key_id not in destroyed).values():
        present = _content(store, chain.key_id)
        new = chain.due(present, has_kek)
        if new is None:
            continue
        if store.is_directory(chain.key_id):
            raise StartError(f"{file_name(chain.key_id)} in kms-deks is a directory: move it away, then start again")
        written += present != new
        writes.append(FileWrite(file_name(chain.key_id), new))
    _write_all(store, writes)
    if journal.damaged or any(change.old for change in journal.intact):
        if not is_whole(content):
            content = completed(content)
            replace_file_from(directory_fd, NAME, (content,))
        named = sorted(ids_in_journal(content)) or [bytes_to_key_id(bytes(KEY_ID_BYTES))]
        backups.adopt(directory_fd, NAME, stamp, named[0], named[-1])
    else:
        remove_file(directory_fd, NAME)
    return Replayed(written, len(journal.damaged))


def _write_all(store: DekStore, writes: Sequence[FileWrite]) -> None:
    for start in range(0, len(writes), GROUP_FILES_MAX):
        write_files(store.directory_fd, writes[start : start + GROUP_FILES_MAX])
    store.sync_directory()  # even without a write: the names of the others may not be on the disk


def _content(store: DekStore, key_id: str) -> bytes | None:
    """The content of a key's file; None if it is absent, empty if it can't be read."""
    try:
        return store.read_file(key_id)
    except KeyNotFoundError:
        return None
    except KeyUnreadableError:
        return b""
