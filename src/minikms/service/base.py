"""The frame of every verb: authorise, act, audit.

Owns: the methods by verb, and what all of them have in common: the role check, the bound of a batch, the encoding of
the answer, and the audit line of a success, a refusal and a cancellation. Invariants: no method acts before the caller
was authorised; the audit line exists before the answer leaves. It must never answer after a failure.

A method gets the request and the audit event, adds to the event what it learns, and returns the answer or raises a
MiniKmsError. There are three ways to add one to the table:

- `now`: it answers in the turn of the event loop in which it was called. The daemon writes the audit lines of a turn
  with one write before the answers of the turn leave.
- `later`: it awaits something. Its audit line is written before its answer exists.
- `hot`: `/encrypt`, which does all of this itself, because every call and look-up on its path was measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import UNSET

from minikms import api
from minikms.api import Verb
from minikms.audit import Event
from minikms.errors import ForbiddenError, MiniKmsError, TooManyError
from minikms.http import Response
from minikms.policy import Principal

R = TypeVar("R", bound=api.Request)
A = TypeVar("A")

Reply = bytes | Response
"""`bytes`: a JSON answer with status 200."""
Perform = Callable[[Principal, R, str], Reply | Awaitable[Reply]]
"""Carries out one request of a principal; the text is the id of the request, `""` if it has none."""

json_answer: Final = msgspec.json.Encoder().encode


class Audit(Protocol):
    """What the service needs of the audit log."""

    def add(self, event: Event) -> None:
        """Queues the event of an answer of this turn. If it can't be written, the answer is not sent."""

    async def add_written(self, event: Event, *, durable: bool) -> None:
        """Writes the event's line now, for an answer of a later turn; `durable` also waits for fsync.

        Raises AuditUnavailableError.
        """

    def require_writable(self) -> None:
        """Raises AuditUnavailableError when the last line could not be written."""


class Later(NamedTuple):
    """Returned by a `now` method that has to await something: the rest of its work."""

    act: Callable[[], Awaitable[bytes]]


class AfterLine(NamedTuple, Generic[A]):
    """Returned by a `later` method that waits for more after its audit line was written: the rest of its work.

    A failure or a cancellation of the rest writes no further line.
    """

    act: Callable[[], Awaitable[A | Reply]]


class VerbTable:
    """The method of each verb that is served."""

    def __init__(self, audit: Audit) -> None:
        self.audit = audit
        self._performs: dict[Verb[Any, Any], Perform[Any]] = {}

    def __contains__(self, verb: Verb[Any, Any]) -> bool:
        return verb in self._performs

    def __getitem__(self, verb: Verb[R, Any]) -> Perform[R]:
        return self._performs[verb]

    def hot(self, verb: Verb[R, Any], perform: Perform[R]) -> None:
        """Adds a method that authorises and audits by itself."""
        self._performs[verb] = perform

    def now(self, verb: Verb[R, A], act: Callable[[R, Event], A | Reply | Later]) -> None:
        """Adds a method that answers in the same turn."""
        frame = _Frame(verb)
        begin, authorise, add = frame.event, frame.authorise, self.audit.add

        def perform(who: Principal, request: R, request_id: str) -> Reply | Awaitable[Reply]:
            event = begin(who, request, request_id)
            try:
                forbidden = authorise(who, request, event)
                answer = act(request, event) if forbidden is None else _refuse_items(request, event, forbidden)
            except Exception as error:
                self.refused(event, error)
                raise
            if type(answer) is bytes:  # of most requests
                add(event)
                return answer
            if isinstance(answer, Later):
                return self.put_off(event, answer.act)
            add(event)
            return _reply(answer)

        self._performs[verb] = perform

    def later(
        self, verb: Verb[R, A], act: Callable[[R, Event], Awaitable[A | Reply | AfterLine[A]]], *, durable: bool = False
    ) -> None:
        """Adds a method that awaits. `durable`: it changes keys, so the audit log must be writable before it begins,
        and its audit line is on disk before the answer.
        """
        frame = _Frame(verb)

        def perform(who: Principal, request: R, request_id: str) -> Awaitable[Reply]:
            event = frame.event(who, request, request_id)

            async def authorised() -> A | Reply | AfterLine[A]:
                forbidden = frame.authorise(who, request, event)
                if forbidden is not None:
                    raise forbidden
                if durable:
                    self.audit.require_writable()
                return await act(request, event)

            return self.put_off(event, authorised, durable=durable)

        self._performs[verb] = perform

    async def put_off(
        self, event: Event, act: Callable[[], Awaitable[A | Reply | AfterLine[A]]], *, durable: bool = False
    ) -> Reply:
        """The answer of `act`, in a later turn; its audit line is written first, whatever the outcome."""
        try:
            answer = await act()
        except Exception as error:
            event.outcome = _outcome(error)
            await self.audit.add_written(event, durable=False)
            raise
        except asyncio.CancelledError:
            # Cancelled at shutdown; its effects may already be durable.
            event.outcome = api.CODE_INTERRUPTED
            self.audit.add(event)
            raise
        await self.audit.add_written(event, durable=durable)
        return _reply(await answer.act() if isinstance(answer, AfterLine) else answer)

    def refused(self, event: Event, error: Exception) -> None:
        """Audits a refusal, or an unexpected error, that is answered in this turn."""
        event.outcome = _outcome(error)
        self.audit.add(event)

    def malformed(self, verb: Verb[Any, Any], who: Principal, error: Exception, request_id: str) -> None:
        """Audits a request whose body or query could not be decoded."""
        self.refused(Event(type=verb.name, actor=who.actor, pid=who.pid, request_id=request_id), error)


