"""Rate-limits the audit events of refusals that a caller can repeat at no cost.

Owns: merging many refusals of one kind into few events. Rules: the first refusal of an actor is an event at once; those
of the window that follows, a second by default, are counted, and become one event at its end. At most
`ACTORS_COUNT_MAX` actors are counted separately at a time; all others share one count, or one for each of the first
`PROXIES_COUNT_MAX` proxies that asked for them. So refusals of one kind add at most `ACTORS_COUNT_MAX` +
`PROXIES_COUNT_MAX` + 1 lines a window to the audit log. It must never read a clock: time is passed in.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from minikms.audit.record import TYPE_REFUSED, Event, Facts

WINDOW_NS: Final = 1_000_000_000
ACTORS_COUNT_MAX: Final = 8
PROXIES_COUNT_MAX: Final = 16
ACTOR_OTHERS: Final = "peer_uid:others"
"""Uids beyond `ACTORS_COUNT_MAX`."""
PRINCIPALS_OTHERS: Final = "others"
"""Principals beyond `ACTORS_COUNT_MAX`."""


class _Window:
    __slots__ = ("ends_ns", "pending")

    def __init__(self, ends_ns: int) -> None:
        self.ends_ns = ends_ns
        self.pending = 0


class _Actor(NamedTuple):
    name: str
    via: str = ""


class RefusalAggregator:
    """Aggregates refusals with the error code `outcome`. Call `note` for each of them and `due` once a second, and
    queue every event that they return. `others`: the name of actors beyond the bound. `window_ns`: the time for which
    refusals are counted.
    """

    def __init__(self, outcome: str, *, others: str, window_ns: int = WINDOW_NS) -> None:
        self._outcome = outcome
        self._others = others
        self._window_ns = window_ns
        self._windows: dict[_Actor, _Window] = {}

    def note(self, name: str, now_ns: int, *, via: str = "") -> Event | None:
        """Counts a refusal at `now_ns`, of a monotonic clock. Returns an event if it is the first of its actor. `via`:
        the proxy that asked.
        """
        actor = _Actor(name, via)
        if actor not in self._windows and self._named >= ACTORS_COUNT_MAX:
            actor = _Actor(self._others, via)
            if actor not in self._windows and len(self._windows) - self._named >= PROXIES_COUNT_MAX:
                actor = _Actor(self._others)
        window = self._windows.get(actor)
        if window is None:
            self._windows[actor] = _Window(now_ns + self._window_ns)
            return self._event(actor, 1)
        window.pending += 1
        return None

    @property
    def _named(self) -> int:
        return sum(actor.name != self._others for actor in self._windows)

    def due(self, now_ns: int) -> list[Event]:
        """Events for the windows that have ended by `now_ns`. An actor that was not refused meanwhile is forgotten."""
        events = []
        for actor, window in list(self._windows.items()):
            if now_ns < window.ends_ns:
                continue
            if not window.pending:
                del self._windows[actor]
                continue
            events.append(self._event(actor, window.pending))
            window.pending = 0
            window.ends_ns = now_ns + self._window_ns
        return events

    def flush(self) -> list[Event]:
        """Events for everything counted so far, at the end."""
        events = [self._event(actor, window.pending) for actor, window in self._windows.items() if window.pending]
        self._windows.clear()
        return events

    def _event(self, actor: _Actor, count: int) -> Event:
        facts: Facts = {"via": actor.via} if actor.via else {}
        return Event(type=TYPE_REFUSED, actor=actor.name, count=count, outcome=self._outcome, facts=facts)
