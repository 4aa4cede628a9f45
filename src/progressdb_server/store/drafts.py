"""The writes of each operation before they are sealed: records with the index entries that lead to them.

Owns: `Draft`, and which entries belong to a version of a message, to a new thread and to changed metadata
(docs/spec/store.md, "What one batch holds"). No I/O, no keys of the key service.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from progressdb_server.store import keyspace, record
from progressdb_server.store.conditions import Write
from progressdb_server.store.keyspace import Stamp
from progressdb_server.store.model import Message, Thread, json_text

Puts = Sequence[tuple[bytes, bytes | None]]


class DraftRecord(NamedTuple):
    """A record before it is sealed: its storage key, its header, and what is encrypted."""

    key: bytes
    header: record.MessageHeader | record.ThreadHeader
    plaintext: bytes


class Draft(NamedTuple):
    """A write of one thread before it is sealed: its records, the entries that lead to them, and its conditions.
    `threads` and `messages` are added to the counters."""

    records: tuple[DraftRecord, ...]
    puts: Puts
    expect: Puts = ()
    threads: int = 0
    messages: int = 0

    def sealed(self, ciphertexts: Sequence[bytes]) -> Write:
        """The write with the sealed records."""
        records = zip(self.records, ciphertexts, strict=True)
        return Write(
            (*((key, record.pack(header, sealed)) for (key, header, _), sealed in records), *self.puts),
            self.expect,
            threads=self.threads,
            messages=self.messages,
        )


def joined(*drafts: Draft) -> Draft:
    """One draft of all of them."""
    return Draft(
        tuple(chain.from_iterable(draft.records for draft in drafts)),
        tuple(chain.from_iterable(draft.puts for draft in drafts)),
        tuple(chain.from_iterable(draft.expect for draft in drafts)),
        sum(draft.threads for draft in drafts),
        sum(draft.messages for draft in drafts),
    )


def first_version(message: Message, stamp: Stamp, key_id: str, extra: Puts = (), expect: Puts = ()) -> Draft:
    """The first version of the message, at `stamp`, with its index entries and `extra`, under the conditions
    `expect`."""
    own = stamp.raw
    thread = keyspace.part(message.thread)
    key, version_key, order_key = keyspace.version_keys(thread, message.id, own, own)
    header = record.MessageHeader(key_id, "", message.author, message.deleted)
    return Draft(
        (DraftRecord(key, header, record.message_secret(message, own.decode())),),
        (
            (version_key, thread),
            (order_key, keyspace.place(own, is_first=True, deleted=message.deleted)),
            *extra,
        ),
        expect,
        messages=1,
    )


def later_version(
    message: Message, first: Stamp, stamp: Stamp, key_id: str, *, content: str, secret: bytes, expect: Puts = ()
) -> Draft:
    """The version `message` at `stamp`, with its index entries; `first` is the stamp of the first version. `content`
    and `secret` are those of `record.later_secret`. The conditions are `expect`."""
    own = stamp.raw
    thread = keyspace.part(message.thread)
    key, version_key, order_key = keyspace.version_keys(thread, message.id, first.raw, own)
    header = record.LaterHeader(key_id, first.text, message.author, message.deleted, content)
    return Draft(
        (DraftRecord(key, header, secret),),
        ((version_key, thread), (order_key, keyspace.place(own, is_first=False, deleted=message.deleted))),
        expect,
        messages=1,
    )


def deletion_event(thread: str, by: str, stamp: Stamp, key_id: str) -> Draft:
    """The message that a thread's deletion leaves in it."""
    body = json_text({"_event": "thread_deleted", "by": by})
    message = Message(
        id=keyspace.message_id(stamp), thread=thread, author=by, ts=stamp.time_ns, body=body, deleted=True
    )
    return first_version(message, stamp, key_id)


def new_thread(thread: Thread, created: Stamp, key_id: str, extra: Puts = (), expect: Puts = ()) -> Draft:
    """Key map, metadata and index entries. The conditions: nobody else has made the thread, and `expect`."""
    key, map_key = keyspace.meta(thread.id), keyspace.key_map(thread.id)
    entry = keyspace.creation(created, thread.id)
    header = record.ThreadHeader(key_id, thread.author, created.text, created.time_ns, 0)
    return Draft(
        (DraftRecord(key, header, record.thread_secret(thread)),),
        (
            (map_key, key_id.encode()),
            (keyspace.CREATED + entry, b""),
            (keyspace.author_threads(thread.author) + entry, b""),
            (keyspace.writer(thread.id, thread.author), b""),
            *extra,
        ),
        ((map_key, None), (key, None), *expect),
        threads=1,
    )


def changed_thread(thread: Thread, raw: bytes, old: record.ThreadHeader, key_id: str) -> Draft:
    """The metadata `thread` in the place of `raw`, whose header is `old`. The condition: `raw` is still stored."""
    key = keyspace.meta(thread.id)
    header = record.ThreadHeader(key_id, old.author, old.created, thread.updated_ts, thread.deleted_ts)
    closed = ((keyspace.closed_key(thread.id), b""),) if thread.deleted else ()
    return Draft((DraftRecord(key, header, record.thread_secret(thread)),), closed, ((key, raw),))
