"""Changes that wait for the database, merged into commits: one is out at a time.

Owns: the queue of changes of a member that serves, their bounds, the numbers of commits, and the sum over all key files
after each. Invariants: changes are committed in the order in which they came. A commit stays the same bytes until it is
confirmed. The sum changes only when a commit is confirmed. After `stop` nobody waits, and no change is taken.

It runs in the event loop's thread. It must never touch the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, NamedTuple

from minikms import api
from minikms.api.base64 import encode_text
from minikms.api.errors import ConflictError, StandbyError, StorageUnavailableError
from minikms.custody.replication import Written
from minikms.keys import keyring
from minikms.keys.replica import EntrySum, SignedState
from minikms.keys.tombstones import RECORD_BYTES

WAITING_MAX: Final = 16_384


class ChangeOutcomeUnknownError(StandbyError):
    """The commit of the change is out. A client gets what it gets for every request that may have taken effect."""

    code = api.CODE_INTERRUPTED

    def __init__(
        self, message: str = "this host stopped to serve during a request, which may have taken effect"
    ) -> None:
        super().__init__(message)


class Position(NamedTuple):
    """The state of the database after a commit: the number of changes and of tombstones, the epoch and the key version
    of the keyring, and the sum over the key files.
    """

    number: int = 0
    tombstones: int = 0
    epoch: int = 0
    key_version: int = 0
    entries: EntrySum = EntrySum()


class _WaitingChange(NamedTuple):
    written: Written
    delta: EntrySum
    files: list[api.ReplicaFile]
    number: asyncio.Future[int]
    """The number of the commit that has the change."""


class _Out(NamedTuple):
    commit: api.ReplicaCommit
    changes: list[_WaitingChange]
    position: Position


class CommitQueue:
    """`sign` authenticates a state under the keyring key of a version."""

    def __init__(self, sign: Callable[[SignedState, int], bytes]) -> None:
        self._sign = sign
        self._waiting: deque[_WaitingChange] = deque()
        self._out: _Out | None = None
        self._changed = asyncio.Event()
        self._unwritten: dict[int, int] = {}
        """The number of changes of each confirmed commit that are not written here."""
        self._changing: set[str] = set()
        """The keys of the changes that have not ended."""
        self.writing = 0
        """Confirmed changes that are being written here."""
        self.failed = False
        """A confirmed change could not be written here."""
        self.term: int | None = None
        """None: no change is taken."""
        self.position = Position()
        self._number_min = 0

    def begin(self, term: int, position: Position, *, number_min: int) -> None:
        """Takes changes from here on. `number_min`: no commit has a number up to it."""
        self.term, self.position, self._number_min = term, position, number_min
        self._unwritten.clear()

    def stop(self) -> None:
        """Idempotent. The outcome of a commit that is out is not known to those who wait for it."""
        self.term = None
        uncertain, waiting = () if self._out is None else self._out.changes, list(self._waiting)
        self._out = None
        self._waiting.clear()
        self._changed.set()
        for changes, error in ((uncertain, ChangeOutcomeUnknownError), (waiting, StandbyError)):
            for change in changes:
                if not change.number.done():
                    change.number.set_exception(error())

    @property
    def whole(self) -> int:
        """The number of the last commit that is written here, with all before it."""
        return min(self._unwritten, default=self.position.number + 1) - 1

    @asynccontextmanager
    async def committed(self, written: Written, delta: Callable[[], Awaitable[EntrySum]]) -> AsyncIterator[None]:
        """Commits a change, as `Replication.committed` says. `delta`: what the change adds to the sum; nothing else may
        change its keys from here on. Raises ConflictError for what no commit can hold, and for a key of a change that
        has not ended.
        """
        size = _size(written)
        if len(written.files) > api.REPLICA_FILES_MAX or size > api.REPLICA_BYTES_MAX:
            raise ConflictError(f"a change of {size:,} bytes is more than a commit of the database takes")
        if len(self._waiting) >= WAITING_MAX:
            raise StorageUnavailableError("too many changes are waiting for the database; try again later")
        keys = {change.key_id for change in written.files}.union(written.destroyed)
        if not self._changing.isdisjoint(keys):  # a cancelled destruction goes on without its locks
            raise ConflictError("a key of the change is being changed or destroyed")
        self._changing |= keys
        number: asyncio.Future[int] | None = None
        try:
            number = self._submit(written, await delta())
            confirmed = await number
            yield
            self._unwritten[confirmed] -= 1
            if not self._unwritten[confirmed]:
                del self._unwritten[confirmed]
            self.writing -= 1
            number = None
        finally:
            self._changing -= keys
            if number is not None and number.done() and not number.cancelled() and number.exception() is None:
                self.writing -= 1
                self.failed = True
            del number  # the traceback of its error leads to this frame

    def _submit(self, written: Written, delta: EntrySum) -> asyncio.Future[int]:
        """The number of the commit that has the change, once it is confirmed."""
        if self.term is None:
            raise StandbyError
        files = [api.ReplicaFile(change.key_id, encode_text(change.new)) for change in written.files]
        number: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(_WaitingChange(written, delta, files, number))
        self._changed.set()
        return number

    async def next(self, seconds: float) -> api.ReplicaCommit | None:
        """The commit that is out again, otherwise the next one; None after `seconds` without a change."""
        if self._out is None and not self._waiting and self.term is not None:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._changed.wait()
        if self._out is None and self._waiting:
            self._form()
        return None if self._out is None else self._out.commit

    def _form(self) -> None:
        """Forms the next commit. Changes that can't be signed are refused: the database does not get them."""
        changes: list[_WaitingChange] = []
        files, size, has_keyring = 0, 0, False
        while self._waiting:
            written = self._waiting[0].written
            files, size = files + len(written.files), size + _size(written)
            if changes and (files > api.REPLICA_FILES_MAX or size > api.REPLICA_BYTES_MAX):
                break
            if has_keyring and written.keyring:
                break
            has_keyring = has_keyring or bool(written.keyring)
            one = self._waiting.popleft()
            if not one.number.done():  # else its caller was cancelled
                changes.append(one)
        if not changes or self.term is None:
            return
        try:
            self._out = self._signed(changes, self.term)
        except Exception:
            for change in changes:
                change.number.set_exception(StorageUnavailableError("the change could not be signed, and was not made"))
            raise

    def _signed(self, changes: list[_WaitingChange], term: int) -> _Out:
        previous, after, epoch, key_version, entries = self.position
        content = tombstones = b""
        for each in changes:
            entries = entries.changed(added=each.delta.files, new=each.delta.value)
            content = each.written.keyring or content
            tombstones += each.written.tombstones
        if content:
            body, *_ = keyring.parse_file(content)
            epoch, key_version = body.epoch, body.key_version
        number = max(previous, self._number_min) + 1
        commit = api.ReplicaCommit(
            previous=previous,
            number=number,
            state=self._sign(SignedState(term, number, epoch, entries), key_version),
            keyring=content,
            tombstones_after=after,
            tombstones=tombstones,
            files=[file for each in changes for file in each.files],
            destroyed=[key_id for each in changes for key_id in each.written.destroyed],
        )
        after += len(tombstones) // RECORD_BYTES
        return _Out(commit, changes, Position(number, after, epoch, key_version, entries))

    def confirm(self, number: int) -> None:
        """The database has as many changes, by a commit of this term. Raises ConflictError for an impossible number."""
        out = self._out
        if out is not None and number == out.commit.number:
            self._out, self.position = None, out.position
            self._unwritten[number] = len(out.changes)
            for each in out.changes:
                if each.number.done():  # its caller was cancelled
                    self.failed = True
                else:
                    each.number.set_result(number)
                    self.writing += 1
        elif number != self.position.number or self.term is None:
            raise ConflictError(f"the database has {number} changes, where this host has made {self.position.number}")


def _size(written: Written) -> int:
    files = sum(len(change.new) + len(change.key_id) for change in written.files)
    return files + len(written.keyring) + len(written.tombstones)
