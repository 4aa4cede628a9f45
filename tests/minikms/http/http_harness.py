"""An application, a server and a byte-level client for the tests of the HTTP engine.

Owns: no test. `EchoApp` answers what it was given, so that a test sees what the engine understood; `Peer` sends bytes
as they are, well-formed or not. Everything runs in one uvloop loop over a Unix socket.
"""

import asyncio
import contextlib
import hashlib
import json
import pickle
import re
import tempfile
from collections.abc import AsyncIterator, Awaitable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import uvloop

from minikms.api.errors import ConflictError, UnauthorizedError
from minikms.http import LIMITS, GroupFull, HttpRequest, HttpServer, Limits, Link, ParsedHead, Response, parse_query
from minikms.http.limits import RefusedError
from minikms.http.reader import RequestReader, Shared

T = TypeVar("T")


@dataclass
class Session:
    """One connection as the application sees it."""

    number: int
    link: Link
    closed: bool = False
    moved: bool = False
    """To a group of its own."""


@dataclass
class EchoApp:
    """An application whose behaviour is chosen by the path."""

    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    refusals: list[tuple[int, str]] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    commits: int = 0
    commit_succeeds: bool = True
    accepts: bool = True
    groups: int = 1
    places: int = 2**16
    dismissed: set[int] = field(default_factory=set)
    admitted: list[str] = field(default_factory=list)
    running: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    kept: Any = None

    def open_session(self, sock: Any, tls: Any, link: Link) -> Session | GroupFull | None:
        if not self.accepts:
            return None
        if sum(not session.closed for session in self.sessions) >= self.places:
            return GroupFull(0)
        self.sessions.append(Session(len(self.sessions), link))
        return self.sessions[-1]

    def group(self, session: Session) -> int:
        return ~session.number if session.moved else session.number % self.groups

    def may_stay(self, session: Session) -> bool:
        return session.number not in self.dismissed

    def admit(self, session: Session, head: ParsedHead) -> Response | None:
        self.admitted.append(head.path)
        if head.path == "/refused":
            return Response(401, b'{"error":"no","code":"unauthorized"}')
        return None

    def handle(self, session: Session, request: HttpRequest) -> bytes | Response | Awaitable[bytes | Response]:
        body = bytes(request.body)
        self.seen.append((request.method, request.path, body))
        match request.path:
            case "/move":
                session.moved = True
                session.link.regroup()
            case "/move-later":
                return self._move(session, echo(request, body))
            case "/later" | "/hold" | "/later-raise" | "/later-crash":
                return self._later(request.path, echo(request, body))
            case "/raise":
                raise ConflictError("Two things can't both be.")
            case "/unauthorized":
                raise UnauthorizedError("Not you.")
            case "/crash":
                raise ValueError("internal-text-0451")
            case "/large":
                return b"x" * int(parse_query(request.query)["bytes"])
            case "/large-text":
                return Response(200, b"x" * int(parse_query(request.query)["bytes"]), content_type="text/plain")
            case "/response":
                return Response(202, b"accepted", content_type="text/plain", headers=(("x-extra", "1"),))
            case "/uncommitted":
                return Response(200, echo(request, body), uncommitted=True)
            case "/close":
                return Response(401, b"{}", close=True)
            case "/split-header":
                return Response(200, b"{}", headers=(("x-bad", "a\r\nset-cookie: b"),))
            case "/keep-view":
                self.kept = request.body
            case "/keep-export":
                self.kept = pickle.PickleBuffer(request.body)
        return echo(request, body)

    async def _move(self, session: Session, answer: bytes) -> bytes:
        await self.release.wait()
        session.moved = True
        session.link.regroup()
        return answer

    async def _later(self, path: str, answer: bytes) -> bytes:
        self.running += 1
        try:
            if path == "/hold":
                await self.release.wait()
            else:
                await asyncio.sleep(0.001)
        finally:
            self.running -= 1
        if path == "/later-raise":
            raise ConflictError("Two things can't both be.")
        if path == "/later-crash":
            raise ValueError("internal-text-0451")
        return answer

    def refused(self, session: Session | None, status: int, code: str) -> None:
        self.refusals.append((status, code))

    def commit(self) -> bool:
        self.commits += 1
        return self.commit_succeeds

    def close_session(self, session: Session) -> None:
        session.closed = True


