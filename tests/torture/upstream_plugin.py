"""A plugin of pytest for the frameworks' own tests: their SQLite savers and sessions become encrypted ones.

The socket of the key service is in the environment variable `UPSTREAM_KMS`. Loaded as a module of its own, since the
frameworks' tests are a package `tests` too.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import agents
import pytest
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from minikms import AsyncClient, Client
from minikms_adapters.langgraph import EncryptedSaver
from minikms_adapters.openai_agents import EncryptedSession

KMS = os.environ["UPSTREAM_KMS"]
plain_session = agents.SQLiteSession
plain_saver = SqliteSaver.from_conn_string
plain_async_saver = AsyncSqliteSaver.from_conn_string


class SQLiteSession(EncryptedSession):
    def __init__(self, session_id: str, *args: Any, **kwargs: Any) -> None:
        self._kms = Client(KMS)
        self._plain = plain_session(session_id, *args, **kwargs)
        super().__init__(session_id, self._plain, self._kms)

    def close(self) -> None:
        self._plain.close()
        self._kms.close()

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_lock", "_connections")):
            pytest.skip(f"the test is about {name}, which is private to the SDK's session")
        raise AttributeError(name)


@contextmanager
def saver(connection: str) -> Iterator[EncryptedSaver]:
    with Client(KMS) as kms, plain_saver(connection) as inner:
        yield EncryptedSaver(inner, kms)


@asynccontextmanager
async def async_saver(connection: str) -> AsyncIterator[EncryptedSaver]:
    async with AsyncClient(KMS) as kms, plain_async_saver(connection) as inner:
        yield EncryptedSaver(inner, kms)


patch = pytest.MonkeyPatch()  # for the whole run, and before its modules are imported
patch.setattr(agents, "SQLiteSession", SQLiteSession)
patch.setattr(SqliteSaver, "from_conn_string", saver)
patch.setattr(AsyncSqliteSaver, "from_conn_string", async_saver)
