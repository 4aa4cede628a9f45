"""What the jobs of a rotation read and write: threads' keys, records in chunks, what a job keeps of a record, rows of
jobs.

Owns: the entries `keyspace.JOBS` and `keyspace.MIGRATED`, whose meaning the jobs own. Invariants:
- A chunk is one consistent view; it ends with the entry that brings it to CHUNK_BYTES_MAX. Nothing is opened.
- A record's new bytes and what is kept of it are one write, which fails if the record was changed since it was read.
- A kept record comes back only in the place of the same version of its record, so that no later change is lost.
- A row is changed only if it is still what was read; a row and the step that belongs to it are one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from copy import copy
from typing import Final

import msgspec

from progressdb_server.conversations.validators import Validators
from progressdb_server.store import keyspace, record
from progressdb_server.store.claims import Claims
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import Commits, Reads, in_order, pages
from progressdb_server.store.model import (
    JOB_ID_PATTERN,
    Chunk,
    ClaimLostError,
    ConditionFailedError,
    KeptRecord,
    OpaqueWrite,
    Record,
    RecordUnreadableError,
    Restored,
    RowWrite,
    StaleRowError,
    StoreUnavailableError,
    shown,
)
from progressdb_server.store.sealer import Sealer

CHUNK_BYTES_MAX: Final = 1024 * 1024
KEPT_CHUNK_MAX: Final = 256
CENSUS_CHUNK_MAX: Final = 256
PAGE_ROWS: Final = 256


class Rekeying:
    """What jobs use. Jobs own what is in their rows; the store owns where it is. Walks are in chunks of at most
    `count_max` entries, each read when it is asked for."""

    def __init__(self, reads: Reads, writer: Commits, sealer: Sealer, claims: Claims, validators: Validators) -> None:
        self.reads = reads
        self._writer = writer
        self._sealer = sealer
        self._claims = claims
        self._validators = validators

    # --- keys of threads ------------------------------------------------------------------------------------------
    async def key_of_thread(self, thread_id: str) -> str | None:
        """Id of the key that the thread is written under, None for an unknown thread."""
        raw = await self.reads.get(keyspace.key_map(thread_id))
        return None if raw is None else raw.decode()

    def making_key(self, thread_id: str) -> bool:
        """Whether a key that the thread does not name may become its own: the thread is being made, its key is being
        renewed, or what a failed write has left is not known yet."""
        return self._sealer.making_key(thread_id) or not self._writer.available

    @property
    def newest_ns(self) -> int:
        """Time of the newest stamp, in Unix nanoseconds; 0 in an empty store."""
        return self._writer.state.last.time_ns

    async def threads(self, behind: str = "") -> AsyncIterator[str]:
        """Every thread, or those behind this one in the order of their ids."""
        lower = keyspace.next_key(keyspace.key_map(behind))
        async for entries in pages(self.reads, lower, keyspace.after(keyspace.MAP)):
            for key, _ in entries:
                yield keyspace.last_part(key)
            await asyncio.sleep(0)

    def key_switch(self, thread_id: str, old: str, new: str) -> OpaqueWrite:
        """The thread is written under `new` from here on. The condition fails unless it is under `old`."""
        key = keyspace.key_map(thread_id)
        return Write(((key, new.encode()),), ((key, old.encode()),))

    # --- records --------------------------------------------------------------------------------------------------
    async def chunks(
        self, thread_id: str, count_max: int, *, behind: str = "", to_now: bool = False
    ) -> AsyncIterator[Chunk]:
        """The thread's records, its metadata first, then in order of their stamps, from the one behind the cursor
        `behind`. `to_now`: without those that are created during the walk."""
        lower, upper = keyspace.records(thread_id)
        if to_now:  # records that are written later come after the newest one
            newest = await self.reads.keys(lower, upper, limit=1, reverse=True)
            upper = keyspace.next_key(newest[0]) if newest else lower
        if behind:
            lower = keyspace.next_key(behind.encode())
        async for entries in pages(self.reads, lower, upper, limit=count_max, bytes_max=CHUNK_BYTES_MAX):
            read_at = self._writer.group
            records: list[Record] = []
            malformed: list[str] = []
            before = head = b""
            key_id = ""
            for key, raw in entries:
                if not before or not raw.startswith(before):
                    try:
                        head, sealed = record.split(raw)
                        key_id = record.key_of(head)
                    except record.RecordFormatError:
                        before = b""
                        malformed.append(shown(key))
                        continue
                    before = raw[: len(raw) - len(sealed)]  # neighbours mostly have the same
                records.append(Record(key, raw, head, key_id, raw[len(before) :]))
            yield Chunk(records, malformed, entries[-1][0].decode(), read_at)

    def count_records(self, thread_id: str, count_max: int, *, since_ns: int | None = None) -> AsyncIterator[int]:
        lower, upper = keyspace.records(thread_id)
        if since_ns is not None:
            first = keyspace.Stamp(self._writer.state.last.era * keyspace.ERA_NS + since_ns, 0)
            lower = keyspace.message_of(keyspace.part(thread_id), first.raw)
        return self._count(lower, upper, count_max)

    async def count_under(self, thread_id: str, key_ids: Collection[str]) -> int:
        """Records of the thread under one of the keys; a malformed one counts, because its key is unknown. Each record
        is looked for twice: where the indexes of order and versions name it, and in a walk over all records. Raises
        RecordUnreadableError unless the two find the same number."""
        lower, upper = keyspace.records(thread_id)
        newest = await self.reads.keys(lower, upper, limit=1, reverse=True)
        last = newest[0] if newest else lower  # what is written from here on is not compared
        left = named = walked = 0
        async for row in self._named_records(thread_id):
            left += sum(not key_id or key_id in key_ids for key_id in row.values())
            named += sum(key <= last for key in row)
            await asyncio.sleep(0)
        if left:
            return left
        async for chunk in self.chunks(thread_id, CENSUS_CHUNK_MAX):
            left += len(chunk.malformed) + sum(one.key_id in key_ids for one in chunk.records)
            walked += sum(one.aad <= last for one in chunk.records)
            await asyncio.sleep(0)
        if not left and named != walked:
            raise RecordUnreadableError(
                f"of {named} records that indexes name, {walked} are found: run progressdb check"
            )
        return left

    async def _named_records(self, thread_id: str) -> AsyncIterator[dict[bytes, str]]:
        """The storage keys of the thread's metadata and of each version that the indexes name, with the ids of the keys
        that the records are under, empty for a malformed one. Raises RecordUnreadableError for one that is not there.
        """
        yield await self._key_ids([keyspace.meta(thread_id)])
        prefix = keyspace.messages(thread_id)
        lower = keyspace.order(thread_id)
        async for entries in pages(self.reads, lower, keyspace.after(lower), limit=CENSUS_CHUNK_MAX):
            stamps: dict[bytes, None] = {}
            for key, value in entries:
                try:
                    place = keyspace.OrderEntry.parse(key, value)
                    message = keyspace.message_id_of(place.first.decode())
                except ValueError:
                    raise RecordUnreadableError(f"the entry {shown(key)} is malformed") from None
                stamps[place.first] = stamps[place.latest] = None
                if place.latest != place.first:
                    async for keys in in_order(self.reads, keyspace.versions(message)):
                        stamps |= dict.fromkeys(key[-keyspace.STAMP_BYTES :] for key in keys)
            named = [prefix + stamp for stamp in stamps]
            for start in range(0, len(named), CENSUS_CHUNK_MAX):
                yield await self._key_ids(named[start : start + CENSUS_CHUNK_MAX])

    async def _key_ids(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        key_ids: dict[bytes, str] = {}
        left = keys
        while left:
            raws = await self.reads.values(left, bytes_max=CHUNK_BYTES_MAX)
            if not raws:
                raise RecordUnreadableError(f"the record {shown(left[0])} is missing")
            key_ids |= {key: _key_of(raw) for key, raw in raws.items()}
            left = [key for key in left if key not in key_ids]
        return key_ids

    def moves(self, job_id: str, key_id: str, moved: Sequence[tuple[Record, bytes]], read_at: int) -> OpaqueWrite:
        """Records with their new sealed parts, which are under `key_id`; the old bytes are kept for the job. The
        condition fails if a record was changed since it was read at `read_at`."""
        puts: list[tuple[bytes, bytes | None]] = []
        prefix = keyspace.replaced_records(job_id)
        renewed: dict[tuple[int, bytes], bytes] = {}  # most records of a thread have one of a few headers
        for row, sealed in moved:
            form = row.raw[0]
            head = renewed.get((form, row.head))
            if head is None:
                head = renewed[form, row.head] = record.rekey(form, row.head, key_id)
            puts.append((row.aad, head + sealed))
        # Two runs of ascending keys: the engine finds the place of each entry beside the one before it.
        puts += [(prefix + row.aad, row.raw) for row, _ in moved]
        return Write(puts, read=[(row.aad, row.raw) for row, _ in moved], read_at=read_at)

    async def _count(self, lower: bytes, upper: bytes, count_max: int) -> AsyncIterator[int]:
        while keys := await self.reads.keys(lower, upper, limit=count_max):
            lower = keyspace.next_key(keys[-1])
            yield len(keys)

    # --- what jobs have kept --------------------------------------------------------------------------------------
    async def kept_records(self, job_id: str) -> AsyncIterator[list[KeptRecord]]:
        async for entries in self._kept(job_id):
            yield [KeptRecord(key, _key_of(raw)) for key, raw in entries]

    def count_kept(self, job_id: str, count_max: int) -> AsyncIterator[int]:
        prefix = keyspace.replaced_records(job_id)
        return self._count(prefix, keyspace.after(prefix), count_max)

    def kept_drop(self, job_id: str, dropped: Collection[KeptRecord]) -> OpaqueWrite:
        prefix = keyspace.replaced_records(job_id)
        return Write([(prefix + backup.aad, None) for backup in dropped])

    async def restore_kept(self, job_id: str) -> Restored:
        """Put the kept records back, each only where the same version of its record is stored, or none, or a damaged
        one. What was put back until an error stays."""
        restored = unchanged = 0
        self._validators.forget()  # the records are under other keys from here on
        async for entries in self._kept(job_id):
            while True:
                wanted: list[tuple[bytes, bytes]] = []
                puts: list[tuple[bytes, bytes | None]] = []
                for key, raw in entries:
                    current = await self.reads.get(key)
                    if current is None or record.same_version(raw, current):
                        wanted.append((key, raw))
                        puts.append((key, current))
                try:
                    await self._writer.commit(Write(wanted, puts))
                except ConditionFailedError:  # changed since it was read
                    continue
                restored += len(wanted)
                unchanged += len(entries) - len(wanted)
                break
        return Restored(restored, unchanged)

    async def _kept(self, job_id: str) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Storage keys of records, with their kept bytes; each chunk is read when it is asked for."""
        prefix = keyspace.replaced_records(job_id)
        bounds = prefix, keyspace.after(prefix)
        async for entries in pages(self.reads, *bounds, limit=KEPT_CHUNK_MAX, bytes_max=CHUNK_BYTES_MAX):
            yield [(key[len(prefix) :], raw) for key, raw in entries]

    # --- rows of jobs ---------------------------------------------------------------------------------------------
    new_job_id = staticmethod(keyspace.new_job_id)

    async def job_row(self, job_id: str) -> bytes | None:
        """None also for a malformed id."""
        return await self.reads.get(keyspace.job(job_id)) if JOB_ID_PATTERN.fullmatch(job_id) else None

    async def job_rows(self, since_ns: int = 0) -> AsyncIterator[list[tuple[str, bytes]]]:
        """Ids and rows. `since_ns`: of jobs whose ids are not older."""
        bounds = keyspace.jobs_since(since_ns), keyspace.after(keyspace.JOBS)
        async for entries in pages(self.reads, *bounds, limit=PAGE_ROWS):
            yield [(_id_of(key), raw) for key, raw in entries]

    async def newest_job_rows(self, before: str = "") -> AsyncIterator[list[tuple[str, bytes]]]:
        """The rows of jobs, the newest first; with `before`, those older than this job."""
        upper = keyspace.job(before) if before else keyspace.after(keyspace.JOBS)
        while entries := await self.reads.scan(keyspace.JOBS, upper, limit=PAGE_ROWS, reverse=True):
            upper = entries[-1][0]
            yield [(_id_of(key), raw) for key, raw in entries]

    async def job_rows_of(self, job_ids: Sequence[str]) -> AsyncIterator[list[tuple[str, bytes]]]:
        """The rows of these jobs; unknown ids are left out."""
        for start in range(0, len(job_ids), PAGE_ROWS):
            keys = [keyspace.job(job_id) for job_id in job_ids[start : start + PAGE_ROWS]]
            yield [(_id_of(key), raw) for key, raw in (await self.reads.values(keys)).items()]

    def write_row(
        self, job_id: str, thread_id: str, old: bytes | None, new: bytes, step: OpaqueWrite | None = None
    ) -> RowWrite:
        """Replace the row `old` (None: there is none) and carry out the step, all or nothing; not at all if this server
        has claimed the thread and lost it since. What is written later may rely on it: it is written later, and not at
        all if this is not."""
        write = Write() if step is None else step
        if not isinstance(write, Write):
            raise TypeError("only the store makes steps")
        key = keyspace.job(job_id)
        puts, expect = ((key, new), *write.puts), ((key, old), *self._claims.condition(thread_id), *write.expect)
        return RowWrite(
            job_id, thread_id, self._writer.commit(msgspec.structs.replace(write, puts=puts, expect=expect))
        )

    async def settle_row(self, write: RowWrite) -> None:
        """Durable when it returns. Raises StaleRowError, ClaimLostError; ConditionFailedError for a condition of the
        step; StoreUnavailableError, after which the write may or may not be there."""
        try:
            await write.done
        except (ConditionFailedError, StoreUnavailableError) as error:
            error.__traceback__ = None  # it leads to this frame, whose `write` has the future that keeps the error
            if not isinstance(error, ConditionFailedError):
                raise copy(error) from error.__cause__
            if error.key == keyspace.claim(write.thread_id):
                raise ClaimLostError from None
            if error.key == keyspace.job(write.job_id):
                raise StaleRowError from None
            raise ConditionFailedError(error.key) from None

    async def remove_rows(self, job_ids: Collection[str]) -> None:
        await self._writer.commit(Write([(keyspace.job(job_id), None) for job_id in job_ids]))


def _id_of(row_key: bytes) -> str:
    return shown(row_key[len(keyspace.JOBS) :])


def _key_of(raw: bytes) -> str:
    """Empty for bytes that are no record."""
    try:
        return record.unpack_sealed(raw)[0]
    except record.RecordFormatError:
        return ""
