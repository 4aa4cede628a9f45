"""Changes of the database, verified and applied to the directory of a member that does not serve.

Owns: the sum over the key files here; what is verified of each part that a replicator hands over, and the order in
which it is written. Invariants:
- Nothing is written of a part that does not verify: the keyring by its tag and epoch, tombstones by their tags and, at
  the last part, by the chain in the keyring, key files as they unwrap, the whole by the sum in the state.
- Tombstones are durable first, then the files of their keys go; the keyring, which counts them, comes last. A kill at
  any step leaves a directory that opens and follows again from its mark; what is here already is not written again.
- The file of a destroyed key is never written. No file becomes older than it is.
- The sum is that of one view: what the disk has refused is written before the files are listed.
- Where the sum over the files is wrong although the part is not, a file here is damaged: the database gives all files
  once. If the sum is wrong again, the histories differ, until another scan.

It runs in the event loop's thread; the disk is used in an executor, and requests get a turn after a few keys. It must
never make a key file, or remove one, that the database and the tombstones do not call for.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Final, NamedTuple

from msgspec import UNSET

from minikms import api
from minikms.api.base64 import decode_canonical
from minikms.api.errors import (
    ConflictError,
    DecryptionError,
    KeyNotFoundError,
    KeyUnreadableError,
    ReplicaForkedError,
    ReplicaRolledBackError,
    copy_of,
)
from minikms.custody.deks import SCAN_FILES
from minikms.custody.destruction import GROUP_KEYS_MAX
from minikms.custody.journal_format import Change
from minikms.custody.replica_file import Mark
from minikms.custody.tombstone_file import Staged
from minikms.custody.vault import Vault
from minikms.keys import dek
from minikms.keys.dek import FILE_BYTES, UNWRAPS_SLICE, DekRecord, bytes_to_key_id, check_key_id
from minikms.keys.keyring import FILE_BYTES_MAX, Body
from minikms.keys.replica import EntrySum, SignedState, entry, read_state
from minikms.keys.tombstones import APPEND_RECORDS_MAX, HEADER, RECORD_BYTES, keys_of
from minikms.platform.workers import in_worker

WRITTEN_FILES: Final = 1024
"""Files of one group of the journal."""
STONES_SLICE: Final = 256
"""Tombstones that are verified before requests get a turn."""
SIGNED_STATE_BYTES_MAX: Final = 256
_UNREADABLE: Final = b" " * FILE_BYTES
"""The old content of a file that can't be read, in an entry of the journal."""


class _File(NamedTuple):
    """A key file of the database, verified. `present`: what is here; empty: nothing, or `exists` and can't be read."""

    record: DekRecord
    content: bytes
    present: bytes
    exists: bool

    @property
    def change(self) -> Change:
        old = _UNREADABLE if self.exists and len(self.present) != FILE_BYTES else self.present
        return Change.summed(self.record.id, old, self.content)


