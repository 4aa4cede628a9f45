"""The state directory of the auditor: the tree, the state that it continues from, and what it shows.

Owns: every file below the directory (docs/spec/tree.md), and the order in which they change. Invariants: the tiles of a
tree are durable before the state that names its size, and the state is durable before `commit` returns; a file is
replaced whole or not at all, but for `rejected`, which grows; tiles beyond the state's size are of a commit that did
not end, and are written again; a tile is removed only once an archive with it is durable. It must never sign, or judge
a line.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import StartError, StorageUnavailableError
from minikms.audit import tiles
from minikms.audit.export import INDEX_NAME, LogRange, tile_reader
from minikms.audit.note import NOTE_BYTES_MAX
from minikms.audit.record import LINE_BYTES_MAX
from minikms.audit.tiles import CHECKPOINT_NAME, TILE_BYTES, TILE_HEIGHT, TILE_WIDTH, RightEdge, Tile, TilesError
from minikms.audit.tree import EMPTY_ROOT
from minikms.platform.directory_lock import DataDirLock, make_private_directory
from minikms.platform.files import (
    FileWrite,
    closed_after,
    open_directory,
    read_file_bounded,
    remove_files,
    replace_file,
    sweep_temps,
    write_files,
)
from minikms.platform.sync import sync_directory
from minikms_auditor.line_file import LineFile

T = TypeVar("T")

TREE_NAME: Final = "tree"
STATE_NAME: Final = "state.json"
ACCEPTED_NAME: Final = "accepted-keys.json"
STATUS_NAME: Final = "status.json"
SINKS_NAME: Final = "sinks"
CURSOR_NAME: Final = "cursor.json"
REJECTED_NAME: Final = "rejected"
SKIPPED_NAME: Final = "skipped-lines.json"
REJECTED_BYTES_MAX: Final = 64 * 1024 * 1024
"""A file of rejected lines that is larger takes no more."""
SKIPPED_COUNT_MAX: Final = 1000
FILE_BYTES_MAX: Final = 4 * 1024 * 1024
ARCHIVES_AT_A_TIME: Final = 16
"""Each takes some 20 ms: the tiles of an earlier version are archived in many steps."""


class TreeLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signed line of the log. sig: its MAC. public_key: under which it was signed."""

    log_id: str
    seq: int
    sig: bytes
    public_key: bytes


class Witnessed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last tree checkpoint that was published: its size, and its last line."""

    size: int
    line: TreeLine


class AuditorState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the auditor continues from. line: that of the last leaf. keys: public keys that `audit_key` lines of the
    tree have named.
    """

    version: int
    origin: str
    size: int
    root: bytes
    logs: tuple[LogRange, ...] = ()
    line: TreeLine | None = None
    keys: tuple[bytes, ...] = ()
    witnessed: Witnessed | None = None


