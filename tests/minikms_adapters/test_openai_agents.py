"""Sessions of the OpenAI Agents SDK: what their database holds, what is refused, and a real run of an agent."""

import asyncio
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, ModelSettings, Runner, SessionSettings, SQLiteSession, set_tracing_disabled
from agents.memory.session import SessionABC
from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel
from openai import AsyncOpenAI

from minikms import Client
from minikms_adapters import DestroyedRecordError, NotSupportedError, PlaintextRecordError, WrongPlaceError
from minikms_adapters.openai_agents import EncryptedSession
from tests.harness import fake_model
from tests.harness.live_daemon import LiveDaemon

TYPED = "my salary is 48,000"


def said(text: str) -> Any:
    return {"role": "user", "content": text}


@pytest.fixture
def session_id() -> str:
    return f"session-{uuid.uuid4()}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessions.sqlite"


@contextmanager
def opened(file: Path, session_id: str, kms: Client) -> Iterator[EncryptedSession]:
    inner = SQLiteSession(session_id, file)
    try:
        yield EncryptedSession(session_id, inner, kms)
    finally:
        inner.close()


def rows(file: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(file)) as database:
        return database.execute("SELECT id, session_id, message_data FROM agent_messages ORDER BY id").fetchall()


def change(file: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(file)) as database, database:
        assert database.execute(statement, values).rowcount == 1


def test_items_come_back_as_from_the_inner_session(file: Path, session_id: str, kms: Client) -> None:
    async def use(session: SessionABC) -> list[Any]:
        found: list[Any] = [await session.get_items(), await session.pop_item()]
        await session.add_items([])
        await session.add_items([said(f"{number} ✓") for number in range(5)])
        await session.add_items([said("half a pair \ud83d")])
        await session.add_items([{"type": "function_call", "name": "f", "arguments": "{}", "call_id": "c"}])
        found += [await session.get_items(), await session.get_items(limit=2), await session.get_items(limit=0)]
        found += [await session.pop_item(), await session.pop_item(), await session.get_items()]
        session.session_settings = SessionSettings(limit=1)
        found += [await session.get_items()]
        await session.clear_session()
        return [*found, await session.get_items(limit=9)]

    plain = SQLiteSession(session_id, ":memory:")
    with opened(file, session_id, kms) as session:
        expected = asyncio.run(use(plain))
        assert asyncio.run(use(session)) == expected
        assert len(expected[2]) == 7
    plain.close()


def test_an_item_without_a_form_in_json_is_refused_as_by_the_inner_session(
    file: Path, session_id: str, kms: Client
) -> None:
    item: Any = {"role": "user", "content": object()}
    with opened(file, session_id, kms) as session:
        with pytest.raises(TypeError, match="type object"):
            asyncio.run(session.add_items([item]))
        assert asyncio.run(session.get_items()) == []


def moved_to_another_session(file: Path, session_id: str) -> None:
    [stored] = [row[2] for row in rows(file) if row[1] != session_id]
    change(file, "UPDATE agent_messages SET message_data = ? WHERE id = 2", stored)


def altered(file: Path, session_id: str) -> None:
    stored = json.loads(rows(file)[1][2])["minikms"]
    flipped = stored[:-8] + ("A" if stored[-8] != "A" else "B") + stored[-7:]
    change(file, "UPDATE agent_messages SET message_data = ? WHERE id = 2", json.dumps({"minikms": flipped}))


def in_plaintext(file: Path, session_id: str) -> None:
    change(file, "UPDATE agent_messages SET message_data = ? WHERE id = 2", json.dumps(said("forged")))


def beside_plaintext(file: Path, session_id: str) -> None:
    stored = {**json.loads(rows(file)[1][2]), **said("forged")}
    change(file, "UPDATE agent_messages SET message_data = ? WHERE id = 2", json.dumps(stored))