class _Frame:
    """What is done before a method acts, prepared for one verb."""

    __slots__ = ("_is_batch", "_name", "_names_itself", "_needed", "_roles", "_roles_by_item")

    def __init__(self, verb: Verb[Any, Any]) -> None:
        self._name = verb.name
        self._roles = verb.roles
        self._needed = frozenset(verb.roles)
        self._roles_by_item = verb.roles_by_item
        self._is_batch = verb.is_batch
        self._names_itself = "request_id" in verb.request.__struct_fields__

    def event(self, who: Principal, request: Any, request_id: str) -> Event:
        """The audit event of a request. An id in the body is preferred to that of the HTTP header."""
        if self._names_itself and request.request_id is not UNSET:
            request_id = cut(request.request_id)
        event = Event(type=self._name, actor=who.actor, pid=who.pid, request_id=request_id)
        if self._is_batch:
            event.count = len(request.items)
        return event

    def authorise(self, who: Principal, request: Any, event: Event) -> ForbiddenError | None:
        """Raises ForbiddenError, or returns it where each item is refused by itself. Raises TooManyError."""
        forbidden: ForbiddenError | None = None
        if not self._needed <= who.roles:
            try:
                for role in self._roles:
                    who.require(role)
            except ForbiddenError as error:
                if not self._roles_by_item:
                    raise
                forbidden = error
        if not self._is_batch:
            return forbidden
        if len(request.items) > api.BATCH_ITEMS_MAX:
            raise TooManyError(f"a batch holds at most {api.BATCH_ITEMS_MAX} items; send several batches")
        if self._roles_by_item:
            event.key_ids = _distinct(item.key_id for item in request.items)
            event.request_ids = _distinct(item.request_id for item in request.items if item.request_id is not UNSET)
        return forbidden


def _outcome(error: Exception) -> str:
    """`internal` for an exception of any other type than MiniKmsError: a defect leaves a line too."""
    return error.code if isinstance(error, MiniKmsError) else api.CODE_INTERNAL


def another_line(event: Event, detail: str) -> Event:
    """An event for a second audit line about the same request."""
    return Event(
        type=event.type,
        actor=event.actor,
        pid=event.pid,
        key_id=event.key_id,
        request_id=event.request_id,
        detail=detail,
    )


def _reply(answer: object) -> Reply:
    return answer if isinstance(answer, (bytes, Response)) else json_answer(answer)


def _refuse_items(request: Any, event: Event, error: MiniKmsError) -> bytes:
    count_refused(event, len(request.items))
    return items_answer([item_error(error)] * len(request.items))


def items_answer(parts: list[bytes]) -> bytes:
    """The answer to a batch, of the JSON of each item."""
    return b'{"items":[' + b",".join(parts) + b"]}"


def item_error(error: MiniKmsError) -> bytes:
    return json_answer(api.ErrorAnswer(str(error), error.code))


def count_refused(event: Event, count: int) -> None:
    if count:
        event.outcome = "partly_refused"
        event.detail = f"{count} refused"


def cut(text: str) -> str:
    """An id for the audit log. A longer text than an id may be is cut, so that a client can't fill the log."""
    return text if len(text) <= api.ID_CHARS_MAX else text[:32] + "…"


def _distinct(ids: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(cut, ids)))
