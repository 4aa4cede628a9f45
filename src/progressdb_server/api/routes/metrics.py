"""Metrics of the API, and the page `/metrics`.

Owns: the counts of requests and their durations, and the response with all metrics of the registry. Invariants: label
values come from the table of operations and from statuses, never from a client, so that their number is bounded; each
server has its own registry, and none is made at import. The counts are plain numbers that the event loop's thread
changes and a scrape reads: the library's own metrics take a lock for each change.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from minikms.api import Condition
from minikms.conditions import KEY_SERVICE, gauge
from progressdb_server.api.gate.keys import OPERATORS
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import ApiResponse
from progressdb_server.api.openapi.description import NOTHING, TEXT, Operation
from progressdb_server.conditions import SERVER, Look
from progressdb_server.metrics import Histogram, Mean, mean_of

_LATENCY_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_DURATION: Final = "progressdb_http_request_duration_seconds"
_UNROUTED: Final = "other"
LABELS: Final = ("condition", "severity")


class _Responses:
    """The responses of one route, method and status."""

    __slots__ = ("count", "created", "times")

    def __init__(self, times: _Times) -> None:
        self.count = 0
        self.created = time.time()
        self.times = times


class _Times:
    """The durations of one route and method."""

    __slots__ = ("created", "seconds")

    def __init__(self) -> None:
        self.seconds = Histogram(_LATENCY_BUCKETS_S)
        self.created = time.time()


class ApiMetrics(Collector):
    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.look: Look | None = None
        self._conditions: list[Condition] = []
        self._in_flight = 0
        self._responses: dict[tuple[str, str, int], _Responses] = {}
        self._times: dict[tuple[str, str], _Times] = {}
        registry.register(self)

    def started(self) -> None:
        self._in_flight += 1

    def finished(self, request: ApiRequest, status: int, seconds: float) -> None:
        """Count a request. One without a route was refused before routing, or its path is unknown."""
        self._in_flight -= 1
        route = request.route
        key = (route, request.method, status) if route else (_UNROUTED, _UNROUTED, status)
        responses = self._responses.get(key)
        if responses is None:
            times = self._times.setdefault(key[:2], _Times())
            responses = self._responses[key] = _Responses(times)
        responses.count += 1
        responses.times.seconds.add(seconds)

    def counted(self, method: str, pattern: re.Pattern[str]) -> int:
        """The answers of a method on routes that match, without errors."""
        return sum(
            one.count
            for (route, by, status), one in self._responses.items()
            if by == method and status < 400 and pattern.fullmatch(route)
        )

    def slowest(self) -> Mean | None:
        """The slowest route of the API; None before one was asked SLOW_COUNT_MIN times."""
        means = (
            mean_of(f"{method} {route}", times.seconds)
            for (route, method), times in self._times.items()
            if route.startswith("/v1/")
        )
        return max((one for one in means if one is not None), default=None)

    def answered(self) -> tuple[int, float, int]:
        """All answers, the seconds that they took, and those that were errors of the server."""
        seconds = sum(times.seconds.sum for times in self._times.values())
        errors = sum(one.count for (_, _, status), one in self._responses.items() if status >= 500)
        return sum(one.count for one in self._responses.values()), seconds, errors

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "progressdb_http_requests",
            "Requests answered, by route, method and status.",
            labels=("route", "method", "status"),
        )
        for (route, method, status), responses in self._responses.items():
            requests.add_metric((route, method, str(status)), responses.count, created=responses.created)
        yield requests
        latency = HistogramMetricFamily(
            _DURATION, "Time from a request's head to the end of its answer.", labels=("route", "method")
        )
        for labels, times in self._times.items():
            latency.add_metric(labels, buckets=times.seconds.buckets(), sum_value=times.seconds.sum)
            latency.add_sample(f"{_DURATION}_created", {"route": labels[0], "method": labels[1]}, times.created)
        yield latency
        held = GaugeMetricFamily(
            "progressdb_condition", "1 while something is wrong, by condition and severity.", labels=LABELS
        )
        for samples, value in gauge({**SERVER, **KEY_SERVICE}, self._conditions):
            held.add_metric([samples[name] for name in LABELS], value)
        yield held
        yield GaugeMetricFamily(
            "progressdb_http_requests_in_flight", "Requests that are being served.", value=self._in_flight
        )

    @Operation("GET", "/metrics", roles=OPERATORS, response=TEXT, content_type="text/plain", needs=NOTHING)
    async def page(self, request: ApiRequest) -> ApiResponse:
        """Read the metrics in the text format of Prometheus."""
        self._conditions = await self.look.conditions() if self.look else []
        return ApiResponse(200, generate_latest(self.registry), (b"content-type", CONTENT_TYPE_LATEST.encode("ascii")))
