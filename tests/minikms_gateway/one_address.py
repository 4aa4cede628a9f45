"""Processes of test_shares_of_addresses: the attacks of one address, and a proxy with a delay in place of a network.

Owns: no more than that. `python -m tests.minikms_gateway.one_address NAME PORT`: the first line says that it has begun.
The proxy listens on a port of its own, which that line names, and comes from another address than the attacks.
"""

import asyncio
import contextlib
import resource
import ssl
import sys
from collections import deque

ATTACKER, CLIENTS = "127.0.0.1", "127.0.0.2"
DELAY_SECONDS = 0.1
"""Of each byte, in each direction."""
AT_ONCE = 64
"""Connections that an attack opens at the same time."""
OPEN_COUNT_MAX = 3000

ANY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
ANY.check_hostname = False
ANY.verify_mode = ssl.CERT_NONE

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def begin(port: int) -> Streams:
    """A handshake that never ends."""
    return await asyncio.open_connection(ATTACKER, port, local_addr=(ATTACKER, 0))


async def show_nothing(port: int) -> Streams:
    """A connection without certificate or token."""
    return await asyncio.open_connection(ATTACKER, port, local_addr=(ATTACKER, 0), ssl=ANY)


async def attack(kind: str, port: int) -> None:
    """Opens connections as fast as it can. Each stays open until the gateway closes it."""
    connect = {"handshakes": begin, "connections": show_nothing}[kind]
    opened: deque[asyncio.StreamWriter] = deque()

    async def repeat() -> None:
        while True:
            with contextlib.suppress(OSError):
                opened.append((await connect(port))[1])
            if len(opened) > OPEN_COUNT_MAX:
                opened.popleft().transport.abort()

    print("attacks", flush=True)
    await asyncio.gather(*(repeat() for _ in range(AT_ONCE)))


async def proxy(port: int) -> None:
    loop = asyncio.get_running_loop()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        part = b"."
        with contextlib.suppress(OSError):
            while part:
                part = await reader.read(65536)
                if part:
                    loop.call_later(DELAY_SECONDS, writer.write, part)
            loop.call_later(DELAY_SECONDS, writer.close)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            further = await asyncio.open_connection(ATTACKER, port, local_addr=(CLIENTS, 0))
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(forward(reader, further[1]), forward(further[0], writer))

    server = await asyncio.start_server(serve, CLIENTS, 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    name, number = sys.argv[1], int(sys.argv[2])
    asyncio.run(proxy(number) if name == "proxy" else attack(name, number))
