"""Conversations of Pydantic AI: what their store holds, what is refused, forks, deletions, and runs of an agent."""

import asyncio
import copy
import dataclasses
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from pydantic import TypeAdapter
from pydantic_ai import Agent, Conversation, DeferredToolRequests
from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
    InMemoryConversationStore,
)
from pydantic_ai.messages import ModelRequest
from pydantic_ai.models.test import TestModel

from minikms import AsyncClient, Client
from minikms_adapters import DestroyedRecordError, PlaintextRecordError, RecordError, WrongPlaceError
from minikms_adapters.pydantic_ai import EncryptedConversationStore
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_adapters.test_records import Counting

TYPED = "my salary is 48,000"
ROWS: TypeAdapter[list[ConversationRecord | ConversationEntry]] = TypeAdapter(
    list[ConversationRecord | ConversationEntry]
)


class JsonStore(InMemoryConversationStore):
    """Holds records and entries as JSON, as a database does."""

    def rows(self) -> bytes:
        return ROWS.dump_json([*self._records.values(), *self._entries.values()])

    async def write_record(self, record: ConversationRecord, **named: Any) -> None:
        named["new_entries"] = ROWS.validate_json(ROWS.dump_json(list(named.get("new_entries", ()))))
        [read] = ROWS.validate_json(ROWS.dump_json([record]))
        assert isinstance(read, ConversationRecord)
        await super().write_record(read, **named)

    def entries(self) -> list[ConversationEntry]:
        """As they were stored."""
        return [*self._entries.values()]

    def change(self, entry: ConversationEntry, **members: Any) -> None:
        self._entries[entry.id] = dataclasses.replace(entry, **members)

    def record(self, conversation_id: str) -> ConversationRecord:
        return self._records[conversation_id]

    def change_record(self, conversation_id: str, /, **members: Any) -> None:
        self._records[conversation_id] = dataclasses.replace(self._records[conversation_id], **members)


@pytest.fixture
def ada() -> str:
    return f"ada-{uuid.uuid4()}"


@pytest.fixture
def inner() -> JsonStore:
    return JsonStore()


@pytest.fixture
def store(inner: JsonStore, kms: Client) -> EncryptedConversationStore:
    return EncryptedConversationStore(inner, kms)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


async def say(store: ConversationStore, conversation_id: str, *texts: str, scope: str | None = None) -> None:
    agent = Agent(TestModel(custom_output_text=f"I heard {TYPED}"))
    for text in texts:
        conversation = await store.load(conversation_id) or Conversation(conversation_id=conversation_id)
        await store.save(await agent.run(text, conversation=conversation), scope=scope)


async def texts(store: ConversationStore, conversation_id: str, **named: Any) -> list[Any] | None:
    """What was said in requests and answers."""
    loaded = await store.load(conversation_id, **named)
    return (
        None if loaded is None else [getattr(part, "content", None) for each in loaded.messages for part in each.parts]
    )


def test_conversations_are_those_of_the_inner_store_and_leave_no_plaintext(
    inner: JsonStore, store: EncryptedConversationStore, ada: str
) -> None:
    async def use(store: ConversationStore) -> list[Any]:
        found: list[Any] = [await store.load(ada)]
        await say(store, ada, TYPED, "again", scope="team")
        conversation = await store.load(ada)
        assert conversation is not None
        found += [await texts(store, ada), await texts(store, ada, limit=3), conversation.usage]
        found += [await texts(store, ada, scope="other"), await store.list_conversations(scope="other")]
        await store.branch(ada, at=2, expected_revision=conversation.revision)
        await say(store, ada, "another way")
        found += [await texts(store, ada)]
        [record] = await store.list_conversations(scope="team")
        return [*found, record.usage, len(record.branches), record.scope]

    assert run(use(store)) == run(use(InMemoryConversationStore()))
    rows = inner.rows()
    for text in ("48,000", "again", "another way"):
        assert text.encode() not in rows


def test_a_save_and_a_load_are_one_batch_each(inner: JsonStore, kms: Client, ada: str) -> None:
    counting = Counting(kms)
    store = EncryptedConversationStore(inner, counting)  # type: ignore[arg-type]  # it has the methods of a client
    run(say(store, ada, *"123456"))
    counting.calls.clear()
    assert len(run(texts(store, ada))) == 12
    assert counting.calls == ["decrypt_batch"] * 2  # the record, then its history
    loaded = run(store.load(ada))
    counting.calls.clear()
    run(store.save(loaded))
    assert counting.calls == ["decrypt_batch", "encrypt_batch"]


