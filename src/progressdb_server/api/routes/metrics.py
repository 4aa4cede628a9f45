"""What the API counts, for Prometheus.

Owns: the API's metrics and the answer of /metrics. Invariants: label values come from the table of routes, from the
methods it knows and from statuses, never from what a client sent, so that their number is bounded; one registry for
each server, none at import. The numbers are plain ones, raised in the event loop's thread and read at a scrape: those
of the library take a lock for each change.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from progressdb_server.api.http.request import Call
from progressdb_server.api.http.response import Answer
from progressdb_server.metrics import Histogram

_LATENCY_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_DURATION: Final = "progressdb_http_request_duration_seconds"
_UNROUTED: Final = "other"


class _Answers:
    """Of one route, method and status."""

    __slots__ = ("count", "created", "times")

    def __init__(self, times: _Times) -> None:
        self.count = 0
        self.created = time.time()
        self.times = times


class _Times:
    """Of one route and method."""

    __slots__ = ("created", "seconds")

    def __init__(self) -> None:
        self.seconds = Histogram(_LATENCY_BUCKETS_S)
        self.created = time.time()


class ApiMetrics(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._in_flight = 0
        self._answers: dict[tuple[str, str, int], _Answers] = {}
        self._times: dict[tuple[str, str], _Times] = {}
        registry.register(self)

    def started(self) -> None:
        self._in_flight += 1

    def finished(self, call: Call, status: int, seconds: float) -> None:
        """A call without a route was refused before routing, or has none."""
        self._in_flight -= 1
        route = call.route
        key = (route, call.method, status) if route else (_UNROUTED, _UNROUTED, status)
        answers = self._answers.get(key)
        if answers is None:
            times = self._times.setdefault(key[:2], _Times())
            answers = self._answers[key] = _Answers(times)
        answers.count += 1
        answers.times.seconds.add(seconds)

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "progressdb_http_requests",
            "Requests answered, by route, method and status.",
            labels=("route", "method", "status"),
        )
        for (route, method, status), answers in self._answers.items():
            requests.add_metric((route, method, str(status)), answers.count, created=answers.created)
        yield requests
        latency = HistogramMetricFamily(
            _DURATION, "Time from a request's head to the end of its answer.", labels=("route", "method")
        )
        for labels, times in self._times.items():
            latency.add_metric(labels, buckets=times.seconds.buckets(), sum_value=times.seconds.sum)
            latency.add_sample(f"{_DURATION}_created", {"route": labels[0], "method": labels[1]}, times.created)
        yield latency
        yield GaugeMetricFamily(
            "progressdb_http_requests_in_flight", "Requests that are being served.", value=self._in_flight
        )

    async def answer(self, call: Call) -> Answer:
        """The text format of Prometheus."""
        return Answer(200, generate_latest(self.registry), (b"content-type", CONTENT_TYPE_LATEST.encode("ascii")))
