"""Rate-limits the audit events for peers whose uid is not allowed.

Owns: merging many refusals into few events. Rules: the first refusal of a uid is an event at once; those of the
following second are counted, and become one event at its end. At most `UIDS_COUNT_MAX` uids are counted separately at a
time; all others share one count. So refused peers add at most `UIDS_COUNT_MAX` + 1 lines a second to the audit log. It
must never read a clock: time is passed in.
"""

from __future__ import annotations

from typing import Final

from minikms import api
from minikms.audit.record import TYPE_REFUSED, Event

WINDOW_NS: Final = 1_000_000_000
UIDS_COUNT_MAX: Final = 8
ACTOR_OTHERS: Final = "peer_uid:others"
"""Uids beyond `UIDS_COUNT_MAX`."""


class _Window:
    __slots__ = ("ends_ns", "pending")

    def __init__(self, ends_ns: int) -> None:
        self.ends_ns = ends_ns
        self.pending = 0


class RefusalAggregator:
    """Call `note` for each refusal and `due` once a second, and queue every event that they return."""

    def __init__(self) -> None:
        self._windows: dict[str, _Window] = {}

    def note(self, uid: int, now_ns: int) -> Event | None:
        """Counts a refusal at `now_ns`, of a monotonic clock. Returns an event if it is the first of its uid."""
        actor = f"peer_uid:{uid}"
        if actor not in self._windows and len(self._windows) >= UIDS_COUNT_MAX:
            actor = ACTOR_OTHERS
        window = self._windows.get(actor)
        if window is None:
            self._windows[actor] = _Window(now_ns + WINDOW_NS)
            return _event(actor, 1)
        window.pending += 1
        return None

    def due(self, now_ns: int) -> list[Event]:
        """Events for the seconds that have ended by `now_ns`. A uid without a refusal in that second is forgotten."""
        events = []
        for actor, window in list(self._windows.items()):
            if now_ns < window.ends_ns:
                continue
            if not window.pending:
                del self._windows[actor]
                continue
            events.append(_event(actor, window.pending))
            window.pending = 0
            window.ends_ns = now_ns + WINDOW_NS
        return events

    def flush(self) -> list[Event]:
        """Events for everything counted so far, at the end."""
        events = [_event(actor, window.pending) for actor, window in self._windows.items() if window.pending]
        self._windows.clear()
        return events


def _event(actor: str, count: int) -> Event:
    return Event(type=TYPE_REFUSED, actor=actor, count=count, outcome=api.CODE_UNAUTHORIZED)
