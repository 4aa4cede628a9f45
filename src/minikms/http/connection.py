"""One connection: passes requests to the application and writes the answers, in order and within bounds.

Owns: the state of a connection. Rules:
- A request is started only when it is complete and nothing blocks the connection (`_BUSY`, `_WRITE`, `_TURN`,
  `_CLOSING`, `_HELD_BACK`). So answers leave in the order of their requests, and the engine reads nothing from a client
  that does not read its answers.
- `_unread` counts an answer from the time when it is queued (a large one) or when the kernel does not take it, until
  all of it was taken: a part of it keeps the whole in memory. `_kept` counts a request that is answered later, until it
  is, also when the connection has ended.
- An answer is queued, and written at the end of the turn, after `Application.commit`. If that fails, a 503 replaces it,
  unless the application has marked it.
- After the last answer no request is started: input is discarded until the peer closes or the linger limit is reached.
- There is no timer per connection: `_phase` and `_since` say what it waits for, and `sweep` compares them with the
  limits.
It must never look into a body, know a path or a verb, or keep a body after `Application.handle` has returned.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Hashable
from typing import Final, Generic, Protocol, cast

from minikms.api.errors import KmsRefusedError
from minikms.http.exchange import (
    CONTINUE,
    AnswerEncoder,
    Application,
    HttpRequest,
    Response,
    S,
    raised_response,
    refusal_response,
)
from minikms.http.head import ParsedHead
from minikms.http.limits import (
    AUDIT_UNAVAILABLE,
    BODY_TIMEOUT,
    HEAD_TIMEOUT,
    TRUNCATED,
    WRITE_PROGRESS_BYTES_MIN,
    Limits,
    Refusal,
    RefusedError,
)
from minikms.http.reader import Budget, Phase, RequestReader, Shared

_BUSY: Final = 1
"""The application has not finished an awaited answer."""
_WRITE: Final = 2
"""The client has not read its answers."""
_TURN: Final = 4
"""This connection has used its share of the turn; it continues when its answers are written."""
_CLOSING: Final = 8
"""The last answer is queued or sent."""
_HELD_BACK: Final = 16
"""Too many answers of the connections of its group wait to be read."""

_LARGE_ANSWER_BYTES: Final = 64 * 1024
"""Larger answers, one or several, use up the connection's share of the turn, so that they can't accumulate in it."""


class Uncommitted(bytes):
    """The bytes of an answer that is sent even if the turn's commit fails."""


class ConnectionHost(Protocol[S]):
    """What a connection needs from its server; `HttpServer` implements it and documents each member."""

    app: Application[S]
    loop: asyncio.AbstractEventLoop
    limits: Limits
    shared: Shared
    encoder: AnswerEncoder
    draining: bool
    requests: int
    now: float
    phase_seconds: dict[Phase, float]

    def open(self, connection: ServerConnection[S], transport: asyncio.Transport) -> tuple[S, Group[S]] | None: ...
    def join(self, connection: ServerConnection[S], session: S) -> Group[S]: ...
    def leave(self, connection: ServerConnection[S], group: Group[S]) -> None: ...
    def count_unread(self, group: Group[S], change: int) -> None: ...
    def admit(self, session: S, head: ParsedHead) -> Response | None: ...
    def refuse(self, session: S | None, refusal: Refusal) -> None: ...
    def failed(self, error: BaseException) -> Response: ...
    def watch(
        self, awaitable: Awaitable[bytes | Response], connection: ServerConnection[S], head: ParsedHead
    ) -> None: ...
    def queue(self, connection: ServerConnection[S]) -> None: ...
    def close(self, connection: ServerConnection[S], session: S, group: Group[S]) -> None: ...


class Group(Generic[S]):
    """The connections of one group, the bytes of their requests that are answered later and of their answers that wait
    to be read, and the budget of their incomplete requests.
    """

    __slots__ = ("budget", "connections", "held_back", "key", "unread")

    def __init__(self, key: Hashable, budget: Budget) -> None:
        self.key = key
        self.budget = budget
        self.connections: set[ServerConnection[S]] = set()
        self.unread = 0
        self.held_back = False


