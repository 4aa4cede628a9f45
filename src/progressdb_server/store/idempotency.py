"""Creates that may be retried: the same key and request give the first answer again and write nothing.

Owns: the entries of `keyspace.idempotency`. Invariants: both digests are HMAC-SHA-256 under the caller's scope, which
is itself keyed and never stored, so that neither the client's key nor its request can be guessed from the disk; the
entry is written in the batch of what it refers to; it counts for IDEMPOTENCY_AGE_S and is then deleted. One from so far
in the future is deleted too: the clock was wrong when it was made. A damaged entry stays, and a retry that meets it is
refused, because it may have stored something already; `progressdb check --repair` deletes it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.platform.logs import Log
from progressdb_server.store import keyspace
from progressdb_server.store.conditions import Write
from progressdb_server.store.engine import Commits, Engine, Reads, pages
from progressdb_server.store.keyspace import Clock
from progressdb_server.store.model import (
    ConditionFailedError,
    Idempotency,
    IdempotencyConflictError,
    OutcomeUnknownError,
    RecordUnreadableError,
    StoreUnavailableError,
)

T = TypeVar("T")

IDEMPOTENCY_AGE_S: Final = 24 * 3600
DAMAGED: Final = (
    "a retry that meets one is refused: stop the server and run `progressdb check --repair`, which deletes them"
)

_log = Log()


class IdempotencyRecord(msgspec.Struct, array_like=True, frozen=True):
    """`made`: the message's or the thread's id. `request`: keyed digest of what was asked."""

    made: str
    request: bytes
    created_ns: int

    @classmethod
    def parse(cls, key: bytes, raw: bytes) -> IdempotencyRecord:
        try:
            return msgspec.msgpack.decode(raw, type=cls)
        except UNDECODABLE:
            raise RecordUnreadableError(f"the entry {key.decode(errors='backslashreplace')} is malformed") from None


class Ticket:
    """One create that may be a retry."""

    def __init__(self, idempotency: Idempotency, request: object) -> None:
        scope = idempotency.scope.encode()
        self.key = keyspace.idempotency(hmac.digest(scope, b"key:" + idempotency.key.encode(), "sha256"))
        self._found: bytes | None = None
        self._request = hmac.digest(scope, b"request:" + msgspec.json.encode(request, order="sorted"), "sha256")

    async def recall(self, reads: Reads, now_ns: int) -> str | None:
        """The id that the first call made, None for a first call. Raises IdempotencyConflictError,
        RecordUnreadableError."""
        raw = self._found = await reads.get(self.key)
        if raw is None:
            return None
        remembered = IdempotencyRecord.parse(self.key, raw)
        if _expired(remembered, now_ns):
            return None
        if not hmac.compare_digest(remembered.request, self._request):
            raise IdempotencyConflictError
        return remembered.made

    @property
    def condition(self) -> tuple[bytes, bytes | None]:
        """The condition of the write that is made once: nobody else has made it since `recall`."""
        return self.key, self._found

    def put(self, object_id: str, now_ns: int) -> tuple[bytes, bytes]:
        return self.key, msgspec.msgpack.encode(IdempotencyRecord(object_id, self._request, now_ns))


class Retries:
    """Makes once what a ticket stands for."""

    def __init__(self, engine: Engine, writer: Commits, clock: Clock) -> None:
        self._sole = engine.sole
        self._reads = engine.reads
        self._writer = writer
        self._clock = clock

    async def once(self, ticket: Ticket, create: Callable[[], Coroutine[Any, Any, T]]) -> tuple[str, T | None]:
        """What `create` makes; or the id of what was made before, which is durable then. If the outcome of `create` is
        unknown, or another server is making the same, it is looked up again, and made if it is not there. The caller
        holds the lock of the ticket."""
        for again in (True, True, False):
            object_id = await ticket.recall(self._reads, self._clock.now_ns())
            try:
                if object_id is not None:  # what is answered must be durable, and on the node that answers
                    await self._writer.commit(Write((), (ticket.condition,)))
                    return object_id, None
                return "", await create()
            except OutcomeUnknownError:
                if self._sole or not again:
                    raise
                await self._writer.settled()
            except ConditionFailedError as error:
                if error.key != ticket.key or not again:
                    raise
        raise StoreUnavailableError("another server is making the same")


def _expired(remembered: IdempotencyRecord, now_ns: int) -> bool:
    if now_ns < keyspace.NOW_NS_MIN:  # the clock is wrong now
        return False
    return abs(now_ns - remembered.created_ns) > IDEMPOTENCY_AGE_S * 1_000_000_000


async def sweep(reads: Reads, writer: Commits, now_ns: int) -> int:
    """Delete the expired entries; returns how many. Logs how many are damaged."""
    swept = damaged = 0
    async for entries in pages(reads, keyspace.IDEMPOTENCY, keyspace.after(keyspace.IDEMPOTENCY)):
        old: list[tuple[bytes, bytes]] = []
        for key, raw in entries:
            try:
                if _expired(IdempotencyRecord.parse(key, raw), now_ns):
                    old.append((key, raw))
            except RecordUnreadableError:
                damaged += 1
        try:
            await writer.commit(Write([(key, None) for key, _ in old], old))
            swept += len(old)
        except ConditionFailedError:  # one was renewed meanwhile: the next sweep deletes the others
            continue
    if damaged:
        _log.warning("retry_entries_damaged", count=damaged, reason=DAMAGED)
    return swept
