"""When a replicator releases the head of a daemon that no longer answers: not before its last lease can have ended."""

from __future__ import annotations

from typing import Any

import pytest

from minikms.api.errors import KmsUnavailableError
from minikms.api.replica_verbs import MemberReport, ReplicaNextAnswer, ReplicaNextRequest, ReplicaPosition
from minikms_replicator import serving
from minikms_replicator.serving import Server
from minikms_replicator.tables import LEASE_NS, RenewedLease

SECOND_NS = 1_000_000_000


class Clock:
    """Each reading is a second later."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        self.now_ns += SECOND_NS
        return self.now_ns


class Head:
    """In the place of the tables: each renewal is confirmed at once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.released_ns = 0

    async def exchange(self, report: object) -> Any:
        return []

    async def renew(self, term: int, member: str, numbers: object, seals: int) -> RenewedLease:
        return RenewedLease(term, 0, 0, 0, "", self._clock())

    async def release(self, lease: RenewedLease, member: str, seals: int) -> None:
        self.released_ns = self._clock()


class Silent:
    """Takes one grant, and gets others without an answer: it stands still, and may take them when it goes on."""

    def __init__(self) -> None:
        self.granted: list[int] = []
        report = MemberReport("m1", "a", "serving", 0, 1, "0", "", "", "", 0.0)
        self._position = ReplicaPosition("kr", "m1", "serving", 0, 1, 0, 0, False, False, False, report)

    async def replica_follow(self, request: object) -> ReplicaPosition:
        raise KmsUnavailableError("no answer")

    async def replica_next(self, request: ReplicaNextRequest) -> ReplicaNextAnswer:
        self.granted.append(request.asked_ns)
        if len(self.granted) > 1:
            raise KmsUnavailableError("no answer")
        return ReplicaNextAnswer(self._position)


async def test_a_head_is_released_only_after_the_last_grant_that_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(serving, "boot_ns", clock)
    monkeypatch.setattr(serving, "PAUSE_S", 0.0)
    head, daemon = Head(clock), Silent()
    tables: Any = head
    await Server(tables, daemon, lambda *_: None).serve("m1", RenewedLease(1, 0, 0, 0, "", clock()))
    assert len(daemon.granted) > 1
    assert head.released_ns > max(daemon.granted) + LEASE_NS
