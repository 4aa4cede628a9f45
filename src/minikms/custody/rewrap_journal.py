"""The journal of a KEK rotation: DEK files are overwritten in place, one batch at a time.

Owns: `kms-rewraps` (docs/spec/rewraps.md): its format, the steps of a batch and their order, and the replay at a start.
A batch has five steps, each durable before the next:
1. the batch backup of the old contents;
2. the journal: old and new content of each file, with a checksum for each record;
3. the files are overwritten in place, with one sync for all;
4. a file that has several links, or was written before files were padded, is replaced by rename;
5. the journal is removed.

Invariants:
- The locks of the keys are held from the first step to the last. One journal is live at a time.
- Every step that needs space on the disk, except for files of step 4, comes before the first overwrite.
- After a failure in steps 3 to 5 the contents are written to new files and renamed; no file is synced a second time
  (`minikms.custody.files`). While that fails too, the journal stays live.
- A replay never creates a file, never writes a file of a destroyed key, and never replaces a valid content that the
  journal does not have. It writes every other file of the journal again, even if the content is equal: the sync of that
  content may have failed.
- The journal is removed only after the directory of the files was synced, even if no file was written: a file that is
  newer may have been renamed by a process that was killed before it synced the directory.
- A record that fails its checksum is left out; the other records are replayed.

Everything here blocks on the disk. It must never hold an unwrapped key.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from minikms.api.errors import KeyNotFoundError, KeyUnreadableError, StartError, StorageUnavailableError
from minikms.custody.batch_backups import LINES_COUNT_MAX, Line
from minikms.custody.deks import DekStore, HeldKeys, file_name
from minikms.custody.files import (
    FileWrite,
    overwrite_files,
    read_file_bounded,
    remove_file,
    replace_file_from,
    write_files,
)
from minikms.custody.rotation_backups import RotationBackups
from minikms.keys import dek
from minikms.keys.dek import FILE_BYTES, KEY_ID_BYTES, bytes_to_key_id, key_id_to_bytes

NAME: Final = "kms-rewraps"
MAGIC: Final = b"minikms-rewraps\x01"
"""The last byte is the version of the format."""
CHECKSUM_BYTES: Final = 32
_FIELDS: Final = struct.Struct(f"{KEY_ID_BYTES}s{FILE_BYTES}s{FILE_BYTES}s{CHECKSUM_BYTES}s")
RECORD_BYTES: Final = _FIELDS.size
PART_RECORDS: Final = 32
"""Records that are written at a time. The allocator maps new pages for parts of more than 128 KiB."""
JOURNAL_BYTES_MAX: Final = len(MAGIC) + LINES_COUNT_MAX * RECORD_BYTES


class Rewrap(NamedTuple):
    """The change of one DEK file from `old` to `new`. `raw_id` has the bytes of the key id. `kept` is the old record
    with padding, for the batch backup. `checksum` is that of the journal's record; empty if the file is replaced by
    rename.
    """

    key_id: str
    raw_id: bytes
    old: bytes
    kept: bytes
    new: bytes
    checksum: bytes

    @classmethod
    def make(cls, key_id: str, *, old: bytes, kept: bytes, new: bytes) -> Rewrap:
        """A rewrap with its checksum, which is computed here and not in a worker: a worker that computed the checksums
        of a batch would keep the interpreter from requests.
        """
        raw_id = key_id_to_bytes(key_id)
        checksum = _checksum(raw_id, old, new) if len(old) == FILE_BYTES else b""
        return cls(key_id, raw_id, old, kept, new, checksum)


class Record(NamedTuple):
    """A record of the journal."""

    key_id: str
    old: bytes
    new: bytes

    def is_mixture(self, content: bytes) -> bool:
        """Whether each byte is that of the old or of the new content. Both contents themselves are, too."""
        bytes_at = zip(content, self.old, self.new, strict=False)
        return len(content) == FILE_BYTES and all(byte in (old, new) for byte, old, new in bytes_at)


class Replayed(NamedTuple):
    """What a replay did: `written` files; `set_aside`: keys whose damaged file was kept as a rotation backup; `damaged`
    records of the journal, which were left out; `obstructed`: keys whose file can't be written, since there is a
    directory of its name. Their content was kept as a rotation backup.
    """

    written: int = 0
    set_aside: tuple[str, ...] = ()
    damaged: int = 0
    obstructed: tuple[str, ...] = ()


# --- the format -----------------------------------------------------------------------------------------------------


def encode(records: Iterable[Record]) -> bytes:
    """The content of a journal."""
    rewraps = [Rewrap.make(each.key_id, old=each.old, kept=each.old, new=each.new) for each in records]
    return b"".join(_encoded(rewraps)) or MAGIC


def _encoded(rewraps: Sequence[Rewrap]) -> Iterator[bytes]:
    """The content of a journal, in parts that are small enough for memory that was used before."""
    for start in range(0, len(rewraps), PART_RECORDS):
        part = [MAGIC] if start == 0 else []
        for rewrap in rewraps[start : start + PART_RECORDS]:
            part += rewrap.raw_id, rewrap.old, rewrap.new, rewrap.checksum
        yield b"".join(part)


def _checksum(raw_id: bytes, old: bytes, new: bytes) -> bytes:
    digest = hashlib.sha256(MAGIC + raw_id)
    digest.update(old)  # in parts: for 2,048 bytes or more Python gives up the interpreter's lock
    digest.update(new)
    return digest.digest()


def decode(content: bytes) -> tuple[list[Record], int]:
    """The intact records of a journal, and the number of damaged ones, a torn last one included.

    Raises StartError if another version of the program wrote it.
    """
    records: list[Record] = []
    body = content[len(MAGIC) :]
    torn_bytes = len(body) % RECORD_BYTES
    damaged = 1 if torn_bytes else 0
    for raw_id, old, new, checksum in _FIELDS.iter_unpack(body[: len(body) - torn_bytes]):
        if checksum == _checksum(raw_id, old, new):
            records.append(Record(bytes_to_key_id(raw_id), old, new))
        else:
            damaged += 1
    if not records and dek.is_other_version(content, MAGIC):
        raise StartError(
            f"{NAME} was written by another version of miniKMS, during a KEK rotation that did not end; start the "
            "version that wrote it once, then this one"
        )
    return records, damaged


# --- a batch --------------------------------------------------------------------------------------------------------


class RewrapJournal:
    """The journal of a data directory. Used in the disk thread, except for `live`."""

    def __init__(self, directory_fd: int, store: DekStore, backups: RotationBackups) -> None:
        self._directory_fd = directory_fd
        self._store = store
        self._backups = backups
        self._batch: Sequence[Rewrap] = ()
        self._overwriting = False
        self.live = False
        """Whether there may be a journal on disk."""

    def write(self, held: HeldKeys, batch: Sequence[Rewrap], stamp: str) -> None:
        """Replaces the files of a batch, durably on return. At most LINES_COUNT_MAX of them. The locks of their keys
        must stay held while `live` is true.

        Raises StorageUnavailableError. Then no file has changed, unless `live` is true: call `settle` until it returns.
        """
        held.require(*(rewrap.key_id for rewrap in batch))
        if self.live:
            raise StorageUnavailableError("the batch before is not settled, since the disk fails")
        self._backups.batches.write(stamp, [Line(rewrap.key_id, rewrap.kept) for rewrap in batch])
        in_place = [rewrap for rewrap in batch if rewrap.checksum]
        others = [FileWrite(file_name(rewrap.key_id), rewrap.new) for rewrap in batch if not rewrap.checksum]
        self._batch, self._overwriting, self.live = batch, False, True
        if in_place:
            replace_file_from(self._directory_fd, NAME, _encoded(in_place))
        self._overwriting = True
        writes = [FileWrite(file_name(rewrap.key_id), rewrap.new) for rewrap in in_place]
        write_files(self._store.directory_fd, [*overwrite_files(self._store.directory_fd, writes), *others])
        self._remove()

    def settle(self) -> bool:
        """Completes or withdraws a batch whose `write` failed, durably on return. Whether the files have changed.

        Raises StorageUnavailableError; then call it again.
        """
        written = self._overwriting
        if written:
            present = [rewrap for rewrap in self._batch if self._store.has(rewrap.key_id)]
            write_files(
                self._store.directory_fd, [FileWrite(file_name(rewrap.key_id), rewrap.new) for rewrap in present]
            )
        self._remove()
        return written

    def _remove(self) -> None:
        remove_file(self._directory_fd, NAME)
        self._batch, self._overwriting, self.live = (), False, False


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
    """Completes the batch that a crash interrupted, and removes the journal. Call it before any DEK file is read.

    `has_kek`: whether the keyring can use a KEK version. If it can't use that of a new content, because it was restored
    from a backup, the old content is written instead. `stamp` is for files that are set aside.

    Raises StorageUnavailableError, StartError.
    """
    content = read_file_bounded(NAME, JOURNAL_BYTES_MAX, dir_fd=directory_fd)
    if content is None:
        return Replayed()
    records, damaged = decode(content)
    writes: list[FileWrite] = []
    set_aside: list[str] = []
    obstructed: list[str] = []
    for record in records:
        if record.key_id in destroyed:
            continue
        state = _state(store, record)
        if state == "left":
            continue
        content = record.new if dek.is_usable(record.new, record.key_id, has_kek) else record.old
        if state == "damaged" and store.is_directory(record.key_id):
            backups.add(record.key_id, content, stamp)
            obstructed.append(record.key_id)
            continue
        if state == "damaged" and _set_aside(store, backups, record.key_id, stamp):
            set_aside.append(record.key_id)
        writes.append(FileWrite(file_name(record.key_id), content))
    if set_aside:
        backups.sync()
    write_files(store.directory_fd, writes)  # even without a write: it syncs the directory
    remove_file(directory_fd, NAME)
    return Replayed(len(writes), tuple(set_aside), damaged, tuple(obstructed))


def _state(store: DekStore, record: Record) -> str:
    """`left`: absent, or another valid content. `journalled`: old, new, or a mixture. `damaged`: anything else."""
    try:
        found = store.read(record.key_id)
    except KeyNotFoundError:
        return "left"
    except KeyUnreadableError:
        return "damaged"
    if record.is_mixture(found):
        return "journalled"
    return "left" if dek.is_valid(found, record.key_id) else "damaged"


def _set_aside(store: DekStore, backups: RotationBackups, key_id: str, stamp: str) -> bool:
    """Keeps a damaged file as a rotation backup, so that it is removed when the key is destroyed. False where the file
    system has no second links: then only the damaged bytes are lost.
    """
    try:
        backups.keep(store, [key_id], stamp)
    except StorageUnavailableError as error:
        if isinstance(error.__cause__, PermissionError):
            return False
        raise
    return True
