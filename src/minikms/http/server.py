"""The HTTP server: the state that connections share, the end of a turn, deadlines, graceful stop.

Owns: the set of connections, their groups, the queue of the turn and the counters. Invariants:
- The answers of one turn of the event loop are written together, after `Application.commit` has returned True.
  Otherwise a 503 replaces each of them. `commit` is called in every turn in which the engine called the application.
- All connections share one receive buffer. That works because asyncio and uvloop call `get_buffer`, receive, and call
  `buffer_updated` with nothing in between.
- There is one timer, and only while there are connections.
It must never open a listening socket (the caller does, with `protocol_factory`), nor output the text of an exception.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Awaitable, Callable, Container, Hashable
from dataclasses import dataclass
from typing import Final, Generic

from minikms.api.errors import KmsRefusedError
from minikms.http.connection import Group, ServerConnection
from minikms.http.exchange import AnswerEncoder, Application, GroupFull, Response, S, raised_response, refusal_response
from minikms.http.head import ParsedHead
from minikms.http.limits import INTERNAL, INTERRUPTED, LIMITS, SHUTTING_DOWN, TOO_MANY_CONNECTIONS, Limits, Refusal
from minikms.http.reader import Budget, Phase, Shared

_DRAIN_POLL_SECONDS: Final = 0.02
_CANCEL_SECONDS_MAX: Final = 1.0
_PLACES_TRIED_MAX: Final = 8
"""The number of closable connections that are checked for unread input before one is closed."""
_COMMIT_AGAIN_SECONDS: Final = 0.002
"""Between two calls of `Application.commit` for a turn whose answers wait."""


@dataclass(eq=False, repr=False)
class HttpServer(Generic[S]):
    """Serves an `Application` on every connection made with `protocol_factory`. `on_internal_error` gets the type of an
    unexpected exception and where it was raised, never its text.
    """

    app: Application[S]
    loop: asyncio.AbstractEventLoop
    on_internal_error: Callable[[str], None]
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        self.shared = Shared(self.limits)
        self.encoder = AnswerEncoder(time.time())
        self.connections: set[ServerConnection[S]] = set()
        self.unread = 0
        """Bytes of requests that are answered later, and of answers that wait to be read."""
        self.draining = False
        self.requests = 0
        """Complete requests passed to the application since the start."""
        self.refused = 0
        """Refusals by the engine since the start."""
        self.accept_failures = 0
        """Failures of accept(2) since the start. The code that accepts connections counts them."""
        self.now = self.loop.time()
        """The loop's time, at most `sweep_seconds` old while there are connections."""
        self.phase_seconds = {
            Phase.IDLE: self.limits.idle_seconds_max,
            Phase.HEAD: self.limits.head_seconds_max,
            Phase.BODY: self.limits.body_seconds_max,
            Phase.LINGER: self.limits.linger_seconds_max,
        }
        self._groups: dict[Hashable, Group[S]] = {}
        self._turn: list[ServerConnection[S]] = []
        self._turn_scheduled = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._tasks: dict[asyncio.Future[bytes | Response], Response | None] = {}
        """The answers that are awaited. The value replaces the outcome, after `replace_app`."""

    def protocol_factory(self) -> ServerConnection[S]:
        """For `loop.connect_accepted_socket`, `loop.create_unix_server` and `loop.create_server`."""
        return ServerConnection(self)

    @property
    def connections_count(self) -> int:
        return len(self.connections)

    def replace_app(self, app: Application[S], instead: Response | None, spare: Container[object] = ()) -> None:
        """Serve `app` from now on, with the sessions of the former application.

        `instead`: the answer to every request that the former application has begun and that is not answered yet. Its
        awaited answers are cancelled, but those of the tasks `spare`; and a connection whose client has not read all of
        an answer is closed at once. None: they go on.
        """
        self.app = app
        for connection in self.connections:
            connection.use(app)
        if instead is None:
            return
        for connection in self.connections:
            connection.drop_unread()
        for connection in self._turn:
            connection.replace_answers(instead)
        for task in self._tasks:
            if task not in spare:
                self._tasks[task] = instead
                task.cancel()

    async def drain(self, seconds: float) -> None:
        """Stop gracefully: close idle connections, finish pending requests for at most `seconds`, then abort the rest.

        The caller has closed its listening sockets. From now on every answer says `connection: close`.
        """
        self.draining = True
        deadline = self.loop.time() + seconds
        while self.connections or self._tasks:
            # Sleep first, so that requests in a socket's queue are read before their connection counts as idle.
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
            if self.loop.time() >= deadline:
                break
            for connection in list(self.connections):
                connection.close_if_idle()
        if self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(self._tasks, timeout=_CANCEL_SECONDS_MAX)
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)

    # --- for connections ----------------------------------------------------------------------------------------

    def open(self, connection: ServerConnection[S], transport: asyncio.Transport) -> tuple[S, Group[S]] | None:
        """Ask the application for a session. None: the connection was refused and is being closed."""
        if self._sweeper is None:
            self._tick()
        session: S | Refusal | None
        if self.draining:
            session = SHUTTING_DOWN
        elif len(self.connections) >= self.limits.connections_max:
            session = TOO_MANY_CONNECTIONS
        else:
            try:
                session = self._session(connection, transport)
            except Exception as error:  # noqa: BLE001 - a connection without a session is closed, whatever the reason
                self.failed(error)
                session = None
        if session is None:
            self._schedule_turn()
            transport.abort()
            return None
        if isinstance(session, Refusal):
            self.refuse(None, session)
            transport.write(self.encoder.answer(refusal_response(session), close=True))
            transport.close()
            return None
        self.connections.add(connection)
        return session, self.join(connection, session)

    def join(self, connection: ServerConnection[S], session: S) -> Group[S]:
        key = self.app.group(session)
        group = self._groups.get(key)
        if group is None:
            budget = Budget(self.limits.buffered_group_bytes_max, self.shared.budget)
            group = self._groups[key] = Group(key, budget)
        group.connections.add(connection)
        return group

    def leave(self, connection: ServerConnection[S], group: Group[S]) -> None:
        group.connections.discard(connection)
        self._forget_unused(group)

    def _session(self, connection: ServerConnection[S], transport: asyncio.Transport) -> S | Refusal | None:
        arguments = transport.get_extra_info("socket"), transport.get_extra_info("ssl_object"), connection
        session = self.app.open_session(*arguments)
        if isinstance(session, GroupFull):
            group = self._groups.get(session.group)
            if group is not None and any(each.give_place() for each in self._unused(group)):
                session = self.app.open_session(*arguments)
        return TOO_MANY_CONNECTIONS if isinstance(session, GroupFull) else session

    def _unused(self, group: Group[S]) -> list[ServerConnection[S]]:
        """The connections of a group that have waited longest for their clients, and not only for a moment."""
        before = self.now - self.limits.place_seconds_min
        waiting = [each for each in group.connections if each.waits and each.since <= before]
        return heapq.nsmallest(_PLACES_TRIED_MAX, waiting, key=lambda each: each.since)

    def count_unread(self, group: Group[S], change: int) -> None:
        """`change` more bytes of requests and answers of a group are kept, or fewer if it is negative."""
        group.unread += change
        self.unread += change
        limits = self.limits
        if change > 0:
            if group.unread > limits.unread_group_bytes_max or self.unread > limits.unread_bytes_max:
                group.held_back = True
                for connection in group.connections:
                    connection.hold_back()
        elif group.held_back and (
            not group.unread
            or (group.unread <= limits.unread_group_bytes_max // 2 and self.unread <= limits.unread_bytes_max)
        ):
            group.held_back = False
            for connection in list(group.connections):
                if group.held_back:  # by an answer to a request of one that went on
                    break
                connection.go_on()
        self._forget_unused(group)

    def _forget_unused(self, group: Group[S]) -> None:
        if not group.connections and not group.unread:
            self._groups.pop(group.key, None)

    def refuse(self, session: S | None, refusal: Refusal) -> None:
        self.refused += 1
        self._schedule_turn()
        try:
            self.app.refused(session, refusal.status, refusal.code)
        except Exception as error:  # noqa: BLE001 - the peer is refused in any case
            self.failed(error)

    def admit(self, session: S, head: ParsedHead) -> Response | None:
        """Call `Application.admit`. If it raises, the result is the answer to that error."""
        try:
            return self.app.admit(session, head)
        except KmsRefusedError as error:
            return raised_response(error)
        except Exception as error:  # noqa: BLE001 - as for `handle`
            return self.failed(error)

    def close(self, connection: ServerConnection[S], session: S, group: Group[S]) -> None:
        """Forget a connection that has ended, and close its session."""
        self.connections.discard(connection)
        self.leave(connection, group)
        self._schedule_turn()
        try:
            self.app.close_session(session)
        except Exception as error:  # noqa: BLE001 - the connection has ended, so there is no answer
            self.failed(error)

    def failed(self, error: BaseException) -> Response:
        """Report an unexpected exception by type and place. Returns a 500 without details."""
        place = "unknown"
        trace = error.__traceback__
        while trace is not None:
            place = f"{trace.tb_frame.f_globals.get('__name__', '?')}:{trace.tb_lineno}"
            trace = trace.tb_next
        self.on_internal_error(f"{type(error).__name__} at {place}")
        return refusal_response(INTERNAL)

    def watch(self, awaitable: Awaitable[bytes | Response], connection: ServerConnection[S], head: ParsedHead) -> None:
        """Wait for an awaited answer and pass it to its connection."""
        self._schedule_turn()  # so that the end of the turn zeroes this request
        task = asyncio.ensure_future(awaitable, loop=self.loop)
        self._tasks[task] = None

        def done(task: asyncio.Future[bytes | Response]) -> None:
            instead = self._tasks.pop(task, None)
            self._schedule_turn()
            outcome = self._outcome(task)  # even if it is replaced: an unexpected exception is reported
            connection.finished(head, outcome if instead is None else instead)

        task.add_done_callback(done)

    def queue(self, connection: ServerConnection[S]) -> None:
        """Write the answers of this connection at the end of the turn."""
        self._turn.append(connection)
        if not self._turn_scheduled:
            self._schedule_turn()

    # --- inside -------------------------------------------------------------------------------------------------

    def _outcome(self, task: asyncio.Future[bytes | Response]) -> bytes | Response:
        if task.cancelled():  # it may have changed something on disk already
            return refusal_response(INTERRUPTED)
        error = task.exception()
        if error is None:
            return task.result()
        if isinstance(error, KmsRefusedError):
            return raised_response(error)
        return self.failed(error)

    def _schedule_turn(self) -> None:
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self.loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._turn_scheduled = False
        self.shared.wipe()
        try:
            committed = self.app.commit()
        except Exception as error:  # noqa: BLE001 - if commit raises, the audit lines were not written
            self.failed(error)
            committed = False
        if committed is None:
            self._turn_scheduled = True
            turn, self._turn = self._turn, []
            for connection in turn:
                if connection.needs_commit:
                    connection.hold()
                    self._turn.append(connection)
                elif connection.flush(committed=True):
                    connection.flushed()
            self.loop.call_later(_COMMIT_AGAIN_SECONDS, self._end_turn)
            return
        turn, self._turn = self._turn, []  # at last: `commit` may call `replace_app`
        waiting = [connection for connection in turn if connection.flush(committed)]
        for connection in waiting:  # after all have left, since `handle` may take time and call `replace_app`
            connection.flushed()

    def _tick(self) -> None:
        self.now = self.loop.time()
        self.encoder.set_time(time.time())
        self._sweeper = self.loop.call_later(self.limits.sweep_seconds, self._sweep)

    def _sweep(self) -> None:
        self._sweeper = None
        if not self.connections:
            return
        self._tick()
        for connection in list(self.connections):
            connection.sweep(self.now)