@pytest.mark.parametrize(
    ("attack", "error"),
    [
        (moved_to_another_session, WrongPlaceError),
        (altered, WrongPlaceError),
        (in_plaintext, PlaintextRecordError),
        (beside_plaintext, PlaintextRecordError),
    ],
)
def test_an_item_that_does_not_open_is_an_error_and_removes_nothing(
    file: Path, session_id: str, kms: Client, attack: Callable[[Path, str], None], error: type[Exception]
) -> None:
    with opened(file, session_id, kms) as session, opened(file, session_id + "-other", kms) as other:
        asyncio.run(session.add_items([said("one"), said("two")]))
        asyncio.run(other.add_items([said("three")]))
        attack(file, session_id)
        before = rows(file)
        with pytest.raises(error, match=f"session {session_id}, item 1"):
            asyncio.run(session.get_items())
        with pytest.raises(error, match=f"session {session_id}, item 0"):
            asyncio.run(session.pop_item())
        with pytest.raises(error):
            asyncio.run(session.reencrypt())
        assert rows(file) == before


def test_a_cleared_session_gives_receipts_and_is_gone_from_backups(
    file: Path, session_id: str, kms: Client, daemon: LiveDaemon
) -> None:
    with opened(file, session_id, kms) as session:
        asyncio.run(session.add_items([said(TYPED)]))
        [(_, _, stored)] = rows(file)
        [receipt] = asyncio.run(session.clear_session())
        assert receipt.state == "destroyed"
        assert any(event["key_id"] == receipt.key_id for event in daemon.events("destroy_key"))
        assert asyncio.run(session.get_items()) == []
        asyncio.run(session.add_items([said("anew")]))
        change(file, "UPDATE agent_messages SET message_data = ?", stored)
        with pytest.raises(DestroyedRecordError, match=session_id):
            asyncio.run(session.get_items())


def test_after_a_reencryption_the_retired_key_can_be_destroyed(file: Path, session_id: str, kms: Client) -> None:
    thread = f"agents.{session_id}"
    with opened(file, session_id, kms) as session:
        assert asyncio.run(session.reencrypt()) == 0
        asyncio.run(session.add_items([said("one"), said("two")]))
        old = kms.get_or_create_dek_for_thread(thread, purpose="data").key_id
        kms.create_dek_for_thread(thread, replaces=old, purpose="data")
        asyncio.run(session.add_items([said("three")]))
        assert asyncio.run(session.reencrypt()) == 3
        kms.destroy_key(old)
        assert asyncio.run(session.get_items()) == [said("one"), said("two"), said("three")]


def test_a_session_without_transactions_is_not_reencrypted(session_id: str, kms: Client) -> None:
    class Listed(SessionABC):
        """The least that a session can be."""

        def __init__(self) -> None:
            self.session_id = session_id
            self._items: list[Any] = []

        async def get_items(self, limit: int | None = None) -> list[Any]:
            return self._items[-limit:] if limit else list(self._items)

        async def add_items(self, items: list[Any]) -> None:
            self._items += items

        async def pop_item(self) -> Any:
            return self._items.pop() if self._items else None

        async def clear_session(self) -> None:
            self._items.clear()

    session = EncryptedSession(session_id, Listed(), kms)
    asyncio.run(session.add_items([said("one")]))
    with pytest.raises(NotSupportedError, match="one transaction"):
        asyncio.run(session.reencrypt())
    assert asyncio.run(session.pop_item()) == said("one")


def test_a_run_of_an_agent_leaves_nothing_that_was_typed(file: Path, session_id: str, kms: Client) -> None:
    set_tracing_disabled(True)

    async def talk(base_url: str, session: EncryptedSession) -> list[str]:
        async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            agent = Agent(
                name="Assistant",
                model=OpenAIChatCompletionsModel("fake", client),
                model_settings=ModelSettings(temperature=0),
            )
            return [(await Runner.run(agent, text, session=session)).final_output for text in (TYPED, "and what else?")]

    with fake_model.serving() as base_url, opened(file, session_id, kms) as session:
        answers = asyncio.run(talk(base_url, session))
        history = asyncio.run(session.get_items())
    assert answers == [f"You said: {TYPED}", "You said: and what else?"]
    assert [item["role"] for item in history] == ["user", "assistant"] * 2  # type: ignore[typeddict-item]  # all have one
    stored = b"".join(each.read_bytes() for each in file.parent.glob(file.name + "*"))
    for text in (TYPED, "48,000", "what else", "Assistant"):
        assert text.encode() not in stored
