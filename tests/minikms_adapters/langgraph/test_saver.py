"""What a database gets to see, which records are refused, and what happens to a thread's key."""

import copy
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command

from minikms import Client
from minikms_adapters import (
    DestroyedRecordError,
    NotSearchableError,
    PlaintextRecordError,
    RecordError,
    WrongPlaceError,
)
from minikms_adapters.langgraph import EncryptedSaver
from tests.harness.live_daemon import LiveDaemon
from tests.minikms_adapters.langgraph.conftest import TYPED, State, config_of, conversation, history, put
from tests.minikms_adapters.test_records import Counting


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints.sqlite"


@pytest.fixture
def sqlite(file: Path) -> Iterator[SqliteSaver]:
    with SqliteSaver.from_conn_string(str(file)) as saver:
        yield saver


@pytest.fixture
def saver(sqlite: SqliteSaver, kms: Client) -> EncryptedSaver:
    return EncryptedSaver(sqlite, kms)


# --- what the database gets -------------------------------------------------------------------------------------------


def test_nothing_that_was_typed_is_on_the_disk(saver: EncryptedSaver, thread: str, file: Path) -> None:
    graph = conversation().compile(checkpointer=saver)
    config: RunnableConfig = {
        "configurable": {"thread_id": thread, "employee": "Ada Lovelace"},
        "metadata": {"department": "Analytical Engines"},
    }
    graph.invoke({"messages": [TYPED], "approved": False}, config)
    graph.invoke(Command(resume="yes, it is"), config)
    assert graph.get_state(config).values["messages"] == [TYPED, f"you said: {TYPED}"]
    metadata = next(saver.list(config)).metadata
    assert metadata["employee"] == "Ada Lovelace"  # type: ignore[typeddict-item]  # of the config
    stored = b"".join(each.read_bytes() for each in file.parent.glob(file.name + "*"))
    for text in (TYPED, "Ada Lovelace", "Analytical Engines", "yes, it is", "48,000"):
        assert text.encode() not in stored
    with closing(sqlite3.connect(file)) as connection:
        fields = {name for (row,) in connection.execute("SELECT metadata FROM checkpoints") for name in json.loads(row)}
    assert fields == {"source", "step", "parents", "minikms"}


