"""Conversations of Pydantic AI, encrypted under one key for each conversation.

Owns: `EncryptedConversationStore`, around any conversation store. An entry and a record keep their form, so that any
store takes them; their contents become one sealed record each. Invariants: an entry is bound to its conversation, its
id and the entry before it, a record to its conversation, so that no message can be moved, left out or added; a fork
copies its history, so that no conversation needs another's key. Ids, scopes, revisions and times stay in plaintext.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter
from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
)
from pydantic_ai.messages import ModelMessagesTypeAdapter, ModelRequest
from pydantic_ai.tools import DeferredToolRequests
from pydantic_ai.usage import RunUsage

from minikms_adapters.errors import DestroyedRecordError, WrongPlaceError
from minikms_adapters.records import (
    JSON_FIELD,
    KmsClient,
    Place,
    RecordSealer,
    StepRunner,
    Steps,
    as_json,
    ask_inner,
    asynchronous,
    from_json,
    malformed,
    thread_name,
)

_RECORD: TypeAdapter[ConversationRecord] = TypeAdapter(ConversationRecord)


class EncryptedConversationStore(ConversationStore):
    """A conversation store around `inner`, whose database gets no plaintext of messages, tool calls and usage. `kms` is
    a `minikms.Client` or a `minikms.AsyncClient`.

    Raises RecordError for a message or record that is in plaintext, was altered, moved or left out, or whose key was
    destroyed.
    """

    def __init__(self, inner: ConversationStore, kms: KmsClient) -> None:
        self._sealer = RecordSealer()
        self._runner = StepRunner(kms, inner)

    def _read_stored(self, conversation_id: str) -> Steps[ConversationRecord | None]:
        stored: ConversationRecord | None = yield ask_inner("read_record", conversation_id)
        if stored is not None and stored.conversation_id != conversation_id:
            raise WrongPlaceError(_record_place(stored).record)
        return stored

    def _read_records(self, stored: Sequence[ConversationRecord]) -> Steps[list[ConversationRecord]]:
        sealed: list[tuple[Place, object]] = []
        for record in stored:
            place, requests = _record_place(record), record.deferred_tool_requests
            with malformed(place.record):
                sealed.append((place, from_json(requests.metadata.get(JSON_FIELD) if requests else None)))
        opened = [_RECORD.validate_json(value) for value in (yield from self._sealer.open(sealed))]
        for record, outcome in zip(stored, opened, strict=True):
            if _plain(outcome) != _plain(replace(record, updated_at=outcome.updated_at)):
                raise WrongPlaceError(_record_place(record).record)
        return opened

    @asynchronous
    def read_record(self, conversation_id: str) -> Steps[ConversationRecord | None]:
        stored = yield from self._read_stored(conversation_id)
        return None if stored is None else (yield from self._read_records([stored]))[0]

    @asynchronous
    def read_records(
        self, *, scope: str | None = None, limit: int | None = None
    ) -> Steps[Sequence[ConversationRecord]]:
        records = yield from self._read_records((yield ask_inner("read_records", scope=scope, limit=limit)))
        for record in records:
            if scope not in (None, record.scope):
                raise WrongPlaceError(_record_place(record).record)
        return records

    @asynchronous
    def write_record(
        self,
        record: ConversationRecord,
        *,
        new_entries: Sequence[ConversationEntry] = (),
        expected_revision: str | None,
    ) -> Steps[None]:
        if record.forked_from is not None and expected_revision is None:
            copied: list[ConversationEntry] = []
            for entry in (yield from self._history(record.head_id)):
                before = copied[-1].id if copied else None
                copied.append(ConversationEntry(parent_id=before, message=entry.message))
            new_entries = [*copied, *new_entries]
            record = replace(record, head_id=new_entries[-1].id if new_entries else None)
        conversation_id, dump = record.conversation_id, ModelMessagesTypeAdapter.dump_json
        contents = [(_entry_place(conversation_id, entry), dump([entry.message])) for entry in new_entries]
        sealed = yield from self._sealer.seal([*contents, (_record_place(record), _RECORD.dump_json(record))])
        stored = [
            replace(entry, message=ModelRequest([], metadata=as_json(each), conversation_id=conversation_id))
            for entry, each in zip(new_entries, sealed, strict=False)
        ]
        requests = DeferredToolRequests(metadata={JSON_FIELD: as_json(sealed[-1])})
        row = replace(_plain(record), deferred_tool_requests=requests)
        yield ask_inner("write_record", row, new_entries=stored, expected_revision=expected_revision)

    def _open(self, stored: Sequence[ConversationEntry]) -> Steps[list[ConversationEntry]]:
        sealed: list[tuple[Place, object]] = []
        for entry in stored:
            with malformed(f"entry {entry.id}"):
                place = _entry_place(str(entry.message.conversation_id), entry)
                sealed.append((place, from_json(entry.message.metadata)))
        opened = yield from self._sealer.open(sealed)
        messages = [ModelMessagesTypeAdapter.validate_json(value)[0] for value in opened]
        return [replace(entry, message=message) for entry, message in zip(stored, messages, strict=True)]

    @asynchronous
    def read_entry(self, entry_id: str) -> Steps[ConversationEntry]:
        stored = yield ask_inner("read_entry", entry_id)
        if stored.id != entry_id:
            raise WrongPlaceError(f"entry {entry_id}")
        return (yield from self._open([stored]))[0]

    def _history(self, head_id: str | None, *, limit: int | None = None) -> Steps[list[ConversationEntry]]:
        """Each entry is bound to the one before it, so that none can be left out or come from elsewhere."""
        entries = yield from self._open((yield ask_inner("read_history", head_id, limit=limit)))
        before = head_id
        for entry in reversed(entries):
            if entry.id != before:
                raise WrongPlaceError(f"entry {before}")
            before = entry.parent_id
        if before is not None and (limit is None or len(entries) < limit):
            raise WrongPlaceError(f"entry {before}")
        return entries

    read_history = asynchronous(_history)

    @asynchronous
    def delete(self, conversation_id: str, *, scope: str | None = None) -> Steps[Any]:
        """Destroys the conversation's keys, then deletes its rows, and gives the receipts, a list of `Receipt`. May be
        repeated after a failure. The type is Any, since Pydantic AI's own stores give nothing.
        """
        stored = yield from self._read_stored(conversation_id)
        if stored is not None and scope is not None:
            with suppress(DestroyedRecordError):  # a deletion that was cut off
                [stored] = yield from self._read_records([stored])
            if stored.scope != scope:
                return []
        receipts = yield from self._sealer.destroy(_thread(conversation_id))
        yield ask_inner("delete", conversation_id)
        return receipts

    @asynchronous
    def delete_record(self, conversation_id: str, *, expected_revision: str) -> Steps[None]:
        stored = yield from self._read_stored(conversation_id)
        if stored is None or stored.revision != expected_revision:
            raise ConversationConflict(conversation_id)
        yield from self._sealer.destroy(_thread(conversation_id))
        yield ask_inner("delete_record", conversation_id, expected_revision=expected_revision)


def _thread(conversation_id: str) -> str:
    return thread_name("pydantic-ai", conversation_id)


def _record_place(record: ConversationRecord) -> Place:
    own_id = record.conversation_id
    return Place(_thread(own_id), ("pydantic-ai", "record", own_id), f"conversation {own_id}")


def _entry_place(conversation_id: str, entry: ConversationEntry) -> Place:
    ids = (conversation_id, entry.id, *(() if entry.parent_id is None else (entry.parent_id,)))
    record = f"conversation {conversation_id}, entry {entry.id}"
    return Place(_thread(conversation_id), ("pydantic-ai", "entry", *ids), record)


def _plain(record: ConversationRecord) -> ConversationRecord:
    """A record without what is encrypted."""
    return replace(record, usage=RunUsage(), deferred_tool_requests=None)
