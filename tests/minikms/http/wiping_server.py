"""A process of its own for test_http_memory: serves the engine, and reads each body in place without a copy.

Owns: nothing but the handler. `/copy` keeps a copy of the body, so that the test can show that it finds one.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop

from minikms.http import HttpRequest, HttpServer, ParsedHead, Response

KEPT: list[bytes] = []


class InPlace:
    """Answers the sum of the body's bytes."""

    def open_session(self, sock: Any, tls: Any, link: Any) -> InPlace:
        return self

    def group(self, session: InPlace) -> str:
        return ""

    def may_stay(self, session: InPlace) -> bool:
        return True

    def admit(self, session: InPlace, head: ParsedHead) -> Response | None:
        return None

    def handle(self, session: InPlace, request: HttpRequest) -> bytes:
        if request.path == "/copy":
            KEPT.append(bytes(request.body))
        return b"%d" % sum(request.body)

    def refused(self, session: InPlace | None, status: int, code: str) -> None: ...

    def commit(self) -> bool:
        return True

    def close_session(self, session: InPlace) -> None: ...


async def main(path: str) -> None:
    loop = asyncio.get_running_loop()
    server = HttpServer(InPlace(), loop=loop, on_internal_error=print)
    await loop.create_unix_server(server.protocol_factory, path)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
