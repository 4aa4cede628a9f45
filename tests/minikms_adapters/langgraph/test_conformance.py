"""LangGraph's own conformance suite passes around each saver, in all that the inner saver can do."""

import asyncio
from collections.abc import AsyncGenerator, Iterator

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import validate
from langgraph.checkpoint.conformance.initializer import RegisteredCheckpointer
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from minikms import AsyncClient, Client
from minikms_adapters.langgraph import EncryptedSaver
from tests.harness import postgres
from tests.harness.live_daemon import LiveDaemon

PLAIN = {"score"}
"""The suite filters by this field of its own."""
BASE = {"put", "put_writes", "get_tuple", "list", "delete_thread", "copy_thread"}


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgres.running() as (address, _):
        yield address


def passed(make: RegisteredCheckpointer, capabilities: set[str]) -> None:
    report = asyncio.run(validate(make, capabilities=capabilities))
    assert {name: found.failures for name, found in report.results.items() if found.failures} == {}
    assert {name for name, found in report.results.items() if found.passed} == capabilities


def test_around_the_saver_in_memory(daemon: LiveDaemon) -> None:
    async def make() -> AsyncGenerator[BaseCheckpointSaver[str], None]:
        async with AsyncClient(daemon.socket) as kms:
            yield EncryptedSaver(InMemorySaver(), kms, plain_metadata=PLAIN)

    passed(RegisteredCheckpointer("memory", make), BASE)


def test_around_sqlite(kms: Client) -> None:
    async def make() -> AsyncGenerator[BaseCheckpointSaver[str], None]:
        async with AsyncSqliteSaver.from_conn_string(":memory:") as inner:
            yield EncryptedSaver(inner, kms, plain_metadata=PLAIN)

    passed(RegisteredCheckpointer("sqlite", make), BASE)


def test_around_postgresql(kms: Client, database: str) -> None:
    async def make() -> AsyncGenerator[BaseCheckpointSaver[str], None]:
        async with AsyncPostgresSaver.from_conn_string(database) as inner:
            await inner.setup()
            yield EncryptedSaver(inner, kms, plain_metadata=PLAIN)

    passed(RegisteredCheckpointer("postgresql", make), BASE | {"prune"})
