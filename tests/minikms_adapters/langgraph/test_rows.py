"""Rows that a writer of the database changed: none runs code or is of another place; a bad one is a RecordError."""

import pickle
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ormsgpack
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver, CheckpointTuple
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.serde.encrypted import EncryptedSerializer
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import _DeltaSnapshot
from langgraph.checkpoint.sqlite import SqliteSaver
from psycopg import Connection

from minikms import Client
from minikms_adapters import RecordError, WrongPlaceError
from minikms_adapters.langgraph import EncryptedSaver
from minikms_adapters.langgraph.rows import ClosedSerializer, Unreadable, closed
from tests.harness import postgres
from tests.minikms_adapters.langgraph.conftest import config_of, put


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SqliteSaver]:
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
        yield saver


def change(saver: SqliteSaver, statement: str, *values: object) -> None:
    with saver.cursor() as cursor:
        assert cursor.execute(statement, values).rowcount >= 1


# --- code -------------------------------------------------------------------------------------------------------------


class Touch:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


def forged(path: Path) -> list[tuple[str, bytes]]:
    """Stored values for which a permissive serializer makes the file."""
    call = ormsgpack.packb(("os", "mkdir", str(path)))
    return [
        ("msgpack", ormsgpack.packb(ormsgpack.Ext(0, call))),
        ("msgpack", ormsgpack.packb({"channel_values": [ormsgpack.Ext(7, ormsgpack.packb(ormsgpack.Ext(0, call)))]})),
        ("pickle", pickle.dumps(Touch(path))),
    ]


@pytest.mark.parametrize("number", range(3))
def test_a_forged_value_would_run_code_in_the_bare_serializer(tmp_path: Path, number: int) -> None:
    JsonPlusSerializer(pickle_fallback=True, allowed_msgpack_modules=True).loads_typed(
        forged(tmp_path / "made")[number]
    )
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("table", ["checkpoints", "writes"])
def test_a_writer_of_sqlite_runs_no_code(
    sqlite: SqliteSaver, kms: Client, thread: str, tmp_path: Path, table: str, number: int
) -> None:
    sqlite.serde = JsonPlusSerializer(pickle_fallback=True, allowed_msgpack_modules=True)
    saver = EncryptedSaver(sqlite, kms)
    stored = put(saver, thread, 1, "one")
    saver.put_writes(stored, [("messages", "two")], "task")
    column = "checkpoint" if table == "checkpoints" else "value"
    change(sqlite, f"UPDATE {table} SET type = ?, {column} = ?", *forged(tmp_path / "made")[number])
    reads: list[Callable[[], object]] = [
        lambda: saver.get_tuple(config_of(thread)),
        lambda: list(saver.list(config_of(thread))),
        lambda: list(saver.list(None)),
        lambda: saver.get_delta_channel_history(config=stored, channels=["messages"]),
        lambda: saver.copy_thread(thread, thread + "-copy"),
    ]
    for read in reads:
        with pytest.raises(RecordError, match=f"thread {thread}"):
            read()
    assert not (tmp_path / "made").exists()


def test_a_writer_of_postgresql_runs_no_code(kms: Client, thread: str, tmp_path: Path) -> None:
    with postgres.running() as (address, _), PostgresSaver.from_conn_string(address) as inner:
        inner.setup()
        inner.serde = JsonPlusSerializer(pickle_fallback=True, allowed_msgpack_modules=True)
        saver = EncryptedSaver(inner, kms)
        stored = put(saver, thread, 1, ["one"])
        saver.put_writes(stored, [("messages", "two")], "task")
        assert isinstance(inner.conn, Connection)
        for kind, value in forged(tmp_path / "made"):
            inner.conn.execute("UPDATE checkpoint_blobs SET type = %s, blob = %s", (kind, value))
            inner.conn.execute("UPDATE checkpoint_writes SET type = %s, blob = %s", (kind, value))
            with pytest.raises(RecordError, match=f"thread {thread}"):
                saver.get_tuple(config_of(thread))
    assert not (tmp_path / "made").exists()


def test_types_of_the_program_come_back(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    message = HumanMessage("hello", id="1")
    saver = EncryptedSaver(sqlite, kms)
    stored = put(saver, thread, 1, [message])
    saver.put_writes(stored, [("messages", {message.id: message})], "task")
    found = saver.get_tuple(stored)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"messages": [message]}
    assert found.pending_writes == [("task", "messages", {"1": message})]


def test_half_a_surrogate_pair_is_stored_as_by_the_inner_saver(kms: Client, thread: str) -> None:
    found = []
    for saver in (InMemorySaver(), EncryptedSaver(InMemorySaver(), kms)):
        stored = put(saver, thread, 1, "half a pair \ud83d")
        saver.put_writes(stored, [("messages", ["\ude00"])], "task")
        row = saver.get_tuple(stored)
        assert row is not None
        found.append((row.checkpoint["channel_values"], row.metadata, row.pending_writes))
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [None, b"bytes", {"a": [1, 2.5, "ü", True, None]}, _DeltaSnapshot(b"x"), {1: b"y"}])
def test_the_closed_serializer_has_the_format_of_langgraph(value: object) -> None:
    assert ClosedSerializer().dumps_typed(value) == JsonPlusSerializer().dumps_typed(value)
    assert ClosedSerializer().loads_typed(JsonPlusSerializer().dumps_typed(value)) == value


@pytest.mark.parametrize(
    "stored", [("msgpack", b"\xc1"), ("msgpack", b""), ("msgpack", b"\x91" * 5000), ("json", b"{}"), ("x", b""), (7, 8)]
)
def test_what_the_closed_serializer_can_not_read_is_marked(stored: Any) -> None:
    assert isinstance(ClosedSerializer().loads_typed(stored), Unreadable)


