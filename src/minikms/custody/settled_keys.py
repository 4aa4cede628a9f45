"""DEK files as another process reads them: a backup, `minikms doctor` and `minikms audit`, beside the daemon or after a
crash.

Owns: which keys a data directory has, and the content of each, from the key's file, the create log and the journal of a
rotation: what the next start would make of them. Invariants:
- A file that the daemon overwrites or makes meanwhile is read again until it is whole (`read_settled`).
- Create log and journal are parsed once for each change of them, not once for each key.

It takes no lock and changes nothing. It must never unwrap a key.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final, NamedTuple, Self

from minikms.api.errors import StorageUnavailableError
from minikms.custody import create_log, rewrap_journal
from minikms.custody.deks import DIRECTORY, file_name, list_key_ids, read_settled
from minikms.custody.files import open_directory, read_file_bounded
from minikms.keys import dek

CLOCK_TICK_NS: Final = 1_000_000_000
"""A file that was changed more recently may change again without another time of change."""
LISTINGS_COUNT: Final = 2
"""One listing may omit a file that is replaced meanwhile."""


class _Version(NamedTuple):
    """Tells one content of a file from another."""

    inode: int
    size: int
    changed_ns: int


class SettledKeys:
    """The keys of a data directory. A context manager; used in one thread. Raises StorageUnavailableError."""

    def __init__(self, data_dir: str) -> None:
        self._files = os.path.join(data_dir, DIRECTORY)
        with contextlib.ExitStack() as undo:
            self._directory_fd = open_directory(data_dir)
            undo.callback(os.close, self._directory_fd)
            self._files_fd: int | None = None
            with contextlib.suppress(FileNotFoundError):
                self._files_fd = open_directory(self._files)
            undo.pop_all()
        self.recovered = 0
        """Keys that `read` answered from the create log or the journal."""
        self._journal: tuple[_Version | None, dict[str, rewrap_journal.Record]] = (None, {})
        self._log: tuple[_Version | None, dict[str, bytes]] = (None, {})

    def close(self) -> None:
        """Closes the directories."""
        os.close(self._directory_fd)
        if self._files_fd is not None:
            os.close(self._files_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def key_ids(self) -> list[str]:
        """The keys that have a file or a record in the create log, in order.

        Raises StorageUnavailableError, StartError.
        """
        logged = self._logged()  # first: a log is removed only after the files of its keys were made
        listings = LISTINGS_COUNT if self._files_fd is not None else 0
        return sorted({key_id for _ in range(listings) for key_id in list_key_ids(self._files)}.union(logged))

    def read(self, key_id: str) -> bytes | None:
        """The content of a key's file; None if there is none.

        After a crash the file may be missing, empty, or hold a mixture until the next start: then the content of the
        create log or of the journal is returned. Raises StorageUnavailableError, KeyNotFoundError, StartError.
        """
        found = self._read_file(key_id)
        is_valid = found is not None and dek.is_valid(found, key_id)
        record = self._journalled().get(key_id)
        if found is not None and record is not None and found not in (record.old, record.new):
            if record.is_mixture(found) or not is_valid:
                self.recovered += 1
                return record.new
        elif not is_valid and (logged := self._logged().get(key_id)) is not None:
            self.recovered += 1
            return logged
        elif not is_valid:
            return self._read_file(key_id)  # it may have been made since, and the log removed
        return found

    def _read_file(self, key_id: str) -> bytes | None:
        name = file_name(key_id)
        if self._files_fd is None:
            return None
        return read_settled(name, dir_fd=self._files_fd, is_valid=lambda data: dek.is_valid(data, key_id))

    def _logged(self) -> dict[str, bytes]:
        version = self._version(create_log.NAME)
        before, logged = self._log
        if version is None or version != before:
            content = read_file_bounded(create_log.NAME, create_log.LOG_BYTES, dir_fd=self._directory_fd)
            logged = {} if content is None else dict(create_log.decode(content).intact)
            # Records are written in place: one may follow within the same tick of the clock.
            is_settled = version is not None and time.time_ns() - version.changed_ns > CLOCK_TICK_NS
            self._log = (version if is_settled else None, logged)
        return logged

    def _journalled(self) -> dict[str, rewrap_journal.Record]:
        version = self._version(rewrap_journal.NAME)
        before, records = self._journal
        if version != before:
            content = read_file_bounded(
                rewrap_journal.NAME, rewrap_journal.JOURNAL_BYTES_MAX, dir_fd=self._directory_fd
            )
            found = [] if content is None else rewrap_journal.decode(content)[0]
            records = {record.key_id: record for record in found}
            self._journal = (version, records)
        return records

    def _version(self, name: str) -> _Version | None:
        """None if there is no such file."""
        try:
            status = os.stat(name, dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageUnavailableError("a file can't be looked up") from error
        return _Version(status.st_ino, status.st_size, status.st_mtime_ns)
