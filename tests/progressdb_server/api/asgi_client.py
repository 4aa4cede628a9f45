"""Calls an ASGI application in this process: one request, one answer, no socket.

`Api` holds one application over a fresh store, in memory or in PostgreSQL, with a key for each role and a clock that
the test moves.
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec
from prometheus_client import CollectorRegistry

from progressdb_server.api.application import MessageApplication
from progressdb_server.api.gate.access import AccessControl
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.config import ApiKeys, RateLimit, Security
from progressdb_server.http.asgi import BODY_REFUSED
from tests.progressdb_server.api.tested_store import TestedStore

BACKEND, FRONTEND, ADMIN = "backend-key-1", "frontend-key-1", "admin-key-1"
OTHER_BACKEND = "backend-key-2"
KEYS = ApiKeys(backend=(BACKEND, OTHER_BACKEND), frontend=(FRONTEND,), admin=(ADMIN,))
SECURITY = Security(api_keys=KEYS, rate_limit=RateLimit(rps=0))


def signature(user: str, key: str = BACKEND) -> str:
    """As the contract says it, not as the code does it."""
    return hmac.new(key.encode(), user.encode(), hashlib.sha256).hexdigest()


def signed(user: str, key: str = BACKEND) -> dict[str, str]:
    return {"X-User-ID": user, "X-User-Signature": signature(user, key)}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    finished: bool

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json", self
        return json.loads(self.body)

    @property
    def error(self) -> str:
        assert list(self.json) == ["error"], self
        return str(self.json["error"])


class Api:
    def __init__(self, security: Security = SECURITY, proxies: tuple[str, ...] = (), **replaced: Any) -> None:
        self.store = TestedStore.opened()
        self.now_s = 1000.0
        self.security = msgspec.structs.replace(security, **replaced)
        self.metrics = ApiMetrics(CollectorRegistry())
        access = AccessControl(self.security, proxies)
        self.application = MessageApplication(self.store, access, self.metrics, clock=lambda: self.now_s)

    def __call__(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        key: str | None = BACKEND,
        headers: Mapping[str, str] | list[tuple[str, str]] = {},  # noqa: B006 - never changed
        raw: bytes | None = None,
        chunks: list[bytes] | None = None,
        client: str = "127.0.0.1",
        refused: bool = False,
    ) -> Reply:
        """`body` as JSON, or `raw` bytes, or a body in `chunks` (without its length in a header); or one that the
        server's protocol refused."""
        sent = self.send(
            method, target, body, key=key, headers=headers, raw=raw, chunks=chunks, client=client, refused=refused
        )
        return asyncio.run(sent) if self.store.memory is not None else self.store.loop.run_until_complete(sent)

    async def send(
        self,
        method: str,
        target: str,
        body: object = None,
        *,
        key: str | None = BACKEND,
        headers: Mapping[str, str] | list[tuple[str, str]] = {},  # noqa: B006 - never changed
        raw: bytes | None = None,
        chunks: list[bytes] | None = None,
        client: str = "127.0.0.1",
        refused: bool = False,
    ) -> Reply:
        path, _, query = target.partition("?")
        pairs = list(headers.items()) if isinstance(headers, Mapping) else list(headers)
        if key is not None:
            pairs.append(("X-API-Key", key))
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        if chunks is None:
            chunks = [data]
            if data:
                pairs.append(("Content-Length", str(len(data))))
        scope = {
            "type": "http",
            "method": method,
            "path": unquote(path),
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("utf-8", "surrogateescape")) for name, value in pairs],
            "client": (client, 4711),
        }
        waiting = list(chunks)
        forever = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if refused:
                return {"type": BODY_REFUSED}
            if not waiting:
                await forever.wait()
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting)}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        await self.application(scope, receive, send)
        start, *parts = sent
        assert [message["type"] for message in sent] == ["http.response.start"] + ["http.response.body"] * len(parts)
        names = [name for name, _ in start["headers"]]
        assert len(names) == len(set(names)), f"an answer repeats a header: {names}"
        return Reply(
            status=start["status"],
            headers={name.decode(): value.decode() for name, value in start["headers"]},
            body=b"".join(part.get("body", b"") for part in parts),
            finished=bool(parts) and not parts[-1].get("more_body", False),
        )

    # --- what many tests begin with -----------------------------------------------------------------------------
    def thread(self, author: str = "alice", title: str = "General") -> str:
        return str(self("POST", "/v1/threads", {"title": title, "author": author}).json["id"])

    def message(self, author: str = "alice", thread: str = "", body: object = "hello") -> Any:
        return self("POST", "/v1/messages", {"thread": thread, "author": author, "body": body}).json