def test_each_call_is_one_batch(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    counting = Counting(kms)
    saver = EncryptedSaver(sqlite, counting)  # type: ignore[arg-type]  # it has the methods of a client
    stored = put(saver, thread, 1, "a")
    assert counting.calls == ["get_or_create_dek_for_thread", "encrypt_batch"]
    counting.calls.clear()
    saver.put_writes(stored, [("a", 1), ("b", 2)], "task")
    put(saver, thread, 2, "b")
    assert counting.calls == ["encrypt_batch"] * 2
    counting.calls.clear()
    assert saver.get_tuple(stored) is not None
    assert len(list(saver.list(config_of(thread)))) == 2
    assert counting.calls == ["decrypt_batch"] * 2


def test_a_listing_filters_by_plain_fields_only(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    saver = EncryptedSaver(sqlite, kms, plain_metadata=["note"])
    put(saver, thread, 1, "a")
    put(saver, thread, 2, "b")
    assert [each.metadata["step"] for each in saver.list(config_of(thread), filter={"note": "b"})] == [2]
    with pytest.raises(NotSearchableError, match="note"):
        list(EncryptedSaver(sqlite, kms).list(config_of(thread), filter={"note": "b"}))


# --- what is refused --------------------------------------------------------------------------------------------------


def swap_channels(memory: InMemorySaver, thread: str, _: str) -> None:
    blobs = memory.blobs
    one, two = (key for key in blobs if key[0] == thread)
    blobs[one], blobs[two] = blobs[two], blobs[one]


def swap_threads(memory: InMemorySaver, thread: str, other: str) -> None:
    """All rows of both threads, as they are."""
    memory.storage[thread], memory.storage[other] = memory.storage[other], memory.storage[thread]
    for thread_id, namespace, channel, version in list(memory.blobs):
        if thread_id == thread:
            one, two = (thread, namespace, channel, version), (other, namespace, channel, version)
            memory.blobs[one], memory.blobs[two] = memory.blobs[two], memory.blobs[one]


def swap_checkpoints(memory: InMemorySaver, thread: str, _: str) -> None:
    rows = memory.storage[thread][""]
    one, two = rows
    rows[one], rows[two] = rows[two], rows[one]


def older_checkpoint(memory: InMemorySaver, thread: str, _: str) -> None:
    """The newest row holds an older checkpoint as a whole, which has no writes that would tell."""
    rows = memory.storage[thread][""]
    rows[max(rows)] = rows[min(rows)]
    for key in [key for key in memory.writes if key[0] == thread]:
        del memory.writes[key]


def older_version(memory: InMemorySaver, thread: str, _: str) -> None:
    """The newest checkpoint names the older version of its channel, whose record is intact."""
    rows = memory.storage[thread][""]
    newest = max(rows)
    checkpoint = memory.serde.loads_typed(rows[newest][0])
    checkpoint["channel_versions"]["messages"] = 1
    rows[newest] = (memory.serde.dumps_typed(checkpoint), *rows[newest][1:])


def left_out(memory: InMemorySaver, thread: str, _: str) -> None:
    del memory.blobs[(thread, "", "messages", 2)]


def altered_step(memory: InMemorySaver, thread: str, _: str) -> None:
    rows = memory.storage[thread][""]
    newest = max(rows)
    metadata = memory.serde.loads_typed(rows[newest][1])
    metadata["step"] = 7
    rows[newest] = (rows[newest][0], memory.serde.dumps_typed(metadata), rows[newest][2])


def other_parent(memory: InMemorySaver, thread: str, _: str) -> None:
    rows = memory.storage[thread][""]
    newest = max(rows)
    rows[newest] = (*rows[newest][:2], newest)


def swap_writes(memory: InMemorySaver, thread: str, _: str) -> None:
    writes = memory.writes[next(key for key in memory.writes if key[0] == thread)]
    (one, first), (two, second) = writes.items()
    writes[one], writes[two] = (*first[:2], *second[2:]), (*second[:2], *first[2:])


def repeated_write(memory: InMemorySaver, thread: str, _: str) -> None:
    writes = memory.writes[next(key for key in memory.writes if key[0] == thread)]
    writes[("task", 7)] = next(iter(writes.values()))


def plaintext_value(memory: InMemorySaver, thread: str, _: str) -> None:
    memory.blobs[(thread, "", "messages", 2)] = memory.serde.dumps_typed(["forged"])


def plaintext_row(memory: InMemorySaver, thread: str, _: str) -> None:
    put(memory, thread, 3, "forged")


Attack = Callable[[InMemorySaver, str, str], None]
MOVED: list[Attack] = [
    swap_channels,
    swap_threads,
    swap_checkpoints,
    older_checkpoint,
    older_version,
    left_out,
    altered_step,
    other_parent,
    swap_writes,
    repeated_write,
]


def prepared(kms: Client, thread: str) -> tuple[InMemorySaver, EncryptedSaver, str, str]:
    """Two threads with two checkpoints each, and two writes."""
    memory, other = InMemorySaver(), str(uuid.uuid4())
    saver = EncryptedSaver(memory, kms)
    for each in (thread, other):
        first = put(saver, each, 1, ["one"])
        second = put(saver, each, 2, ["two"], checkpoint_id=first["configurable"]["checkpoint_id"])
        saver.put_writes(second, [("a", "first"), ("b", "second")], "task")
    return memory, saver, other, second["configurable"]["checkpoint_id"]


@pytest.mark.parametrize("attack", MOVED, ids=lambda attack: attack.__name__)
def test_a_record_of_another_place_is_an_error_with_its_id(kms: Client, thread: str, attack: Attack) -> None:
    memory, saver, other, _ = prepared(kms, thread)
    before = history(saver, thread)
    untouched = copy.deepcopy((dict(memory.blobs), dict(memory.storage)))
    attack(memory, thread, other)
    with pytest.raises(WrongPlaceError, match=f"thread {thread}.*checkpoint") as refused:
        saver.get_tuple(config_of(thread))
    assert "two" not in str(refused.value)
    with pytest.raises(WrongPlaceError, match=f"thread {thread}"):
        list(saver.list(config_of(thread)))
    if attack not in (swap_writes, repeated_write, older_checkpoint):
        memory.blobs.update(untouched[0])
        memory.storage.update(untouched[1])
        assert history(saver, thread) == before


@pytest.mark.parametrize("attack", [plaintext_value, plaintext_row], ids=lambda attack: attack.__name__)
def test_a_row_in_plaintext_is_an_error_with_its_id(kms: Client, thread: str, attack: Attack) -> None:
    memory, saver, other, _ = prepared(kms, thread)
    attack(memory, thread, other)
    with pytest.raises(PlaintextRecordError, match=f"thread {thread}"):
        saver.get_tuple(config_of(thread))


def test_writes_come_in_the_order_in_which_they_were_made(kms: Client, thread: str) -> None:
    """Also where the database gives two writes of one channel in another order."""
    memory = InMemorySaver()
    saver = EncryptedSaver(memory, kms)
    stored = put(saver, thread, 1, ["one"])
    saver.put_writes(stored, [("a", "first"), ("a", "second")], "task")
    writes = memory.writes[next(iter(memory.writes))]
    writes[("task", 0)], writes[("task", 1)] = writes[("task", 1)], writes[("task", 0)]
    found = saver.get_tuple(stored)
    assert found is not None
    assert found.pending_writes == [("task", "a", "first"), ("task", "a", "second")]


# --- the life of a thread ---------------------------------------------------------------------------------------------


def test_a_deleted_thread_gives_the_receipts_of_its_keys(
    sqlite: SqliteSaver, kms: Client, daemon: LiveDaemon, thread: str, file: Path
) -> None:
    saver = EncryptedSaver(sqlite, kms)
    put(saver, thread, 1, "a")
    kept = copy_of(file)
    [receipt] = saver.delete_thread(thread)
    assert receipt.state == "destroyed"
    assert any(event["key_id"] == receipt.key_id for event in daemon.events("destroy_key"))
    assert history(saver, thread) == history(sqlite, thread) == []
    with closing(kept), pytest.raises(DestroyedRecordError, match=f"thread {thread}"):
        EncryptedSaver(SqliteSaver(kept), kms).get_tuple(config_of(thread))
    put(saver, thread, 1, "b")
    assert len(history(saver, thread)) == 1


def copy_of(file: Path) -> sqlite3.Connection:
    """A backup that somebody made."""
    kept = sqlite3.connect(":memory:", check_same_thread=False)
    with closing(sqlite3.connect(file)) as source:
        source.backup(kept)
    return kept


def test_a_deletion_that_was_cut_off_can_be_repeated(
    saver: EncryptedSaver, thread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(saver, thread, 1, "a")

    def fail(_: SqliteSaver, thread_id: str) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patched:
        patched.setattr(SqliteSaver, "delete_thread", fail)
        with pytest.raises(sqlite3.OperationalError):
            saver.delete_thread(thread)
    with pytest.raises(DestroyedRecordError):
        saver.get_tuple(config_of(thread))
    assert saver.delete_thread(thread) == []
    assert history(saver, thread) == []


def test_a_copy_outlives_the_key_of_its_source(saver: EncryptedSaver, thread: str) -> None:
    graph = conversation().compile(checkpointer=saver)
    graph.invoke({"messages": [TYPED], "approved": False}, config_of(thread))
    target = str(uuid.uuid4())
    saver.copy_thread(thread, target)
    expected = json.loads(json.dumps(history(saver, thread), default=repr).replace(thread, target))
    assert json.loads(json.dumps(history(saver, target), default=repr)) == expected
    saver.delete_thread(thread)
    assert graph.invoke(Command(resume=True), config_of(target))["approved"] is True


def test_a_pruned_thread_loses_its_keys_too(saver: EncryptedSaver, thread: str) -> None:
    put(saver, thread, 1, "a")
    kept = next(saver.list(config_of(thread)))
    saver.prune([thread], strategy="delete")
    assert history(saver, thread) == []
    assert kept.checkpoint["channel_values"] == {"messages": "a"}
    with pytest.raises(NotImplementedError):
        saver.prune([thread])


# --- a deletion beside a run ------------------------------------------------------------------------------------------


def parent_of(config: RunnableConfig) -> str:
    return str(config["configurable"]["checkpoint_id"])


@pytest.mark.parametrize("same_saver", [True, False])
@pytest.mark.parametrize("begun_anew", [True, False])
def test_a_run_does_not_bring_back_a_thread_that_was_deleted(
    sqlite: SqliteSaver, kms: Client, thread: str, same_saver: bool, begun_anew: bool
) -> None:
    """Neither where the thread already began anew, under another key."""
    saver = EncryptedSaver(sqlite, kms)
    stored = put(saver, thread, 1, "old")
    (saver if same_saver else EncryptedSaver(sqlite, kms)).delete_thread(thread)
    if begun_anew:
        put(saver, thread, 1, "new")
    before = history(saver, thread)
    child: RunnableConfig = {"configurable": {**stored["configurable"], "checkpoint_ns": "child"}}
    del child["configurable"]["checkpoint_id"]
    metadata: Any = {"source": "loop", "step": 0, "parents": {"": parent_of(stored)}}
    writes: list[Callable[[], object]] = [
        lambda: put(saver, thread, 2, "old", checkpoint_id=parent_of(stored)),
        lambda: saver.put_writes(stored, [("messages", "old")], "task"),
        lambda: saver.put(child, empty_checkpoint(), metadata, {}),
    ]
    for write in writes:
        with pytest.raises(DestroyedRecordError, match=f"thread {thread}"):
            write()
    assert history(saver, thread) == before
    assert len(before) == begun_anew


def test_a_run_ends_at_the_deletion_of_its_thread(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    saver = EncryptedSaver(sqlite, kms)

    def delete(state: State) -> dict[str, Any]:
        if state["messages"][-1] == "delete":
            EncryptedSaver(sqlite, kms).delete_thread(thread)
        return {"messages": ["done"]}

    graph = StateGraph(State).add_node(delete).add_edge(START, "delete").compile(checkpointer=saver)
    graph.invoke({"messages": [TYPED], "approved": False}, config_of(thread))
    with pytest.raises(DestroyedRecordError):
        graph.invoke({"messages": ["delete"], "approved": False}, config_of(thread))
    assert graph.get_state(config_of(thread)).values == {}
    graph.invoke({"messages": ["new"], "approved": False}, config_of(thread))
    assert graph.get_state(config_of(thread)).values["messages"] == ["new", "done"]


def test_a_run_goes_on_after_its_key_was_replaced(saver: EncryptedSaver, kms: Client, thread: str) -> None:
    stored = put(saver, thread, 1, "one")
    for version in (2, 3):
        old = kms.get_or_create_dek_for_thread(f"langgraph.{thread}", purpose="data").key_id
        kms.create_dek_for_thread(f"langgraph.{thread}", replaces=old, purpose="data")
        saver.put_writes(stored, [("messages", "a write")], "task")
        put(saver, thread, version, "next", checkpoint_id=parent_of(stored))
    assert len(history(saver, thread)) == 3


def test_a_key_that_a_write_makes_during_a_deletion_is_destroyed(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    class Writing(Counting):
        """Puts a checkpoint between the retirement and the destruction of a key."""

        def destroy_key(self, key_id: str) -> Any:
            if not self.calls:
                self.calls.append("put")
                put(writer, thread, 2, "old", checkpoint_id=parent_of(stored))
            return kms.destroy_key(key_id)

        def __getattr__(self, name: str) -> Any:
            return getattr(kms, name)

    writer = EncryptedSaver(sqlite, kms)
    stored = put(writer, thread, 1, "old")
    receipts = EncryptedSaver(sqlite, Writing(kms)).delete_thread(thread)  # type: ignore[arg-type]  # as a client
    assert len(receipts) == 2
    assert history(writer, thread) == []


# --- delta channels ---------------------------------------------------------------------------------------------------


def _append(state: list[str], writes: list[list[str]]) -> list[str]:
    return (state or []) + [each for write in writes for each in write]


class Delta(TypedDict):
    messages: Annotated[list[str], DeltaChannel(_append, snapshot_frequency=5)]


def _echo(state: Delta) -> dict[str, Any]:
    return {"messages": [f"echo {state['messages'][-1]}"]}


def delta_graph(saver: BaseCheckpointSaver[Any]) -> Any:
    graph = StateGraph(Delta)
    graph.add_node("echo", _echo)
    graph.add_edge(START, "echo")
    return graph.compile(checkpointer=saver)


@pytest.mark.parametrize("turns", [1, 2, 3, 7])
def test_delta_channels_have_the_values_of_the_inner_saver(sqlite: SqliteSaver, kms: Client, turns: int) -> None:
    states = []
    for saver in (sqlite, EncryptedSaver(sqlite, kms)):
        thread = str(uuid.uuid4())
        for turn in range(turns):
            delta_graph(saver).invoke({"messages": [f"turn {turn}"]}, config_of(thread))
        snapshots = [each.values.get("messages") for each in delta_graph(saver).get_state_history(config_of(thread))]
        states.append(snapshots)
    assert states[0] == states[1]
    assert len(states[0][0]) == 2 * turns


def test_a_history_without_one_of_its_checkpoints_is_an_error(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    saver = EncryptedSaver(sqlite, kms)
    for turn in range(2):
        delta_graph(saver).invoke({"messages": [f"turn {turn}"]}, config_of(thread))
    rows = list(sqlite.list(config_of(thread)))
    with sqlite.cursor() as cursor:
        cursor.execute("DELETE FROM checkpoints WHERE checkpoint_id = ?", (rows[3].checkpoint["id"],))
    with pytest.raises(RecordError, match=f"thread {thread}"):
        delta_graph(saver).get_state(config_of(thread))


def test_a_history_whose_parents_form_a_cycle_has_an_end(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    saver = EncryptedSaver(sqlite, kms)

    def put_empty(checkpoint_id: str, parent: RunnableConfig) -> RunnableConfig:
        return saver.put(parent, {**empty_checkpoint(), "id": checkpoint_id}, {}, {})

    first = put_empty("1", config_of(thread))
    second = put_empty("2", first)
    with sqlite.cursor() as cursor:
        cursor.execute("UPDATE checkpoints SET parent_checkpoint_id = '2' WHERE checkpoint_id = '1'")
    with pytest.raises(WrongPlaceError, match=f"thread {thread}"):
        saver.get_delta_channel_history(config=second, channels=["messages"])
    put_empty("1", second)
    assert saver.get_delta_channel_history(config=second, channels=["messages"]) == {"messages": {"writes": []}}
