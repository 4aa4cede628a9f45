"""What the API counts, for Prometheus.

Owns: the API's metrics and the answer of /metrics. Invariants: label values come from the table of routes, from the
methods it knows and from statuses, never from what a client sent, so that their number is bounded; one registry for
each server, none at import.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from progressdb_server.api.answer import Answer
from progressdb_server.api.call import Call

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_UNROUTED = "other"


class ApiMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Counter(
            "progressdb_http_requests_total",
            "Requests answered, by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._latency = Histogram(
            "progressdb_http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("route", "method"),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self._in_flight = 0  # a plain number, read at a scrape: a gauge takes a lock for each change
        Gauge("progressdb_http_requests_in_flight", "Requests that are being served.", registry=registry).set_function(
            lambda: self._in_flight
        )
        self._observers: dict[tuple[str, str, int], tuple[Callable[[], None], Callable[[float], None]]] = {}

    def started(self) -> None:
        self._in_flight += 1

    def finished(self, call: Call, status: int, seconds: float) -> None:
        """A call without a route was refused before routing, or has none."""
        self._in_flight -= 1
        route = call.route or _UNROUTED
        key = (route, call.method if call.route else _UNROUTED, status)
        observers = self._observers.get(key)
        if observers is None:
            counter = self._requests.labels(key[0], key[1], str(status))
            histogram = self._latency.labels(key[0], key[1])
            observers = self._observers[key] = (counter.inc, histogram.observe)
        count, observe = observers
        count()
        observe(seconds)

    async def answer(self, call: Call) -> Answer:
        """The text format of Prometheus."""
        return Answer(200, generate_latest(self.registry), (b"content-type", CONTENT_TYPE_LATEST.encode("ascii")))