class AuditorStore:
    """The directory, made if it is missing, and locked until `close`. Raises StartError, and TilesError if it lacks a
    tile of its state.
    """

    def __init__(self, state_dir: str, origin: str) -> None:
        self._lock = DataDirLock(state_dir)
        try:
            self._fd = self._lock.directory_fd
            self._tree = os.path.join(self._lock.directory, TREE_NAME)
            make_private_directory(self._tree)
            sweep_temps(self._fd)
            with _opened(self._tree) as fd:
                sweep_temps(fd)
            self._swept: set[str] = set()
            self._archived: dict[int, int] = {}
            """How many archives each level has; fewer at first, since the last one may not have ended."""
            self.read = tile_reader(Path(self._tree))
            self.state = self._load(origin)
            self.edge = RightEdge.load(self.read, self.state.size)
            self._check_root()
            accepted_keys(self._lock.directory)
            self._mend_index()
        except BaseException:
            self._lock.close()
            raise

    def _check_root(self) -> None:
        if self.edge.root() != self.state.root:
            raise StartError(
                f"the tiles in {self._tree} do not have the root that {STATE_NAME} names: restore both from one copy"
            )

    def _mend_index(self) -> None:
        """Rebuilds an index that is damaged, or that names a log of a commit that did not end."""
        index = msgspec.json.encode(self.state.logs)
        if self.state.size and read_file_bounded(os.path.join(self._tree, INDEX_NAME), FILE_BYTES_MAX) != index:
            _replace_in(self._tree, INDEX_NAME, index)

    def commit(self, edge: RightEdge, state: AuditorState) -> None:
        """Make a larger tree durable: first its tiles, then its state. Raises StorageUnavailableError; then the tree is
        still the one before.
        """
        new_tiles = edge.take_tiles()
        groups: dict[str, list[FileWrite]] = {}
        for tile in new_tiles:
            directory, name = os.path.split(tile.path)
            groups.setdefault(directory, []).append(FileWrite(name, tile.content))
        for directory, group in groups.items():
            self._write(directory, group)
        if state.logs != self.state.logs:
            _replace_in(self._tree, INDEX_NAME, msgspec.json.encode(state.logs))
        self.save(state)
        self.edge = edge
        self._remove_partial(new_tiles)

    def _write(self, directory: str, group: Sequence[FileWrite]) -> None:
        path = os.path.join(self._tree, directory)
        try:
            make_private_directory(path)
            fd = open_directory(path)
        except OSError as error:
            raise StorageUnavailableError("a directory of tiles can't be made") from error
        with closed_after(fd):
            if not directory.endswith(".p") and directory not in self._swept:
                sweep_temps(fd)
                self._swept.add(directory)
            write_files(fd, group)

    def _remove_partial(self, tiles: Iterable[Tile]) -> None:
        """Partial tiles of tiles that are full now: readers find the full one. Nobody reads leftovers."""
        for tile in tiles:
            if tile.width == TILE_WIDTH:
                with contextlib.suppress(OSError):
                    shutil.rmtree(os.path.join(self._tree, tile.path + ".p"))

    def archive(self) -> None:
        """Move tiles whose hashes a full tile has from their files into one, some of them at each call. Raises OSError,
        StorageUnavailableError, TilesError.
        """
        left = ARCHIVES_AT_A_TIME
        for level in itertools.count():
            count = self.state.size >> TILE_HEIGHT * (level + 2)
            if not count:
                return
            if level not in self._archived:
                exists = bisect.bisect_left(range(count), 1, key=lambda number: not self._has_archive(level, number))
                self._archived[level] = max(0, exists - 1)
            for number in range(self._archived[level], min(count, self._archived[level] + left)):
                self._archive(level, number)
                self._archived[level], left = number + 1, left - 1

    def _has_archive(self, level: int, number: int) -> bool:
        return os.path.lexists(os.path.join(self._tree, tiles.archive_path(level, number)))

    def _archive(self, level: int, number: int) -> None:
        paths = [tiles.tile_path(level, number * TILE_WIDTH + each) for each in range(TILE_WIDTH)]
        contents = [self.read(path) or b"" for path in paths]
        if any(len(content) != TILE_BYTES for content in contents):
            raise TilesError(f"a tile of {paths[0]} to {paths[-1]} is missing or damaged")
        directory, name = os.path.split(tiles.archive_path(level, number))
        self._write(directory, [FileWrite(name, b"".join(contents))])
        for parent, group in itertools.groupby(paths, os.path.dirname):
            path = os.path.join(self._tree, parent)
            with contextlib.suppress(FileNotFoundError), _opened(path) as fd:  # a crash may have left none
                remove_files(fd, [os.path.basename(each) for each in group])
            with contextlib.suppress(OSError):
                os.removedirs(path)  # as far as they are empty

    def save(self, state: AuditorState) -> None:
        replace_file(self._fd, STATE_NAME, msgspec.json.format(msgspec.json.encode(state)))
        self.state = state

    def publish(self, note: bytes, witnessed: Witnessed) -> None:
        """Publish a tree checkpoint, and then record that. Raises StorageUnavailableError."""
        _replace_in(self._tree, CHECKPOINT_NAME, note)
        if witnessed != self.state.witnessed:
            self.save(msgspec.structs.replace(self.state, witnessed=witnessed))

    def show(self, status: bytes) -> None:
        """Replace the status that `minikms-auditor status` reads. Raises StorageUnavailableError."""
        replace_file(self._fd, STATUS_NAME, status)

    def close(self) -> None:
        self._lock.close()

    def _load(self, origin: str) -> AuditorState:
        content = read_file_bounded(STATE_NAME, FILE_BYTES_MAX, dir_fd=self._fd)
        if content is None:
            if os.listdir(self._tree):
                raise StartError(f"{self._lock.directory} holds a tree but no {STATE_NAME}: restore it, or empty both")
            return AuditorState(1, origin, 0, EMPTY_ROOT)
        try:
            state = msgspec.json.decode(content, type=AuditorState)
        except UNDECODABLE:
            raise StartError(f"{self._lock.directory}/{STATE_NAME} is damaged: restore it") from None
        if state.version != 1 or (state.size > 0) != (state.line is not None):
            raise StartError(f"{self._lock.directory}/{STATE_NAME} is not one of this version")
        if state.origin != origin:
            raise StartError(
                f"{self._lock.directory} holds the tree of {state.origin}, and the configuration names {origin}"
            )
        return state


# --- the sinks --------------------------------------------------------------------------------------------------------