def echo(request: HttpRequest, body: bytes) -> bytes:
    """What the engine understood, as JSON."""
    return json.dumps(
        {
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "request_id": request.request_id,
            "content_type": request.head.content_type,
            "length": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
    ).encode()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """A client that sends bytes as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @property
    def transport(self) -> asyncio.Transport:
        return cast(asyncio.Transport, self.writer.transport)  # it also reads; uvloop's is no subclass

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def send_parts(self, *parts: bytes) -> None:
        """Send each part so that the server receives it on its own, until the server has closed."""
        for part in parts:
            if self.writer.is_closing():
                return
            self.writer.write(part)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def answer(self, *, head_only: bool = False) -> Answer:
        async with asyncio.timeout(60):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            lines = head.split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:-2])
            length = 0 if head_only else int(headers.get("content-length", "0"))
            body = await self.reader.readexactly(length)
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        return Answer(int(status), headers, body)

    async def rest(self) -> bytes:
        """All bytes until the server closes."""
        async with asyncio.timeout(60):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@dataclass
class Running:
    """A server in the running loop, and how to reach it."""

    path: str
    app: EchoApp
    http: HttpServer[Session]
    listener: asyncio.AbstractServer
    internal_errors: list[str]

    async def peer(self) -> Peer:
        return Peer(*await asyncio.open_unix_connection(self.path, limit=1 << 25))

    async def exchange(self, data: bytes) -> list[Answer]:
        """Send `data` on a new connection, close that side, and return all answers."""
        peer = await self.peer()
        peer.send(data)
        peer.writer.write_eof()
        answers = parse_answers(await peer.rest())
        await peer.close()
        return answers


class StillLoop:
    """The event loop for a server whose clock stands until the test moves it: no limit ends on a slow machine."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._now_s = self._loop.time()

    def time(self) -> float:
        return self._now_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    async def move(self, seconds: float, limits: Limits) -> None:
        """Moves the clock, and returns when the server has compared it with its deadlines."""
        self._now_s += seconds
        await asyncio.sleep(3 * limits.sweep_seconds)


@contextlib.asynccontextmanager
async def serving(limits: Limits = LIMITS, clock: StillLoop | None = None) -> AsyncIterator[Running]:
    """Serve an `EchoApp` on a Unix socket. At the end nothing may be left over: no connection, no byte, no error."""
    loop = asyncio.get_running_loop()
    app = EchoApp()
    internal_errors: list[str] = []
    stray: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: stray.append(context))
    http = HttpServer(app, loop=cast(Any, clock or loop), on_internal_error=internal_errors.append, limits=limits)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        listener = await loop.create_unix_server(http.protocol_factory, path, backlog=512)
        try:
            yield Running(path, app, http, listener, internal_errors)
        finally:
            listener.close()
            http.loop = loop
            for _ in range(3):  # what the test's peers have closed is noticed without waiting for a poll of `drain`
                await asyncio.sleep(0)
            await http.drain(0.1)
    assert stray == []
    assert http.connections == set()
    assert (http.shared.budget.bytes_held, http.unread) == (0, 0)
    assert is_zero(http.shared.data)
    assert all(session.closed for session in app.sessions)


def run(coroutine: Coroutine[Any, Any, T], seconds_max: float = 120) -> T:
    """Run a test's coroutine in a uvloop loop."""

    async def bounded() -> T:
        async with asyncio.timeout(seconds_max):
            return await coroutine

    return uvloop.run(bounded())


_DATE = re.compile(rb"date: [^\r]*\r\n")


def undated(data: bytes) -> bytes:
    """Answers without the one header that changes by itself."""
    return _DATE.sub(b"", data)


def parse_answers(data: bytes) -> list[Answer]:
    """All answers in `data`, which must consist of whole ones (none of them to HEAD)."""
    answers = []
    while data:
        head, separator, data = data.partition(b"\r\n\r\n")
        assert separator, f"an answer is cut: {head!r}"
        lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:])
        length = int(headers.get("content-length", "0"))
        assert len(data) >= length
        answers.append(Answer(int(lines[0].split(" ")[1]), headers, data[:length]))
        data = data[length:]
    return answers


def get(path: str, *headers: str) -> bytes:
    return request("GET", path, *headers)


def post(path: str, body: bytes, *headers: str) -> bytes:
    return request("POST", path, f"Content-Length: {len(body)}", *headers) + body


def chunked(path: str, *chunks: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return request("POST", path, "Transfer-Encoding: chunked") + framed + b"0\r\n\r\n"


def request(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def is_zero(data: bytearray | memoryview) -> bool:
    """Compared as a whole: asking each byte would take most of the time of the tests."""
    return bytes(data) == bytes(len(data))


Outcome = list[tuple[str, str, bytes] | str]
"""(method, path, body) of each request, and how it ended."""


def read_requests(shared: Shared, *parts: bytes) -> Outcome:
    """What one connection's bytes mean, received in `parts` (each cut further where the buffer has no more room)."""
    reader = RequestReader(shared)
    outcome: Outcome = []
    try:
        for part in parts:
            rest = memoryview(part)
            while rest:
                room = reader.room()
                assert len(room) > 0
                count = min(len(room), len(rest))
                room[:count] = rest[:count]
                rest = rest[count:]
                reader.received(count)
                while (parsed := reader.next()) is not None:
                    head, body = parsed
                    outcome.append((head.method, head.path, bytes(body)))
                reader.zero_used()
                assert is_zero(shared.view)
        outcome.append("waits" if reader.holds_input else "done")
    except RefusedError as error:
        outcome.append(f"refused {error.refusal.status}")
    reader.discard()
    assert is_zero(shared.view)
    assert shared.budget.bytes_held == 0
    return outcome
