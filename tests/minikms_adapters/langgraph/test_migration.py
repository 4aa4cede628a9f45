"""Migrations: what is cut off goes on, what can't be read is named, and the exchanges are those of pages."""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from minikms import Client
from minikms_adapters import MigrationError
from minikms_adapters.langgraph import EncryptedSaver
from minikms_adapters.langgraph.saver import PAGE_CHECKPOINTS, STAGING_SUFFIX
from tests.minikms_adapters.langgraph.conftest import TYPED, config_of, conversation, history, put
from tests.minikms_adapters.test_records import Counting


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[SqliteSaver]:
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
        yield saver


def values(saver: BaseCheckpointSaver[Any], thread: str) -> list[Any]:
    """Those of `put`, newest first."""
    return [each[1]["channel_values"]["messages"] for each in history(saver, thread)]


class CutOff(Exception):
    """What ends a migration at one of its steps."""


class Fragile(SqliteSaver):
    """A saver that fails at the call `left` after the first one that writes."""

    def __init__(self, inner: SqliteSaver, left: int) -> None:
        super().__init__(inner.conn, serde=inner.serde)
        self.lock = inner.lock
        self._calls = iter(range(left))

    def _count(self) -> None:
        if next(self._calls, None) is None:
            raise CutOff

    def put(self, *args: Any) -> RunnableConfig:
        self._count()
        return super().put(*args)

    def put_writes(self, *args: Any) -> None:
        self._count()
        super().put_writes(*args)

    def delete_thread(self, thread_id: str) -> None:
        self._count()
        super().delete_thread(thread_id)


def plain_thread(sqlite: SqliteSaver, thread: str) -> list[Any]:
    graph = conversation().compile(checkpointer=sqlite)
    graph.invoke({"messages": [TYPED], "approved": False}, config_of(thread))
    stored = next(sqlite.list(config_of(thread))).config
    sqlite.put_writes(stored, [("z", 1), ("a", 2)], "0-last", "~path-b")
    sqlite.put_writes(stored, [("a", 3)], "9-first", "~path-a")
    return history(sqlite, thread)


def test_a_migration_that_is_cut_off_anywhere_goes_on(kms: Client, tmp_path: Path) -> None:
    cuts = 0
    while True:
        thread = str(uuid.uuid4())
        with SqliteSaver.from_conn_string(str(tmp_path / f"{cuts}.sqlite")) as sqlite:
            before = plain_thread(sqlite, thread)
            try:
                EncryptedSaver(Fragile(sqlite, cuts), kms).migrate()
            except CutOff:
                finished = False
            else:
                finished = True
            saver = EncryptedSaver(sqlite, kms)
            assert saver.migrate() == (0 if finished else 1)
            assert history(saver, thread) == before
            assert history(sqlite, thread + STAGING_SUFFIX) == []
            assert saver.migrate() == 0
        if finished:
            break
        cuts += 1
    assert cuts > 10


def test_a_migration_leaves_a_retired_key_without_records(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    saver = EncryptedSaver(sqlite, kms)
    put(saver, thread, 1, "a")
    old = kms.get_or_create_dek_for_thread(f"langgraph.{thread}", purpose="data").key_id
    kms.create_dek_for_thread(f"langgraph.{thread}", replaces=old, purpose="data")
    put(saver, thread, 2, "b")
    before = history(saver, thread)
    assert saver.migrate() == 1
    kms.destroy_key(old)
    assert history(saver, thread) == before


def test_a_thread_with_the_name_of_a_staging_thread_is_migrated(sqlite: SqliteSaver, kms: Client) -> None:
    """In plaintext or not, it is kept; the thread whose staging thread it would be is not rewritten."""
    saver = EncryptedSaver(sqlite, kms)
    for inner in (sqlite, saver):
        thread = str(uuid.uuid4())
        put(inner, thread + STAGING_SUFFIX, 1, "real")
        assert saver.migrate() == (inner is sqlite)
        put(sqlite, thread, 1, "plain")
        with pytest.raises(MigrationError, match=thread) as refused:
            saver.migrate()
        assert [*refused.value.failed] == [thread]
        assert values(saver, thread + STAGING_SUFFIX) == ["real"]
        assert values(sqlite, thread) == ["plain"]
        sqlite.delete_thread(thread)


def test_a_staging_thread_goes_whose_thread_is_complete(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    plain_thread(sqlite, thread)
    with pytest.raises(CutOff):
        EncryptedSaver(Fragile(sqlite, 2), kms).migrate()
    saver = EncryptedSaver(sqlite, kms)
    assert history(sqlite, thread + STAGING_SUFFIX) != []
    sqlite.delete_thread(thread)
    put(saver, thread, 1, "new")
    assert saver.migrate() == 0
    assert history(sqlite, thread + STAGING_SUFFIX) == []
    assert len(history(saver, thread)) == 1


def test_a_migration_goes_on_after_threads_that_can_not_be_read(sqlite: SqliteSaver, kms: Client) -> None:
    saver = EncryptedSaver(sqlite, kms)
    threads = [f"{name}-{uuid.uuid4()}" for name in ("1-altered", "2-destroyed", "3-malformed", "4-whole")]
    for thread in threads:
        put(saver, thread, 1, "one")
        put(sqlite, thread, 2, "two")
    for key in kms.list_keys(thread_id=f"langgraph.{threads[1]}").keys:
        kms.retire_key(key.key_id)
        kms.destroy_key(key.key_id)
    with sqlite.cursor() as cursor:
        cursor.execute("UPDATE checkpoints SET checkpoint = ? WHERE thread_id = ?", (b"\xc1", threads[2]))
        sealed, change = "instr(metadata, 'minikms')", "replace(metadata, 'minikms', 'other')"
        cursor.execute(f"UPDATE checkpoints SET metadata = {change} WHERE thread_id = ? AND {sealed}", (threads[0],))
    with pytest.raises(MigrationError, match="3 threads can't be read") as refused:
        saver.migrate()
    assert [*refused.value.failed] == threads[:3]
    assert refused.value.rewritten == 1
    assert values(saver, threads[3]) == ["two", "one"]


def test_the_exchanges_of_a_migration_are_those_of_pages(sqlite: SqliteSaver, kms: Client, thread: str) -> None:
    counting, pages = Counting(kms), 3
    for number in range(pages * PAGE_CHECKPOINTS):
        sqlite.put_writes(put(sqlite, thread, number, number), [("messages", "write")], "task")
    saver = EncryptedSaver(sqlite, counting)  # type: ignore[arg-type]  # it has the methods of a client
    assert saver.migrate() == 1
    assert counting.calls.count("encrypt_batch") == 2 * pages
    assert counting.calls.count("decrypt_batch") == 2 * pages
    assert len(counting.calls) == 4 * pages + 1
    assert values(saver, thread) == [*reversed(range(pages * PAGE_CHECKPOINTS))]


def test_an_asynchronous_migration_does_the_same(kms: Client, thread: str, tmp_path: Path) -> None:
    file = str(tmp_path / "asynchronous.sqlite")
    with SqliteSaver.from_conn_string(file) as sqlite:
        before = plain_thread(sqlite, thread)

    async def migrate() -> tuple[int, list[Any]]:
        async with AsyncSqliteSaver.from_conn_string(file) as inner:
            saver = EncryptedSaver(inner, kms)
            rewritten = await saver.amigrate()
            return rewritten, [each.checkpoint async for each in saver.alist(config_of(thread))]

    assert asyncio.run(migrate()) == (1, [each[1] for each in before])
    with SqliteSaver.from_conn_string(file) as sqlite:
        assert history(EncryptedSaver(sqlite, kms), thread) == before