def test_rows_below_a_serializer_that_encrypts_are_still_read(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    """Older versions stored a row with the inner saver's own serializer."""
    sqlite.serde = EncryptedSerializer.from_pycryptodome_aes(key=bytes(32))
    saver = EncryptedSaver(sqlite, kms)
    stored = put(saver, thread, 1, "one")
    checkpoint = closed(sqlite).get_tuple(stored)
    assert checkpoint is not None
    change(sqlite, "UPDATE checkpoints SET type = ?, checkpoint = ?", *sqlite.serde.dumps_typed(checkpoint.checkpoint))
    found = saver.get_tuple(stored)
    assert found is not None
    assert found.checkpoint["channel_values"] == {"messages": "one"}


# --- other places -----------------------------------------------------------------------------------------------------


class Misleading(InMemorySaver):
    """Answers with what a database gives that was altered, or that ignores case."""

    def __init__(self, answer: CheckpointTuple) -> None:
        super().__init__()
        self.answer = answer

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        return self.answer

    def list(self, config: RunnableConfig | None, **_: Any) -> Iterator[CheckpointTuple]:
        yield self.answer


@pytest.mark.parametrize("named", [{"thread_id": "{}-other"}, {"checkpoint_ns": "child"}, {"checkpoint_id": "1"}])
def test_an_intact_row_that_nobody_asked_for_is_an_error(
    sqlite: SqliteSaver, kms: Client, thread: str, named: dict[str, str]
) -> None:
    stored = put(EncryptedSaver(sqlite, kms), thread, 1, "one")
    row = sqlite.get_tuple(stored)
    assert row is not None
    saver = EncryptedSaver(Misleading(row), kms)
    asked = config_of(thread)
    asked["configurable"].update({name: value.format(thread) for name, value in named.items()})
    reads: list[Callable[[], object]] = [
        lambda: saver.get_tuple(asked),
        lambda: list(saver.list(asked)),
        lambda: saver.get_delta_channel_history(config=asked, channels=["messages"]),
    ]
    for read in reads:
        with pytest.raises(WrongPlaceError, match=f"thread {thread}"):
            read()
    assert saver.get_tuple(stored) is not None


def test_a_table_that_ignores_case_gives_nobody_another_thread(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    with sqlite.cursor() as cursor:
        [(made,)] = cursor.execute("SELECT sql FROM sqlite_master WHERE name = 'checkpoints'").fetchall()
        cursor.execute("DROP TABLE checkpoints")
        cursor.execute(made.replace("thread_id TEXT", "thread_id TEXT COLLATE NOCASE"))
    saver = EncryptedSaver(sqlite, kms)
    put(saver, "B" + thread, 1, "one")
    with pytest.raises(WrongPlaceError):
        saver.get_tuple(config_of("b" + thread))


# --- malformed rows ---------------------------------------------------------------------------------------------------

PACKED = JsonPlusSerializer()
SHAPES: list[Any] = [[], "text", {}, {"channel_values": 1}, 7]
MALFORMED: list[tuple[str, Any]] = [
    *(("checkpoint", PACKED.dumps_typed(value)[1]) for value in SHAPES),
    ("checkpoint", PACKED.dumps_typed({"channel_values": [], "channel_versions": {}})[1]),
    ("checkpoint", PACKED.dumps_typed({"channel_values": {1: 2}, "channel_versions": []})[1]),
    *(("checkpoint", value) for value in (b"\xc1", b"", "text", 7, None, b"\x91" * 5000)),
    *(("type", value) for value in ("json", "pickle", "null", "bytes", "", None, 7)),
    *(("metadata", value) for value in (b"{", b"[]", b"7", b"null", b"\xff", b'{"minikms": 7}', b"[" * 100_000, None)),
    *(("parent_checkpoint_id", value) for value in (b"\xff", "other")),
    *(("checkpoint_id", value) for value in (b"\xff", 7)),
    *(("checkpoint_ns", value) for value in (b"\xff", 7)),
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_a_malformed_row_is_a_record_error(sqlite: SqliteSaver, kms: Client, thread: str, number: int) -> None:
    saver = EncryptedSaver(sqlite, kms)
    put(saver, thread, 1, "one")
    column, value = MALFORMED[number]
    change(sqlite, f"UPDATE checkpoints SET {column} = ?", value)
    if column != "checkpoint_ns":  # a row of another namespace is not found
        with pytest.raises(RecordError):
            saver.get_tuple(config_of(thread))
    with pytest.raises(RecordError):
        list(saver.list({"configurable": {"thread_id": thread}}))


@pytest.mark.parametrize("column", ["channel = x'ff'", "channel = 7", "task_id = x'ff'", "value = 'text'", "type = 7"])
def test_a_malformed_write_is_a_record_error(sqlite: SqliteSaver, kms: Client, thread: str, column: str) -> None:
    saver = EncryptedSaver(sqlite, kms)
    saver.put_writes(put(saver, thread, 1, "one"), [("messages", "two")], "task")
    change(sqlite, f"UPDATE writes SET {column}")
    with pytest.raises(RecordError, match=f"thread {thread}"):
        saver.get_tuple(config_of(thread))


def test_an_error_of_the_database_stays_its_own(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    saver: BaseCheckpointSaver[Any] = EncryptedSaver(sqlite, kms)
    put(saver, thread, 1, "one")
    sqlite.conn.execute("DROP TABLE checkpoints")
    with pytest.raises(sqlite3.OperationalError):
        saver.get_tuple(config_of(thread))
