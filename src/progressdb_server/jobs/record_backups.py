"""What a job leaves of the records that it re-encrypted: the old bytes, at `backup:migrate:<job>:<storage key>`.

Owns: those entries. Invariants: a backup is written in the write of its record's new ciphertext; it comes back only in
the place of the same version of its record, so that nothing which was changed since is lost; removing goes by chunks
that are written with the count that the job's row keeps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator
from typing import Final, NamedTuple

from progressdb_server.jobs.model import Job, changed
from progressdb_server.jobs.table import JobTable
from progressdb_server.jobs.walk import CHUNK_BYTES_MAX
from progressdb_server.store import keyspace, record
from progressdb_server.store.engine import Engine, Reader
from progressdb_server.store.writer import ConditionFailedError, Write, Writer

MIGRATED: Final = b"backup:migrate:"
CHUNK_ENTRIES_MAX: Final = 256


class Restored(NamedTuple):
    """`restored` are back; of `kept` another version is stored since, which stays."""

    restored: int
    kept: int


def key_of(job_id: str, key: bytes) -> bytes:
    return b"%b%b:%b" % (MIGRATED, job_id.encode(), key)


def bounds(job_id: str) -> tuple[bytes, bytes]:
    prefix = key_of(job_id, b"")
    return prefix, keyspace.after(prefix)


def entries_of(reader: Reader, job_id: str) -> Iterator[list[tuple[bytes, bytes]]]:
    """The backups of a job with the storage keys of their records; each chunk is read when it is asked for."""
    prefix, upper = bounds(job_id)
    lower = prefix
    while entries := reader.scan(lower, upper, limit=CHUNK_ENTRIES_MAX, bytes_max=CHUNK_BYTES_MAX):
        lower = entries[-1][0] + b"\0"
        yield [(key[len(prefix) :], raw) for key, raw in entries]


async def restore(engine: Engine, writer: Writer, job: Job) -> Restored:
    """Put the old records back. The thread has no other job meanwhile. Raises StoreUnavailableError; what was put back
    until then stays."""
    restored = kept = 0
    for entries in entries_of(engine, job.id):
        while True:
            wanted: list[tuple[bytes, bytes]] = []
            found: list[tuple[bytes, bytes | None]] = []
            for key, raw in entries:
                current = engine.get(key)
                if current is None or record.same_version(raw, current):
                    wanted.append((key, raw))
                    found.append((key, current))
            try:
                await writer.commit(Write(wanted, found))
            except ConditionFailedError:  # changed since it was read
                continue
            restored += len(wanted)
            kept += len(entries) - len(wanted)
            break
    return Restored(restored, kept)


async def drop(engine: Engine, table: JobTable, job_id: str, under: Collection[str] | None = None) -> int:
    """Remove the job's backups, or only those under these keys; how many there were. Raises StoreUnavailableError."""
    dropped = 0
    for entries in entries_of(engine, job_id):
        gone = [key for key, raw in entries if under is None or _key_of_record(raw) in under]
        if gone:
            row = table.row(job_id)
            left = changed(row.job, backups=max(0, row.job.backups - len(gone)))
            await table.store(row, left, [(key_of(job_id, key), None) for key in gone])
            dropped += len(gone)
        await asyncio.sleep(0)
    return dropped


async def count_under(engine: Engine, job_id: str, under: Collection[str]) -> int:
    count = 0
    for entries in entries_of(engine, job_id):
        count += sum(_key_of_record(raw) in under for _, raw in entries)
        await asyncio.sleep(0)
    return count


def _key_of_record(raw: bytes) -> str:
    try:
        return record.unpack_sealed(raw)[0]
    except record.RecordFormatError:
        return ""
