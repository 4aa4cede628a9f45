"""Traces of the message server: a span for each request, with its exchanges with the key service.

Owns: what a span says of a request. Invariant: without OTEL_TRACES_EXPORTER nothing of this room is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry

from minikms.processes.tracing import EXCHANGES_MAX, TracedExchange, Tracing
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.kms.provider import READING
from progressdb_server.metrics import KmsMetrics, verb_of

_TRACEPARENT: Final = b"traceparent"


class TracedMetrics(ApiMetrics):
    """Counts a request, and makes its span."""

    def __init__(self, registry: CollectorRegistry, tracing: Tracing) -> None:
        super().__init__(registry)
        self._tracing = tracing

    def finished(self, request: ApiRequest, status: int, seconds: float) -> None:
        super().finished(request, status, seconds)
        ended_ns, reading = time.time_ns(), READING.get()
        traceparent = request.headers.get(_TRACEPARENT)
        self._tracing.request(
            f"{request.method} {request.route}" if request.route else "other",
            traceparent=None if traceparent is None else traceparent.decode("latin-1"),
            began_ns=ended_ns - int(seconds * 1e9),
            ended_ns=ended_ns,
            failed=status >= 500,
            attributes={
                "http.request.method": request.method if request.route else "_OTHER",
                "http.response.status_code": status,
                "http.route": request.route,
                "progressdb.request_id": request.request_id,
            },
            exchanges=() if reading is None else reading.exchanges,
        )


def traced_exchanges(metrics: KmsMetrics) -> Callable[[bytes, float, bool], None]:
    """Counts an exchange, and notes it for the span of the request that made it. One that several requests share, such
    as a group of appends, belongs to none.
    """

    def exchanged(target: bytes, seconds: float, answered: bool) -> None:
        metrics.exchanged(target, seconds, answered)
        reading = READING.get()
        if reading is not None and len(reading.exchanges) < EXCHANGES_MAX:
            ended_ns = time.time_ns()
            exchange = TracedExchange(verb_of(target), ended_ns - int(seconds * 1e9), ended_ns, answered)
            reading.exchanges = (*reading.exchanges, exchange)

    return exchanged
