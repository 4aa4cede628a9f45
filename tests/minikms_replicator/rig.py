"""Replicators in the test's process, each with a fake member, on one PostgreSQL.

Owns: the database with its tables, and the loops as the process runs them.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import asyncpg

from minikms.processes.helper import HelperRun
from minikms_replicator import process, tables
from minikms_replicator.config import Config, DatabaseConfig
from tests.minikms_replicator.fake_member import Member

ROLE = "replicator"


async def fresh(url: str) -> str:
    """The URL of the replicators' role, with empty tables."""
    connection = await asyncpg.connect(url)
    try:
        for table in ("kms_schema", "kms_head", "kms_file", "kms_tombstone", "kms_member"):
            await connection.execute(f"DROP TABLE IF EXISTS {table}")
        if not await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", ROLE):
            await connection.execute(f"CREATE ROLE {ROLE} LOGIN")
    finally:
        await connection.close()
    await tables.init(url, ROLE)
    return url.replace("//test@", f"//{ROLE}@")


class _Unused:
    """In the place of what the service manager and the log get."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@contextlib.asynccontextmanager
async def replicating(
    url: str, *members: Member, single_node: bool = True
) -> AsyncIterator[Sequence[asyncio.Task[None]]]:
    """The loops of a replicator for each member."""
    unused: Any = _Unused()
    tasks = []
    for member in members:
        config = Config(1, "/nowhere", DatabaseConfig(url, single_node))
        replicator = process.Replicator(config, HelperRun(unused, unused, unused), daemon=member)
        tasks.append(asyncio.ensure_future(replicator.work()))
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
