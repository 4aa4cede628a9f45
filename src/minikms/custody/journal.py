"""The journal of key files: a change of a key's file is in `kms-journal` before the file changes
(docs/spec/journal.md).

Owns: the format of the journal and of the backups that it becomes, the replay table, the steps of a group of changes
and of a batch of a rotation, and the replay at a start. The work on files runs in one thread, so at most one journal is
live.
- **Changes**: creates and retirements. Their records are appended, with one sync for a group; then they are durable,
  and their files are made or replaced by rename, without a sync of their own. A full journal, the begin of a rotation
  and a stop settle it: one `syncfs`, and the journal is removed.
- **A batch** of a rotation: its journal is written, the files are overwritten in place with one `syncfs`, and the
  journal is renamed into the directory of backups.

Invariants:
- A file changes only after its record is durable. The journal is removed or renamed only after every file that it has a
  record of is durable, and the directory of the files was synced.
- While the disk thread writes a group, until its files are made, `DekStore.read` answers from memory. A file that the
  disk refuses is written when the journal is settled; until then nothing else is changed.
- The record of a change that was refused does not stay: the journal is settled at once, or in the background.
- After a failed sync neither journal nor files are synced again: the contents are written to fresh files and renamed.
- The records of a destroyed key are overwritten with zeros, durably, before `forget` returns.
- A replay never writes a file of a destroyed key, never makes a file that a change found, and never replaces another
  valid content.

While a rotation runs, and where `syncfs` does not report every failure, changes have no record: their files are synced
by themselves. It must never hold an unwrapped key.
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
from minikms.custody.backups import RotationBackups
from minikms.custody.deks import DekStore, HeldKeys, file_name
from minikms.custody.files import (
    GROUP_FILES_MAX,
    FileWrite,
    make_file,
    open_directory,
    overwrite_files,
    read_file_bounded,
    remove_file,
    replace_file_from,
    swap_file,
    syncfs,
    syncfs_reports,
    write_all_at,
    write_files,
    write_group,
)
from minikms.custody.journal_format import (
    BLANK,
    BYTES_MAX,
    MAGIC,
    PART_RECORDS,
    RECORD_BYTES,
    RECORDS_MAX,
    Chain,
    Change,
    chains,
    decode,
    encode_records,
    ids_in_journal,
)
from minikms.keys.dek import KEY_ID_BYTES, bytes_to_key_id
from minikms.sync import sync_data

NAME: Final = "kms-journal"
CHANGES_MAX: Final = RECORDS_MAX
"""Records of changes: a start writes at most this many files again."""
CHANGES_BYTES: Final = BYTES_MAX
"""A journal of changes begins with zeros for all records, so that a record changes no metadata of the file."""
HANDOVER_SECONDS: Final = 0.0002
"""The interpreter's switch interval while files are being made: each file takes three system calls, and after each of
them this thread waits that long for the interpreter if the event loop is busy.
"""
RETRY_SECONDS_MIN: Final = 0.25
RETRY_SECONDS_MAX: Final = 5.0


class Written(NamedTuple):
    """What became of a group: None or the error of each change, and whether all of its files were made."""

    outcomes: list[KmsRefusedError | None]
    made: bool


class Replayed(NamedTuple):
    """What a replay did: `written` files that did not have their content; `damaged` records."""

    written: int = 0
    damaged: int = 0


class Journal:
    """The journal of a data directory. `change` and what follows it are for the event loop's thread, `executor` runs
    all else.
    """

    def __init__(self, directory_fd: int, store: DekStore, backups: RotationBackups, executor: Executor) -> None:
        self._directory_fd = directory_fd
        self._store = store
        self._backups = backups
        self._executor = executor
        self._fd: int | None = None
        self._files_fd: int | None = None
        """Of the key files' directory, opened before the first file of the journal is changed: on each descriptor,
        `syncfs` reports a failure once, and only one that came after its opening.
        """
        self._records: list[Change | None] = []
        """Of the changes since the journal was begun, at their places; None: blanked."""
        self._failed = False
        """A write or sync of the journal failed, or the files could not be written."""
        self._rotating = False
        self._batch: Sequence[Change] = ()
        self._overwriting = False
        self.live = False
        """Whether there may be the journal of a batch on disk."""
        self._settling: asyncio.Task[None] | None = None
        self._unmade: dict[str, list[asyncio.Future[None]]] = {}
        """The keys whose groups have not ended, each with the waiters of its group."""

    # --- changes -----------------------------------------------------------------------------------------------------

    async def retire(self, held: HeldKeys, old: bytes, new: bytes) -> None:
        """Changes the file of the one key whose lock is held; durable on return. Raises StorageUnavailableError."""
        [key_id] = held.require()
        await self.file_made(key_id)  # by the group that creates it
        [outcome] = await self.change([Change(key_id, old, new)])
        if outcome is not None:
            try:
                raise outcome
            finally:
                del outcome  # the traceback of an error leads to this frame
        await self.file_made(key_id)  # for other processes, which read files

    async def change(self, changes: Sequence[Change]) -> list[KmsRefusedError | None]:
        """Makes or changes files; durable on return. Returns for each change None, or the error that refuses it. The
        files may not be written yet: see `file_made`. Raises StorageUnavailableError if all are refused.
        """
        outcomes = self._begin_change(changes)
        try:
            return await outcomes
        finally:
            del outcomes  # the traceback of its error leads to this frame

    def _begin_change(self, changes: Sequence[Change]) -> asyncio.Future[list[KmsRefusedError | None]]:
        loop = asyncio.get_running_loop()
        key_ids, waiting = [change.key_id for change in changes], list[asyncio.Future[None]]()
        outcomes: asyncio.Future[list[KmsRefusedError | None]] = loop.create_future()

        def answer() -> None:
            if not outcomes.done():
                outcomes.set_result([None] * len(changes))

        def ended(job: asyncio.Future[Written]) -> None:
            failure = asyncio.CancelledError() if job.cancelled() else job.exception()
            if (failure is not None or not job.result().made) and (self._settling is None or self._settling.done()):
                self._settling = loop.create_task(self._settle_failed())
            for key_id in key_ids:
                self._unmade.pop(key_id, None)
            for made in waiting:
                if not made.done():
                    made.set_result(None)
            if not outcomes.done():
                if failure is None:
                    outcomes.set_result(job.result().outcomes)
                else:
                    outcomes.set_exception(copy_of(failure) if isinstance(failure, KmsRefusedError) else failure)
            elif failure is not None and not isinstance(failure, StorageUnavailableError):
                raise failure  # a defect: the journal has the changes

        self._unmade.update(dict.fromkeys(key_ids, waiting))
        job = loop.run_in_executor(self._executor, self.write, changes, partial(loop.call_soon_threadsafe, answer))
        job.add_done_callback(ended)
        return outcomes

    async def file_made(self, key_id: str) -> None:
        """Returns when the file of a durable change was written, or when the disk has refused the file: then the
        journal has the content until it is written.
        """
        waiting = self._unmade.get(key_id)
        if waiting is not None:
            made: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append(made)
            await made

    async def _settle_failed(self) -> None:
        """Settles the journal after a failure, as soon as the disk accepts it: a start would make the refused changes
        that it has.
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

    def write(self, changes: Sequence[Change], durable: Callable[[], object]) -> Written:
        """Writes a group of changes and their files. Calls `durable` when all are durable; where there is no record,
        the outcomes say which are. Raises StorageUnavailableError if all are refused.
        """
        self._store.making({change.key_id: change.new for change in changes})
        try:
            return self._write(changes, durable)
        finally:
            self._store.made([change.key_id for change in changes])
            if self._failed:  # the files that could not be written are answered from memory until they are
                self._store.making({change.key_id: change.new for change in self._records if change is not None})

    def _write(self, changes: Sequence[Change], durable: Callable[[], object]) -> Written:
        if self.live:
            raise StorageUnavailableError(
                "the disk has not accepted a batch of a KEK rotation; try again later, or if the rotation was stopped, "
                "after a restart of the daemon"
            )
        if self._rotating or not syncfs_reports(self._store.directory_fd):
            writes = [FileWrite(file_name(each.key_id), each.new, exclusive=not each.old) for each in changes]
            return Written(write_group(self._store.directory_fd, writes), made=True)
        try:
            self._append(changes)
        except StorageUnavailableError:
            self._settle_if_failed()
            raise
        self._failed = True  # until all files are written: otherwise they are written again
        durable()
        try:
            with _quick_handover():
                for change in changes:
                    put = swap_file if change.old else make_file
                    put(self._store.directory_fd, file_name(change.key_id), change.new)
        except OSError:
            self._settle_if_failed()
        else:
            self._failed = False
        return Written([None] * len(changes), made=not self._failed)

    def _settle_if_failed(self) -> None:
        """So that no record of a refused change stays. What the disk refuses here is tried again in the background."""
        if self._failed:
            with contextlib.suppress(StorageUnavailableError):
                self.settle()

    def _append(self, changes: Sequence[Change]) -> None:
        if self._failed or len(self._records) + len(changes) > CHANGES_MAX:
            self.settle()
        fd = self._begin() if self._fd is None else self._fd
        self._put(fd, b"".join(encode_records(changes)), len(self._records))
        self._records += changes

    def _begin(self) -> int:
        replace_file_from(self._directory_fd, NAME, (MAGIC.ljust(CHANGES_BYTES, b"\0"),))
        self._failed = True  # until both are open
        try:
            self._files_fd = open_directory(self._store.directory)
            self._fd = os.open(NAME, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd)
        except OSError as error:
            raise StorageUnavailableError("the journal of key files can't be opened") from error
        self._failed = False
        return self._fd

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
        going = set(key_ids)
        numbers = [at for at, change in enumerate(self._records) if change is not None and change.key_id in going]
        for number in numbers:  # first: whatever fails, the journal is settled without these keys
            self._records[number] = None
        self._store.made(going)
        if self._failed:
            self.settle()
        elif numbers and self._fd is not None:
            self._put(self._fd, BLANK, *numbers)

    def settle(self) -> None:
        """Makes the files of the journal durable, and removes it. Raises StorageUnavailableError; then call it
        again.
        """
        if self._fd is None and not self._failed:
            return
        if not self._failed and self._files_fd is not None:
            try:
                syncfs(self._files_fd)
            except OSError:
                self._failed = True
        if self._failed:
            _write_anew(self._store, chains(change for change in self._records if change is not None).values())
        self._store.made({change.key_id for change in self._records if change is not None})
        self._failed = True  # if the removal fails: what is written to a removed file is lost
        remove_file(self._directory_fd, NAME)
        self._close_files()
        self._records.clear()
        self._failed = False

    def _close_files(self) -> None:
        descriptors = (self._fd, self._files_fd)
        self._fd = self._files_fd = None  # first: the kernel frees a number even if its close fails
        for descriptor in descriptors:
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)

    async def drain(self) -> None:
        """Returns when the journal is settled. No change may be under way. What the disk refuses is left to the replay
        of the next start.
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

    # --- a rotation --------------------------------------------------------------------------------------------------

    def begin_rotation(self) -> None:
        """Settles the journal, which belongs to the batches of a rotation from here on. Raises
        StorageUnavailableError.
        """
        self.settle()
        self._rotating = True

    def end_rotation(self) -> None:
        """Changes are recorded again."""
        self._rotating = False

    def write_batch(self, held: HeldKeys, batch: Sequence[Change], stamp: str) -> None:
        """Changes the files of a batch, durably on return, and keeps the journal as their backup. The locks of the keys
        must stay held while `live` is true. At most `journal_format.RECORDS_MAX` changes.

        Raises StorageUnavailableError. Then no file has changed, unless `live` is true: call `settle_batch` until it
        returns.
        """
        held.require(*(change.key_id for change in batch))
        if self.live:
            raise StorageUnavailableError("the batch before is not settled, since the disk fails")
        self._backups.make_stamp(stamp)
        self._batch, self._overwriting, self.live, self._stamp = batch, False, True, stamp
        parts = (batch[at : at + PART_RECORDS] for at in range(0, len(batch), PART_RECORDS))
        encoded = (b"".join(encode_records(part)) for part in parts)
        replace_file_from(self._directory_fd, NAME, _with_magic(encoded))
        self._overwriting = True
        writes = [FileWrite(file_name(change.key_id), change.new) for change in batch]
        left = overwrite_files(self._store.directory_fd, writes)
        write_files(self._store.directory_fd, left)
        self._keep()

    def settle_batch(self) -> bool:
        """Completes or withdraws a batch whose `write_batch` failed, durably on return. Whether the files have changed.

        Raises StorageUnavailableError; then call it again.
        """
        written = self._overwriting
        if written:
            present = [change for change in self._batch if self._store.has(change.key_id)]
            write_files(self._store.directory_fd, [FileWrite(file_name(each.key_id), each.new) for each in present])
            self._keep()
        else:
            remove_file(self._directory_fd, NAME)
            self._batch, self.live = (), False
        return written

    def _keep(self) -> None:
        key_ids = [change.key_id for change in self._batch]
        self._backups.adopt(self._directory_fd, NAME, self._stamp, min(key_ids), max(key_ids))
        self._batch, self._overwriting, self.live = (), False, False


def _with_magic(parts: Iterator[bytes]) -> Iterator[bytes]:
    yield MAGIC
    yield from parts


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
    found = decode(content)
    written = 0
    writes: list[FileWrite] = []
    for chain in chains(change for change in found.intact if change.key_id not in destroyed).values():
        new, present = chain.usable(has_kek), _content(store, chain.key_id)
        if new is None or not chain.is_due(present):
            continue
        if store.is_directory(chain.key_id):
            raise StartError(f"{file_name(chain.key_id)} in kms-deks is a directory: move it away, then start again")
        written += present != new
        writes.append(FileWrite(file_name(chain.key_id), new))
    _write_all(store, writes)
    if found.damaged or any(change.old for change in found.intact):
        named = sorted(ids_in_journal(content)) or [bytes_to_key_id(bytes(KEY_ID_BYTES))]
        backups.make_stamp(stamp)
        backups.adopt(directory_fd, NAME, stamp, named[0], named[-1])
    else:
        remove_file(directory_fd, NAME)
    return Replayed(written, found.damaged)


def _write_anew(store: DekStore, of_keys: Iterable[Chain]) -> None:
    """Writes the last contents of keys to fresh files, except where the file has another valid content."""
    writes = [
        FileWrite(file_name(chain.key_id), chain.contents[-1])
        for chain in of_keys
        if chain.is_due(_content(store, chain.key_id))
    ]
    _write_all(store, writes)


def _write_all(store: DekStore, writes: Sequence[FileWrite]) -> None:
    for start in range(0, len(writes), GROUP_FILES_MAX):
        write_files(store.directory_fd, writes[start : start + GROUP_FILES_MAX])
    store.sync_directory()  # even without a write: the names of the others may not be on the disk


def _content(store: DekStore, key_id: str) -> bytes | None:
    """The content of a key's file; None if it is absent, empty if it can't be read."""
    try:
        return store.read(key_id, of_making=False)
    except KeyNotFoundError:
        return None
    except KeyUnreadableError:
        return b""