def test_deferred_tool_calls_come_back_and_are_encrypted(
    inner: JsonStore, store: EncryptedConversationStore, ada: str
) -> None:
    agent = Agent(TestModel(), output_type=[str, DeferredToolRequests])

    @agent.tool_plain(requires_approval=True)
    def pay_the_bill(reason: str = TYPED) -> str:
        return reason

    async def use() -> Any:
        result = await agent.run(TYPED, conversation=Conversation(conversation_id=ada))
        await store.save(result)
        loaded = await store.load(ada)
        assert loaded is not None
        return result.conversation.deferred_tool_requests, loaded.deferred_tool_requests

    made, loaded = run(use())
    assert made is not None
    assert made.approvals == loaded.approvals
    assert b"48,000" not in inner.rows()
    assert b"pay_the_bill" not in inner.rows()


def test_a_fork_outlives_the_key_of_its_source(store: EncryptedConversationStore, ada: str) -> None:
    async def use() -> Any:
        await say(store, ada, "one", "two")
        fork = (await store.fork(ada, at=2)).conversation_id
        await say(store, fork, "three")
        before = await texts(store, ada)
        await store.delete(ada)
        return before, await texts(store, fork)

    before, after = run(use())
    assert after[:2] == before[:2]
    assert after[2] == "three"


def test_a_deleted_conversation_gives_receipts_and_is_gone_from_backups(
    inner: JsonStore, store: EncryptedConversationStore, kms: Client, ada: str
) -> None:
    run(say(store, ada, TYPED, scope="team"))
    backup = copy.deepcopy(inner)
    assert run(store.delete(ada, scope="other")) == []
    loaded = run(store.load(ada))
    [receipt] = run(store.delete(ada, scope="team"))
    assert receipt.state == "destroyed"
    assert run(texts(store, ada)) is None
    with pytest.raises(ConversationConflict):  # a run beside the deletion does not bring it back
        run(store.save(loaded))
    kept = EncryptedConversationStore(backup, kms)
    with pytest.raises(DestroyedRecordError, match=ada):
        run(kept.load(ada))
    run(kept.delete(ada, scope="team"))  # as after a deletion that was cut off
    assert run(backup.load(ada)) is None


def swapped(inner: JsonStore, ada: str, bob: str) -> None:
    first, second = inner.entries()[:2]
    inner.change(first, message=second.message)
    inner.change(second, message=first.message)


def of_another_conversation(inner: JsonStore, ada: str, bob: str) -> None:
    entries = inner.entries()
    inner.change(entries[0], message=entries[-1].message)


def left_out(inner: JsonStore, ada: str, bob: str) -> None:
    entries = inner.entries()
    inner.change(entries[3], parent_id=entries[1].id)


def cut_off(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change(inner.entries()[2], parent_id=None)


def set_back(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change_record(ada, head_id=inner.entries()[1].id)


def other_history(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change_record(ada, head_id=inner.record(bob).head_id)


def other_record(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change_record(ada, deferred_tool_requests=inner.record(bob).deferred_tool_requests)


def other_scope(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change_record(ada, scope="forged")


def other_id(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change_record(ada, conversation_id=bob)


def message_in_plaintext(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change(inner.entries()[0], message=ModelRequest.user_text_prompt("forged"))


def record_in_plaintext(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change_record(ada, deferred_tool_requests=None)


def malformed(inner: JsonStore, ada: str, bob: str) -> None:
    inner.change_record(ada, deferred_tool_requests="text")


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        *((attack, WrongPlaceError) for attack in (swapped, of_another_conversation, left_out, cut_off)),
        *((attack, WrongPlaceError) for attack in (set_back, other_history, other_record, other_scope, other_id)),
        (message_in_plaintext, PlaintextRecordError),
        (record_in_plaintext, PlaintextRecordError),
        (malformed, RecordError),
    ],
)
def test_an_altered_conversation_is_an_error(
    inner: JsonStore,
    store: EncryptedConversationStore,
    ada: str,
    attack: Callable[[JsonStore, str, str], None],
    error: type[RecordError],
) -> None:
    bob = f"bob-{ada}"
    run(say(store, ada, "one", "two"))
    run(say(store, bob, "three"))
    attack(inner, ada, bob)
    with pytest.raises(error):
        run(store.load(ada))


def test_an_asyncio_client_works_too(daemon: LiveDaemon, inner: JsonStore, ada: str) -> None:
    async def use() -> Any:
        async with AsyncClient(daemon.socket) as kms:
            store = EncryptedConversationStore(inner, kms)
            await say(store, ada, "one")
            [first, _] = await store.load_entries(ada) or []
            return first == await store.read_entry(first.id), await texts(store, ada)

    same, found = run(use())
    assert same
    assert found[0] == "one"
