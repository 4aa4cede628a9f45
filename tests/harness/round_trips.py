"""Between a client and a PostgreSQL on a Unix socket: counts the requests for whose answer the client waits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

PORT_NAME = ".s.PGSQL.5432"


class RoundTrips:
    def __init__(self) -> None:
        self.count = 0

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """From the client. The first message has no type."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError), contextlib.closing(writer):
            head = await reader.readexactly(4)
            while True:
                length = int.from_bytes(head[-4:]) - 4
                writer.write(head + await reader.readexactly(length))
                self.count += head[:1] in (b"S", b"Q") and len(head) == 5
                head = await reader.readexactly(5)


@asynccontextmanager
async def counted(real: Path, directory: Path) -> AsyncIterator[RoundTrips]:
    """A socket in `directory` that leads to the one in `real`."""
    found = RoundTrips()
    tasks: set[asyncio.Task[None]] = set()

    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while data := await reader.read(65536):
                writer.write(data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(real / PORT_NAME)
        tasks.add(asyncio.ensure_future(back(from_server, writer)))
        await found.forward(reader, to_server)

    server = await asyncio.start_unix_server(serve, directory / PORT_NAME)
    try:
        yield found
    finally:
        server.close()