class Following:
    """The following of one member. `entries`: the sum over the key files here; None: not known. `repairs`: all files of
    the database are needed.
    """

    def __init__(self, vault: Vault, disk: Executor) -> None:
        self._vault = vault
        self._disk = disk
        self.entries: EntrySum | None = None
        self.agrees = False
        """The sum is that of the database after the last complete part."""
        self.repairs = False
        self._repaired = False
        """All files were compared, and the sum was wrong."""
        self._left: set[str] = set()
        """Destroyed keys whose files and backups may be here."""

    # --- the sum -----------------------------------------------------------------------------------------------------

    async def scan(self) -> None:
        """Computes the sum over the files of all keys that were not destroyed, without those that can't be read.
        Nothing may change a file meanwhile. Raises StorageUnavailableError.
        """
        vault, entries = self._vault, EntrySum()
        await in_worker(self._disk, vault.journal.flush)  # a file that the disk has refused is in the journal only
        listing = vault.store.list_ids()
        while chunk := await in_worker(self._disk, lambda: list(itertools.islice(listing, SCAN_FILES))):
            self._left.update(key_id for key_id in chunk if key_id in vault.destroyed)
            present = await self.present([key_id for key_id in chunk if key_id not in self._left])
            contents = {key_id: content for key_id, content in present.items() if content}
            entries = entries.changed(added=len(contents), new=self._terms(contents))
        self.entries, self.agrees, self.repairs, self._repaired = entries, False, False, False

    def _terms(self, contents: Mapping[str, bytes]) -> int:
        return sum(entry(self._vault.unlocked, key_id, content) for key_id, content in contents.items())

    async def present(self, key_ids: Sequence[str]) -> dict[str, bytes]:
        """The contents of the files that there are; empty: it can't be read. Raises StorageUnavailableError."""
        present: dict[str, bytes] = {}
        for start in range(0, len(key_ids), SCAN_FILES):
            part = key_ids[start : start + SCAN_FILES]
            for key_id, data in await in_worker(self._disk, partial(self._vault.store.read_many, part)):
                if isinstance(data, bytes):
                    present[key_id] = data
                elif isinstance(data, KeyUnreadableError):
                    present[key_id] = b""
                elif not isinstance(data, KeyNotFoundError):
                    raise copy_of(data)
        return present

    # --- a part of what the database has -----------------------------------------------------------------------------

    async def follow(self, request: api.ReplicaFollowRequest, head: api.ReplicaHead, mark: Mark) -> SignedState | None:
        """Applies a part; returns the state after the last one. Raises as `MemberDirectory.follow`."""
        try:
            return await self._follow(request, head, mark)
        finally:
            self._vault.unlocked.settle()

    async def _follow(self, request: api.ReplicaFollowRequest, head: api.ReplicaHead, mark: Mark) -> SignedState | None:
        before, body = self.entries, self._vault.unlocked.body
        if head.keyring_id != body.keyring_id:
            raise ReplicaForkedError(f"the database has the keyring {head.keyring_id}, and this host {body.keyring_id}")
        if head.number < mark.number or head.term < mark.term:
            raise ReplicaRolledBackError(
                f"the database has change {head.number} of term {head.term}, and this host has seen change "
                f"{mark.number} of term {mark.term}"
            )
        if before is None or (head.keyring is UNSET and head.number != mark.number):
            raise ConflictError("the keyring of the database is needed too")
        data = b"" if head.keyring is UNSET else decode_canonical(head.keyring, FILE_BYTES_MAX, "the keyring")
        if data:
            body = self._vault.unlocked.advance(data)
        state = self._state(head, body, mark)
        stones = await self._stones(request, body)
        files = await self._files(request, body, {key for staged in stones for key in _ids_of(staged)})
        destroyed = await self.present([key for staged in stones for key in _ids_of(staged)])
        destroyed = {key: content for key, content in destroyed.items() if content and key not in self._vault.destroyed}
        olds = {file.record.id: file.present for file in files if file.present}
        entries = before.changed(
            added=len(files) - len(olds) - len(destroyed),
            new=self._terms({file.record.id: file.content for file in files}),
            old=self._terms(olds) + self._terms(destroyed),
        )
        if request.complete:
            self._check_tombstones(stones, body)
            if entries != state.entries:
                self._differs(request, mark)
                return None
        self.entries, self.agrees = None, False  # until all of it is written
        await self._write_stones(stones)
        await self._write_files(files)
        if request.complete and body.epoch > self._vault.unlocked.body.epoch:
            await self._vault.keyring.follow(data, body)
        self.entries = entries
        if not request.complete:
            return None
        self.agrees, self.repairs, self._repaired = True, False, False
        return state

    def _state(self, head: api.ReplicaHead, body: Body, mark: Mark) -> SignedState:
        """The state of the head. Raises ReplicaForkedError unless it belongs to the head's keyring, and follows the
        mark.
        """
        try:
            signed = decode_canonical(head.state, SIGNED_STATE_BYTES_MAX, "the state")
            state = read_state(self._vault.unlocked, signed, body.key_version)
        except DecryptionError:
            raise ReplicaForkedError("the state of the database is not that of a member") from None
        if state.number == mark.number and state.term != mark.term:
            raise ReplicaForkedError(
                f"change {state.number} of the database is of term {state.term}, and that of this host of {mark.term}"
            )
        if (state.number, state.epoch) != (head.number, body.epoch) or not mark.term <= state.term <= head.term:
            raise ReplicaForkedError("the state of the database does not belong to its head and its keyring")
        return state

    async def _stones(self, request: api.ReplicaFollowRequest, body: Body) -> list[Staged]:
        """The records that are not here, as they are appended. Raises ReplicaForkedError, ConflictError."""
        destroyed, log = self._vault.destroyed, body.tombstone_log
        records = decode_canonical(request.tombstones, api.REPLICA_BYTES_MAX, "the tombstones")
        if destroyed.count > log.count:
            raise ReplicaRolledBackError(
                f"the keyring of the database counts {log.count} destroyed keys, and this host {destroyed.count}"
            )
        if request.tombstones_after > destroyed.count or len(records) % RECORD_BYTES:
            raise ConflictError(f"tombstones after {destroyed.count} are needed first")
        records = records[(destroyed.count - request.tombstones_after) * RECORD_BYTES :]
        batches: list[Staged] = []
        chain, key = destroyed.chain, self._vault.unlocked.tombstone_key
        for start in range(0, len(records), APPEND_RECORDS_MAX * RECORD_BYTES):
            part = records[start : start + APPEND_RECORDS_MAX * RECORD_BYTES]
            for at in range(0, len(part), RECORD_BYTES):
                record = part[at : at + RECORD_BYTES]
                if not chain.is_next(key, record):
                    raise ReplicaForkedError(f"tombstone {chain.count + 1} of the database is not that of a member")
                chain.take(record)
                if chain.count % STONES_SLICE == 0:
                    await asyncio.sleep(0)
            batches.append(Staged(part, chain.copy()))
        if chain.count > log.count:
            raise ReplicaForkedError("the database has more tombstones than its keyring counts")
        return batches

    def _check_tombstones(self, stones: Sequence[Staged], body: Body) -> None:
        """Checks that the tombstones end where the keyring says. Raises ReplicaForkedError."""
        log, chain = body.tombstone_log, stones[-1].chain if stones else self._vault.destroyed.chain
        if (chain.count, chain.head) != (log.count, log.head):
            raise ReplicaForkedError("the tombstones of the database are not those that its keyring counts")

    async def _files(self, request: api.ReplicaFollowRequest, body: Body, destroyed: Container[str]) -> list[_File]:
        """The files that are not here as they are. Raises ReplicaForkedError for one that does not unwrap, and
        ReplicaRolledBackError for one that is older than that of this host.
        """
        contents = {
            check_key_id(file.key_id): decode_canonical(file.content, FILE_BYTES, "a file")
            for file in request.files
            if file.key_id not in destroyed and file.key_id not in self._vault.destroyed
        }
        try:
            records = await self.verified(contents)
        except KeyUnreadableError as error:
            raise ReplicaForkedError(f"of the database, {error}") from None
        present = await self.present(list(contents))
        files: list[_File] = []
        for key_id, content in contents.items():
            record, old = records[key_id], present.get(key_id, b"")
            if not body.has_kek(record.kek_version):
                raise ReplicaForkedError(f"key {key_id} of the database is under a KEK that was destroyed")
            if old != content:
                with contextlib.suppress(KeyUnreadableError):
                    if dek.parse(old, key_id).version > record.version:
                        raise ReplicaRolledBackError(f"the database has an older file of key {key_id} than this host")
                files.append(_File(record, content, old, key_id in present))
            else:
                self._vault.adopt(record)  # a start before its KEK was here did not
        return files

    async def verified(self, contents: Mapping[str, bytes]) -> dict[str, DekRecord]:
        """The records of key files, each of which unwraps. Raises KeyUnreadableError."""
        vault, records = self._vault, dict[str, DekRecord]()
        items = iter(contents.items())
        while part := list(itertools.islice(items, UNWRAPS_SLICE)):
            with vault.arena.allocate() as key, dek.Unwrapper(vault.unlocked.kek_cipher, key.view) as unwrapper:
                for key_id, content in part:
                    unwrapper.unwrap(records.setdefault(key_id, dek.parse(content, key_id)))
            await asyncio.sleep(0)
        return records

    def _differs(self, request: api.ReplicaFollowRequest, mark: Mark) -> None:
        """The sum would be wrong: asks for all files, or, after them, raises ReplicaForkedError."""
        self.agrees = False
        if self._repaired or mark.number == 0 or (self.repairs and request.after == 0):
            self.repairs, self._repaired = False, True
            raise ReplicaForkedError("the key files of the database and of this host are not those of its state")
        self.repairs = True

    # --- writing -----------------------------------------------------------------------------------------------------

    async def _write_stones(self, stones: Sequence[Staged]) -> None:
        vault = self._vault
        for staged in stones:
            await in_worker(self._disk, partial(vault.destroyed.append, staged))
            vault.destroyed.adopt(staged)
            for key_id in _ids_of(staged):
                vault.forget(key_id)
                self._left.add(key_id)
        while self._left:
            part = list(itertools.islice(self._left, GROUP_KEYS_MAX))
            async with vault.locks.hold(part) as held:
                await vault.remove_files([held], part)
            self._left.difference_update(part)

    async def _write_files(self, files: Sequence[_File]) -> None:
        vault = self._vault
        for start in range(0, len(files), WRITTEN_FILES):
            part = files[start : start + WRITTEN_FILES]
            async with vault.locks.hold([file.record.id for file in part]) as held:
                await vault.journal.replace(held, [file.change for file in part])
                for number, file in enumerate(part, 1):
                    vault.adopt(file.record)
                    if number % UNWRAPS_SLICE == 0:
                        await asyncio.sleep(0)


def _ids_of(staged: Staged) -> list[str]:
    return [bytes_to_key_id(raw) for raw in keys_of(HEADER + staged.records)]
