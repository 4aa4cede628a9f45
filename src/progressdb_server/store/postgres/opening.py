"""Opening a store in PostgreSQL for a server."""

from __future__ import annotations

import asyncio
from typing import Final

import asyncpg

from minikms.processes.postgresql import FAILURES, NodeConnection
from progressdb_server.store.engine import EngineUnavailableError
from progressdb_server.store.model import FormatError, StoreUnavailableError
from progressdb_server.store.postgres.engine import PostgresEngine, counters
from progressdb_server.store.postgres.nodes import UNAVAILABLE, Nodes
from progressdb_server.store.postgres.reads import READ_S_MAX
from progressdb_server.store.postgres.tables import COUNTED, ONE_DISK, SCHEMA, number_of, other_schema
from progressdb_server.store.postgres.writer import keep_lease

READ_CONNECTIONS_MAX: Final = 8
START_S_MAX: Final = 30.0
"""The time for the first lease of a server that starts."""
START_POLL_S: Final = 0.1


async def open_engine(url: str, *, single_node: bool, make: bool = False) -> PostgresEngine:
    """Opens the engine. Raises FormatError for tables of another version, and StoreUnavailableError, also for a
    database that would acknowledge what one disk alone has, unless `single_node` says that this is enough.
    """
    nodes = Nodes(url, replicated=not single_node)
    connection = await nodes.find()
    try:
        async with asyncio.timeout(READ_S_MAX):
            number = await number_of(connection)
            if number != SCHEMA:
                raise FormatError(other_schema(number))
            if not nodes.waits_for_standbys(connection):
                raise StoreUnavailableError(ONE_DISK)  # Patroni may be about to name a standby
            counted = counters(await connection.fetch(COUNTED))
    except FAILURES as error:
        raise EngineUnavailableError(UNAVAILABLE) from error
    finally:
        connection.terminate()
    leasing = asyncio.get_running_loop().create_task(keep_lease(nodes)) if nodes.is_due else None

    async def connect(*_: object, **__: object) -> NodeConnection:
        return await nodes.again(statement_timeout=str(READ_S_MAX * 1000))

    try:
        async with asyncio.timeout(START_S_MAX):
            while leasing is not None and not await nodes.settled(nodes.node or ""):  # noqa: ASYNC110  the lease is kept there
                await asyncio.sleep(START_POLL_S)
            pool = await asyncpg.create_pool(
                url, min_size=1, max_size=READ_CONNECTIONS_MAX, connection_class=NodeConnection, connect=connect
            )
    except BaseException as error:
        if leasing is not None:
            leasing.cancel()
        if isinstance(error, FAILURES):
            raise EngineUnavailableError(UNAVAILABLE) from error
        raise
    return PostgresEngine(nodes, pool, counted, leasing)