class ServerConnection(asyncio.BufferedProtocol, Generic[S]):
    """The protocol object of one connection; made by `HttpServer.protocol_factory`.

    It stays one class: the transport, the server and the application call half of its methods, and the other half share
    `_blocked` and `_answers`, which every request reads; `minikms.http.reader` has the bytes of requests.
    """

    __slots__ = (
        "_admitted",
        "_answers",
        "_app",
        "_blocked",
        "_eof_at",
        "_group",
        "_kept",
        "_opened",
        "_paused",
        "_phase",
        "_reader",
        "_server",
        "_session",
        "_since",
        "_stall_mark",
        "_stall_since",
        "_transport",
        "_unread",
        "_written",
    )

    _app: Application[S]
    _transport: asyncio.Transport
    _session: S
    _group: Group[S]

    def __init__(self, server: ConnectionHost[S]) -> None:
        self._server = server
        self._reader = RequestReader(server.shared)
        self._blocked = 0
        self._phase = Phase.IDLE
        self._since = server.now
        self._admitted: ParsedHead | None = None
        self._answers: list[bytes] = []
        self._paused = False
        self._eof_at: float | None = None
        self._opened = False
        self._written = 0
        self._unread = 0
        self._kept = 0
        self._stall_mark = 0
        self._stall_since: float | None = None

    # --- the transport's calls ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._app = self._server.app
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=0)  # what the kernel does not take at once, pauses
        opened = self._server.open(self, self._transport)
        self._since = self._server.now
        if opened is None:
            self._blocked = _CLOSING
        else:
            self._session, self._group = opened
            self._opened = True
            self._reader.charge(self._group.budget)
            if self._group.held_back:
                self.hold_back()

    def connection_lost(self, exc: Exception | None) -> None:
        self._blocked |= _CLOSING
        self._answers = []
        self._reader.discard()
        if self._opened:
            self._server.close(self, self._session, self._group)
            self._count_unread(0)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.room()

    def buffer_updated(self, nbytes: int) -> None:
        reader = self._reader
        only = None if self._blocked else reader.only_request(nbytes)
        if only is None:
            reader.received(nbytes)
            self._start_requests()
            return
        # The common case: exactly one request, with a cached head.
        head, body = only
        self._start(head, body)
        server = self._server
        server.requests += 1
        self._since = server.now
        self._phase = Phase.IDLE

    def eof_received(self) -> bool:
        """The client sends nothing more. Its requests are still answered, within the half-closed limit."""
        self._eof_at = self._server.loop.time()
        self._end_of_input()
        return not self._transport.is_closing()

    def pause_writing(self) -> None:
        self._blocked |= _WRITE
        self._pause_reading()
        self._count_unread(max(self._unread, self._transport.get_write_buffer_size()))

    def resume_writing(self) -> None:
        self._blocked &= ~_WRITE
        self._count_unread(0)
        self._since = self._server.now  # input was not read meanwhile, so it is not late
        self._continue()

    # --- requests -----------------------------------------------------------------------------------------------

    def _start_requests(self) -> None:
        """Start every complete request until something blocks; keep the rest."""
        reader = self._reader
        started = 0
        share = _LARGE_ANSWER_BYTES
        try:
            while not self._blocked:
                request = reader.next()
                if request is None:
                    self._await_more(started > 0)
                    break
                self._start(*request)
                started += 1
                if self._answers:
                    share -= len(self._answers[-1])
                if share < 0 or started == self._server.limits.pipelined_requests_max:
                    self._blocked |= _TURN
            if not self._blocked & _CLOSING:
                reader.zero_used()
        except RefusedError as error:
            self._refuse(error.refusal)
        if started:
            self._server.requests += started
            self._since = self._server.now
        if self._blocked:
            if self._blocked & _CLOSING:
                reader.discard()
                return
            self._phase = Phase.IDLE
            if reader.holds_input:
                self._pause_reading()

    def _await_more(self, started: bool) -> None:
        """Record what the connection waits for. If it is a body, ask the application whether to receive it."""
        phase = self._reader.phase
        if phase is not self._phase or started:
            self._phase = phase
            self._since = self._server.now
        head = self._reader.head
        if head is None or head is self._admitted:
            return
        self._admitted = head
        refused = self._server.admit(self._session, head)
        if refused is not None:
            self._answer(head, refused, close=True)
        elif head.expect_continue:
            self._queue(CONTINUE)

    def _start(self, head: ParsedHead, body: memoryview) -> None:
        """Pass one complete request to the application."""
        server = self._server
        self._admitted = None
        size = len(body)
        answer: bytes | Response | Awaitable[bytes | Response]
        try:
            answer = self._app.handle(self._session, HttpRequest(head, body))
        except KmsRefusedError as error:
            answer = raised_response(error)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises, the client gets a 500 and the loop continues
            answer = server.failed(error)
        try:
            body.release()
        except BufferError as error:  # the application has kept a view of the engine's memory
            answer = server.failed(error)
        if type(answer) is bytes and head.plain and not server.draining:
            if len(answer) > _LARGE_ANSWER_BYTES:
                self._take_turn(answer)
            self._queue(server.encoder.ok(answer))
        elif isinstance(answer, bytes | Response):
            self._answer(head, answer)
        else:
            self._blocked |= _BUSY
            self._keep(size)
            server.watch(answer, self, head)

    def finished(self, head: ParsedHead, answer: bytes | Response) -> None:
        """The awaited answer is there. Requests that were received meanwhile start after it has been written."""
        self._blocked &= ~_BUSY
        self._since = self._server.now
        if not self._blocked & _CLOSING:  # otherwise the connection has ended meanwhile
            self._blocked |= _TURN
            if type(answer) is bytes and head.plain and not self._server.draining:
                if len(answer) > _LARGE_ANSWER_BYTES:
                    self._take_turn(answer)
                self._queue(self._server.encoder.ok(answer))
            else:
                self._answer(head, answer)
        self._keep(0)  # at last: it may start a request

    def use(self, app: Application[S]) -> None:
        """Pass all further requests to `app`."""
        self._app = app

    def replace_answers(self, instead: Response) -> None:
        self._answers = self._replaced(self._answers, instead)

    def drop_unread(self) -> None:
        """Close at once if the client has not read all that was written: no further byte of it leaves."""
        if self._transport.get_write_buffer_size():
            self.abort()

    # --- answers ------------------------------------------------------------------------------------------------

    def _answer(self, head: ParsedHead, answer: bytes | Response, *, close: bool = False) -> None:
        response = Response(200, answer) if isinstance(answer, bytes) else answer
        close = close or response.close or not head.keep_alive or self._server.draining
        try:
            data = self._server.encoder.answer(
                response, close=close, head_only=head.method == "HEAD", request_id=head.request_id
            )
        except ValueError as error:
            close = True
            data = self._server.encoder.answer(self._server.failed(error), close=True)
        if close:
            self._blocked |= _CLOSING
        if len(response.body) > _LARGE_ANSWER_BYTES:
            self._take_turn(response.body)
        self._queue(Uncommitted(data) if response.uncommitted else data)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal; the connection ends after it."""
        self._blocked |= _CLOSING
        self._server.refuse(self._session, refusal)
        self._queue(self._server.encoder.answer(refusal_response(refusal), close=True))

    def _queue(self, data: bytes) -> None:
        """Queue bytes that are written after the turn's commit."""
        self._answers.append(data)
        if len(self._answers) == 1:
            self._server.queue(self)

    def _take_turn(self, answer: bytes) -> None:
        """A large answer is queued: the connection starts nothing more in this turn."""
        self._blocked |= _TURN
        self._count_unread(self._unread + len(answer))

    def _count_unread(self, unread: int) -> None:
        """From now on, so many bytes of this connection's answers wait to be read."""
        change = unread - self._unread
        if change:
            self._unread = unread
            self._server.count_unread(self._group, change)

    def _keep(self, size: int) -> None:
        """From now on, the application keeps a request of so many bytes."""
        change = size - self._kept
        if change:
            self._kept = size
            self._server.count_unread(self._group, change)

    def hold_back(self) -> None:
        """Read nothing and start no request before `go_on`."""
        if not self._blocked & _CLOSING:
            self._blocked |= _HELD_BACK
            self._pause_reading()

    def regroup(self) -> None:
        """Counts everything that the connection has in another group from now on."""
        former, group = self._group, self._server.join(self, self._session)
        if group is former:
            return
        self._group = group
        self._reader.charge(group.budget)
        self._server.leave(self, former)
        counted = self._unread + self._kept
        if counted:
            self._server.count_unread(former, -counted)
            self._server.count_unread(group, counted)
        self._blocked &= ~_HELD_BACK  # what is being answered goes on, and reading after it
        if group.held_back:
            self.hold_back()

    def go_on(self) -> None:
        """After `hold_back`."""
        self._blocked &= ~_HELD_BACK
        self._since = self._server.now  # input was not read meanwhile, so it is not late
        self._continue()

    @property
    def needs_commit(self) -> bool:
        """Whether an answer of this turn must wait for the turn's commit."""
        return any(type(answer) is not Uncommitted for answer in self._answers)

    def hold(self) -> None:
        """Start no further request before the answers of this turn are written."""
        self._blocked |= _TURN

    def flush(self, committed: bool) -> bool:
        """Write the turn's answers. The server calls this at the end of the turn. True: `flushed` has work to do."""
        answers = self._answers
        if not answers:  # the connection has ended meanwhile
            return False
        if committed and len(answers) == 1:
            data = answers.pop()
        else:
            self._answers = []
            if not committed:
                answers = self._replaced(answers, refusal_response(AUDIT_UNAVAILABLE))
            data = b"".join(answers)
        self._written += len(data)
        self._transport.write(data)
        if self._blocked or self._eof_at is not None:
            self._blocked &= ~_TURN
            return True
        return False

    def flushed(self) -> None:
        """Go on after `flush`: count what was not taken, and start the requests that have waited."""
        if self._answers:  # it has gone on already, and is flushed again
            return
        if self._opened:
            paused = self._blocked & _WRITE
            self._count_unread(max(self._unread, self._transport.get_write_buffer_size()) if paused else 0)
        if self._blocked & _CLOSING:
            self._close()
        else:
            self._continue()

    def _replaced(self, answers: list[bytes], instead: Response) -> list[bytes]:
        """The same number of answers: `instead` for each one that needs the turn's commit."""
        encoded = self._server.encoder.answer(instead, close=False)
        replaced = [answer if answer is CONTINUE or type(answer) is Uncommitted else encoded for answer in answers]
        if answers and self._blocked & _CLOSING and type(replaced[-1]) is not Uncommitted:
            replaced[-1] = self._server.encoder.answer(instead, close=True)
        return replaced

    # --- flow and end -------------------------------------------------------------------------------------------

    def _continue(self) -> None:
        """After something that blocked has ended: start the received requests, then read again."""
        if self._blocked:
            return
        if self._reader.holds_input:
            self._start_requests()
        if not self._blocked:
            self._resume_reading()
        if self._eof_at is not None:
            self._end_of_input()

    def _end_of_input(self) -> None:
        """The client has closed its side: close the connection as soon as every request is answered."""
        if self._phase is Phase.LINGER:
            self._transport.close()
        elif self._blocked or self._answers:
            return
        elif self._reader.holds_input:
            self._reader.discard()
            self._refuse(TRUNCATED)
        else:
            self._transport.close()

    def _pause_reading(self) -> None:
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._paused and self._eof_at is None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    def _close(self) -> None:
        """Close in stages after the last answer, as RFC 9112 section 9.6 describes.

        Closing a socket with unread input resets the connection, and the client may lose the answer.
        """
        self._reader.discard()
        transport = self._transport
        if self._eof_at is not None or transport.is_closing() or not transport.can_write_eof():
            transport.close()
            return
        transport.write_eof()
        self._phase = Phase.LINGER
        self._since = self._server.now
        self._resume_reading()

    def abort(self) -> None:
        """Closes at once and drops everything that is pending."""
        self._transport.abort()

    @property
    def waits(self) -> bool:
        """Whether it waits for its client: for a request, for the rest of one, or for the end."""
        return not self._answers and not self._blocked & ~_CLOSING

    @property
    def since(self) -> float:
        """The value of `HttpServer.now`, to half a second, when it began to wait."""
        return self._since

    def give_place(self) -> bool:
        """Close the connection, which waits for its client, and forget it at once. False, and nothing is done, if the
        kernel has bytes of its client that were not read yet.
        """
        with socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno())) as own:
            with contextlib.suppress(OSError):
                if own.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return False
            with contextlib.suppress(OSError):
                own.shutdown(socket.SHUT_RDWR)  # at once, so that no later request of its client counts as sent
        self._blocked |= _CLOSING
        self._reader.discard()
        if self._opened:
            self._opened = False
            self._server.close(self, self._session, self._group)
        self._transport.close()
        return True

    def close_if_idle(self) -> None:
        """Close unless a request is being received or answered."""
        if not self._blocked and not self._answers and not self._reader.holds_input:
            self._transport.close()

    # --- deadlines ----------------------------------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """End the connection if it has waited too long, or may not stay. `now`: the loop's time in seconds."""
        if self._stalled(now) or self._half_closed_too_long(now) or self._is_unwelcome():
            self.abort()
        elif now - self._since < self._server.phase_seconds[self._phase]:
            return
        elif self._phase is Phase.LINGER:
            self._transport.close()
        elif self._blocked or self._answers:
            return
        elif self._phase is Phase.IDLE:
            self._transport.close()
        else:
            self._reader.discard()
            self._refuse(HEAD_TIMEOUT if self._phase is Phase.HEAD else BODY_TIMEOUT)

    def _is_unwelcome(self) -> bool:
        """Whether it may not stay, and nothing that has begun is being answered."""
        if self._blocked & (_BUSY | _CLOSING) or self._answers:
            return False
        return not self._app.may_stay(self._session)

    def _half_closed_too_long(self, now: float) -> bool:
        """Whether the half-closed limit ends before the next sweep: never later than documented."""
        limits = self._server.limits
        return self._eof_at is not None and now + limits.sweep_seconds >= self._eof_at + limits.half_closed_seconds_max

    def _stalled(self, now: float) -> bool:
        """Whether the client has read almost nothing of its answers for too long."""
        unread = self._transport.get_write_buffer_size()
        if unread == 0:
            self._stall_since = None
            return False
        read_bytes = self._written - unread
        if self._stall_since is None or read_bytes - self._stall_mark >= WRITE_PROGRESS_BYTES_MIN:
            self._stall_since = now
            self._stall_mark = read_bytes
            return False
        return now - self._stall_since >= self._server.limits.write_stall_seconds_max