class Cursor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last line that a sink has. sig: its MAC, empty if it has no line of this log. rejected: lines in its file of
    those that it does not have.
    """

    version: int
    log_id: str
    seq: int
    sig: bytes = b""
    rejected: int = 0


class SkippedLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    log_id: str
    seq: int


class SinkFiles:
    """The files of one sink, which only its thread writes: its cursor, and the lines that it does not have."""

    def __init__(self, state_dir: str, name: str) -> None:
        """Only while the `AuditorStore` of the directory is open. Raises StartError, StorageUnavailableError."""
        self._state_dir = state_dir
        self.directory = os.path.join(state_dir, SINKS_NAME, name)
        make_private_directory(self.directory)
        with _opened(self.directory) as fd:
            sweep_temps(fd)
            content = read_file_bounded(CURSOR_NAME, FILE_BYTES_MAX, dir_fd=fd)
        self.cursor: Cursor | None = None
        try:
            self.cursor = None if content is None else msgspec.json.decode(content, type=Cursor)
        except UNDECODABLE:
            raise StartError(f"{self.directory}/{CURSOR_NAME} is damaged: restore it, or remove it") from None
        self._rejected = LineFile(os.path.join(self.directory, REJECTED_NAME), line_bytes_max=LINE_BYTES_MAX)

    def save(self, cursor: Cursor) -> None:
        _replace_in(self.directory, CURSOR_NAME, msgspec.json.encode(cursor))
        self.cursor = cursor

    def reject(self, entry: bytes) -> None:
        """Keep a JSON object about a line that the sink does not get, durably. A crash may repeat it. Raises OSError,
        StorageUnavailableError.
        """
        self._rejected.append([entry])
        sync_directory(self.directory)

    def may_reject(self) -> bool:
        """Whether there is room for another line. Raises OSError."""
        try:
            return os.stat(os.path.join(self.directory, REJECTED_NAME)).st_size < REJECTED_BYTES_MAX
        except FileNotFoundError:
            return True

    def is_skipped(self, log_id: str, seq: int) -> bool:
        """Whether an operator lets sinks go on without this line. Raises StartError."""
        return SkippedLine(log_id, seq) in skipped_lines(self._state_dir)


# --- for commands beside the running auditor --------------------------------------------------------------------------


def published(state_dir: str) -> bytes | None:
    """The newest tree checkpoint that was published, as a note; None if none was."""
    return read_file_bounded(os.path.join(state_dir, TREE_NAME, CHECKPOINT_NAME), NOTE_BYTES_MAX)


def shown(state_dir: str) -> bytes | None:
    """The status as the process wrote it last; None if it never ran."""
    return read_file_bounded(os.path.join(state_dir, STATUS_NAME), FILE_BYTES_MAX)


def accepted_keys(state_dir: str) -> list[bytes]:
    """Public keys that an operator has accepted. Raises StartError."""
    return _listed(state_dir, ACCEPTED_NAME, bytes, "accept the log's key again")


def accept_key(state_dir: str, key: bytes) -> None:
    """Accept a public key that a log may begin with. Raises StartError, StorageUnavailableError."""
    keys = [*(each for each in accepted_keys(state_dir) if each != key), key]
    _replace_in(state_dir, ACCEPTED_NAME, msgspec.json.encode(keys))


def skipped_lines(state_dir: str) -> list[SkippedLine]:
    """Lines that an operator has let sinks go on without. Raises StartError."""
    return _listed(state_dir, SKIPPED_NAME, SkippedLine, "skip the line again")


def skip_line(state_dir: str, log_id: str, seq: int) -> None:
    """Let the sinks that wait at this line go on without it. Raises StartError, StorageUnavailableError."""
    lines = [*skipped_lines(state_dir), SkippedLine(log_id, seq)]
    _replace_in(state_dir, SKIPPED_NAME, msgspec.json.encode(lines[-SKIPPED_COUNT_MAX:]))


def _listed(state_dir: str, name: str, kind: type[T], remedy: str) -> list[T]:
    path = os.path.join(state_dir, name)
    content = read_file_bounded(path, FILE_BYTES_MAX)
    try:
        if content is None:
            return []
        return msgspec.json.decode(content, type=list[kind])  # type: ignore[valid-type]  # a type known only here
    except UNDECODABLE:
        raise StartError(f"{path} is damaged: remove it, and {remedy}") from None


# --- shared -----------------------------------------------------------------------------------------------------------


def _replace_in(directory: str, name: str, content: bytes) -> None:
    with _opened(directory) as fd:
        replace_file(fd, name, content)


def _opened(directory: str) -> AbstractContextManager[int]:
    return closed_after(open_directory(directory))
