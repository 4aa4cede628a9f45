"""What each operation writes, before it is sealed: records with the index entries that lead to them.

Owns: `Draft`, and which entries belong to a version of a message, to a new thread and to changed metadata
(docs/spec/store.md, "What one batch holds"). No I/O, no keys of the key service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from progressdb_server.store import keyspace, record
from progressdb_server.store.conditions import Write
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import Message, Thread, json_text

Puts = Sequence[tuple[bytes, bytes | None]]


class Draft(NamedTuple):
    """A write of one thread before it is sealed. `secrets`: storage key and plaintext of each record; `finish` turns a
    key id and the sealed parts into the write."""

    secrets: Sequence[tuple[bytes, bytes]]
    finish: Callable[[str, Sequence[bytes]], Write]


def joined(*drafts: Draft) -> Draft:
    """One write of all of them."""

    def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
        writes: list[Write] = []
        done = 0
        for draft in drafts:
            writes.append(draft.finish(key_id, sealed[done : done + len(draft.secrets)]))
            done += len(draft.secrets)
        return Write(
            [put for write in writes for put in write.puts],
            [condition for write in writes for condition in write.expect],
            threads=sum(write.threads for write in writes),
            messages=sum(write.messages for write in writes),
        )

    return Draft([secret for draft in drafts for secret in draft.secrets], finish)


def first_version(message: Message, stamp: Stamp, extra: Puts = (), expect: Puts = ()) -> Draft:
    """The first version of the message, at `stamp`, with its index entries and `extra`, under the conditions
    `expect`."""
    own = stamp.raw
    thread = keyspace.part(message.thread)
    key, version_key, order_key = keyspace.version_keys(thread, message.id, own, own)

    def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
        header = record.MessageHeader(key_id, "", message.author, message.deleted)
        return Write(
            (
                (key, record.pack(header, sealed[0])),
                (version_key, thread),
                (order_key, keyspace.place(own, is_first=True, deleted=message.deleted)),
                *extra,
            ),
            expect,
            messages=1,
        )

    return Draft(((key, record.message_secret(message, own.decode())),), finish)


def later_version(
    message: Message, first: Stamp, stamp: Stamp, content: str, secret: bytes, *, expect: Puts = ()
) -> Draft:
    """The version `message` at `stamp`, with its index entries; `first` is the stamp of the first version. `content`
    and `secret` are those of `record.later_secret`. The conditions are `expect`."""
    own = stamp.raw
    thread = keyspace.part(message.thread)
    key, version_key, order_key = keyspace.version_keys(thread, message.id, first.raw, own)

    def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
        header = record.LaterHeader(key_id, first.text, message.author, message.deleted, content)
        return Write(
            (
                (key, record.pack(header, sealed[0])),
                (version_key, thread),
                (order_key, keyspace.place(own, is_first=False, deleted=message.deleted)),
            ),
            expect,
            messages=1,
        )

    return Draft(((key, secret),), finish)


def deletion_event(thread: str, by: str, stamp: Stamp) -> Draft:
    """The message that a thread's deletion leaves in it."""
    body = json_text({"_event": "thread_deleted", "by": by})
    message = Message(
        id=keyspace.message_id(stamp), thread=thread, author=by, ts=stamp.time_ns, body=body, deleted=True
    )
    return first_version(message, stamp)


def new_thread(thread: Thread, created: Stamp, extra: Puts = (), expect: Puts = ()) -> Draft:
    """Key map, metadata and index entries. The conditions: nobody else has made the thread, and `expect`."""
    key, map_key = keyspace.meta(thread.id), keyspace.key_map(thread.id)
    entry = keyspace.creation(created, thread.id)

    def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
        header = record.ThreadHeader(key_id, thread.author, created.text, created.time_ns, 0)
        return Write(
            (
                (map_key, key_id.encode()),
                (key, record.pack(header, sealed[0])),
                (keyspace.CREATED + entry, b""),
                (keyspace.author_threads(thread.author) + entry, b""),
                (keyspace.writer(thread.id, thread.author), b""),
                *extra,
            ),
            ((map_key, None), (key, None), *expect),
            threads=1,
        )

    return Draft(((key, record.thread_secret(thread)),), finish)


def changed_thread(thread: Thread, raw: bytes, old: record.ThreadHeader) -> Draft:
    """The metadata `thread` in the place of `raw`, whose header is `old`. The condition: `raw` is still stored."""
    key = keyspace.meta(thread.id)

    def finish(key_id: str, sealed: Sequence[bytes]) -> Write:
        header = record.ThreadHeader(key_id, old.author, old.created, thread.updated_ts, thread.deleted_ts)
        closed = ((keyspace.closed_key(thread.id), b""),) if thread.deleted else ()
        return Write(((key, record.pack(header, sealed[0])), *closed), ((key, raw),))

    return Draft(((key, record.thread_secret(thread)),), finish)
