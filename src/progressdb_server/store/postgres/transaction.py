"""A group of writes as a transaction of several statements, for `store.postgres.writer`.

Owns: the locks and the conditions of such a group, and its statements. Invariants: heads are locked before any entry;
the clock follows a head only if the thread has the version that the head names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from minikms.processes.postgresql import NodeConnection
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Conditions, LateStampError, PendingWrite, Puts
from progressdb_server.store.keyspace import Clock, Stamp
from progressdb_server.store.model import RecordUnreadableError
from progressdb_server.store.postgres.tables import DELETE, TKEY_HASH_BYTES, is_thread, tkey

LOCKED_HEADS: Final = """
WITH head AS MATERIALIZED (
    SELECT tkey, last FROM store_head WHERE tkey = ANY($1::bytea[]) ORDER BY tkey FOR UPDATE SKIP LOCKED)
SELECT tkey, last FROM head UNION ALL
SELECT tkey, NULL FROM store_head WHERE tkey = ANY($1::bytea[]) AND tkey NOT IN (SELECT tkey FROM head)
"""
"""The last stamps by `tkey`; NULL for a head that somebody else has locked."""
WAITED_HEADS: Final = "SELECT tkey, last FROM store_head WHERE tkey = ANY($1::bytea[]) ORDER BY tkey FOR UPDATE"
_VALUES: Final = (
    "SELECT entry.key, entry.value FROM unnest($1::bytea[], $2::bytea[]) AS wanted (tkey, key)"
    " JOIN store_entry AS entry ON entry.tkey = wanted.tkey AND entry.key = wanted.key ORDER BY entry.tkey, entry.key"
)
_HEAD_DAMAGED: Final = "the last stamp of the thread is damaged: run progressdb check --repair"


class AgainError(Exception):
    """Somebody else has changed one of the entries meanwhile: nothing was written."""


class LockedError(Exception):
    """Somebody else has locked these heads: nothing was written."""

    def __init__(self, heads: Collection[bytes]) -> None:
        super().__init__()
        self.heads = heads


def expectations(pending: PendingWrite) -> Iterable[tuple[bytes, bytes | None]]:
    write = pending.write
    if write is not None:
        yield from pending.expect
        yield from write.expect
        yield from write.read


def new_versions(pending: PendingWrite) -> dict[bytes, tuple[bytes, bytes]]:
    """The version entries of new versions, each with the `tkey` of its thread and its stamp."""
    write = pending.write
    if write is None or not write.messages:
        return {}
    versions: dict[bytes, tuple[bytes, bytes]] = {}
    for key, value in write.puts:
        if key.startswith(keyspace.VERSION) and value is not None:
            versions[key] = tkey(b"thread:%b:" % value), key[-keyspace.STAMP_BYTES :]
    return versions


async def write_group(
    connection: NodeConnection, group: Sequence[PendingWrite], locking: str, clock: Clock
) -> tuple[dict[PendingWrite, Exception], int, int]:
    """Writes a group. Returns the writes that fail, and how many threads and messages the others add."""
    stamps = {pending: new_versions(pending) for pending in group}
    expected = {key for pending in group for key, _ in expectations(pending)}
    touched = {tkey(key) for pending in group if pending.write for key, _ in pending.write.puts} | set(
        map(tkey, expected)
    )
    heads = await _lock_heads(connection, locking, sorted(filter(is_thread, touched)))
    fresh = {key for versions in stamps.values() for key in versions}
    late = {
        thread for versions in stamps.values() for thread, stamp in versions.values() if stamp <= heads.get(thread, b"")
    }
    values = await _read(connection, expected | fresh | {_newest(thread, heads[thread]) for thread in late})
    failed: dict[PendingWrite, Exception] = {}
    for pending, versions in stamps.items():
        for version, (thread, _) in versions.items():
            if thread in late:
                last = _believed(heads[thread], clock) if _newest(thread, heads[thread]) in values else None
                failed[pending] = LateStampError(version, last) if last else RecordUnreadableError(_HEAD_DAMAGED)
            elif version in values:
                failed[pending] = LateStampError(version, None)
    rest = [pending for pending in group if pending not in failed]
    staged, refused, threads, messages = Conditions(values).stage(rest)
    failed |= refused
    await _put(connection, staged, fresh | {key for key in expected if key not in values})
    # A new thread has a head, although nothing may be in it yet.
    new_threads = {tkey(key) for key, value in staged.items() if key.startswith(keyspace.MAP) and value is not None}
    advanced = {place: b"" for place in map(tkey, staged) if place in heads or place in new_threads}
    for pending in rest:
        if pending not in refused:
            for thread, stamp in stamps[pending].values():
                advanced[thread] = max(advanced.get(thread, b""), stamp)
    await _advance(connection, heads, advanced)
    if ended := [tkey(key) for key, value in staged.items() if key.startswith(keyspace.MAP) and value is None]:
        await connection.execute("DELETE FROM store_head WHERE tkey = ANY($1::bytea[])", ended)
    return failed, threads, messages


def _newest(thread: bytes, last: bytes) -> bytes:
    """The key of the version that a head says to be the last one; `thread` is its `tkey`."""
    return b"%b:msg:%b" % (thread[TKEY_HASH_BYTES:], last)


def _believed(last: bytes, clock: Clock) -> Stamp | None:
    """None if the clock must not follow it."""
    try:
        stamp = Stamp.parse(last.decode())
    except ValueError:
        return None
    return stamp if clock.may_follow(stamp) else None


async def _lock_heads(connection: NodeConnection, locking: str, threads: Sequence[bytes]) -> dict[bytes, bytes]:
    """The last stamps, by `tkey`. Raises LockedError."""
    if not threads:
        return {}
    heads = {row[0]: row[1] for row in await connection.fetch(locking, threads)}
    if locked := [thread for thread, last in heads.items() if last is None]:
        raise LockedError(locked)
    return heads


async def _read(connection: NodeConnection, keys: Iterable[bytes]) -> dict[bytes, bytes]:
    """The values of those that are stored. An entry of no thread stays locked."""
    places = sorted((tkey(key), key) for key in keys)
    values: dict[bytes, bytes] = {}
    for of_threads, lock in ((True, ""), (False, " FOR UPDATE OF entry")):
        some = [place for place in places if is_thread(place[0]) is of_threads]
        if some:
            rows = await connection.fetch(_VALUES + lock, *zip(*some, strict=True))
            values |= {row[0]: row[1] for row in rows}
    return values


async def _put(connection: NodeConnection, staged: Puts, fresh: set[bytes]) -> None:
    """Entries that nobody has are inserted, the others are replaced. Raises AgainError for one of `fresh` that
    somebody else has inserted, or one that somebody else has deleted."""
    values = sorted((tkey(key), key, value) for key, value in staged.items() if value is not None)
    removals = sorted((tkey(key), key) for key, value in staged.items() if value is None)
    if values:
        inserted = await connection.fetch(
            "INSERT INTO store_entry SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::bytea[])"
            " ON CONFLICT (tkey, key) DO NOTHING RETURNING key",
            *zip(*values, strict=True),
        )
        if len(inserted) < len(values):
            new = {row[0] for row in inserted}
            there = [entry for entry in values if entry[1] not in new]
            if any(key in fresh for _, key, _ in there):
                raise AgainError
            replaced = await connection.fetch(
                "UPDATE store_entry AS entry SET value = new.value"
                " FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS new (tkey, key, value)"
                " WHERE entry.tkey = new.tkey AND entry.key = new.key RETURNING entry.key",
                *zip(*there, strict=True),
            )
            if len(replaced) < len(there):
                raise AgainError
    if removals:
        await connection.execute(DELETE, *zip(*removals, strict=True))


async def _advance(connection: NodeConnection, heads: Mapping[bytes, bytes], advanced: Mapping[bytes, bytes]) -> None:
    """Counts a change of each thread, with its last stamp. Raises AgainError if somebody else has made one of them."""
    old = sorted((thread, last) for thread, last in advanced.items() if thread in heads)
    new = sorted((thread, last) for thread, last in advanced.items() if thread not in heads)
    if old:
        await connection.execute(
            "UPDATE store_head AS head SET last = greatest(head.last, new.last), changes = head.changes + 1"
            " FROM unnest($1::bytea[], $2::bytea[]) AS new (tkey, last) WHERE head.tkey = new.tkey",
            *zip(*old, strict=True),
        )
    if new:
        rows = await connection.fetch(
            "INSERT INTO store_head (tkey, last) SELECT * FROM unnest($1::bytea[], $2::bytea[])"
            " ON CONFLICT (tkey) DO NOTHING RETURNING tkey",
            *zip(*new, strict=True),
        )
        if len(rows) < len(new):
            raise AgainError
