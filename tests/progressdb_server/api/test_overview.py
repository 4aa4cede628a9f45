"""What the charts of the overview count."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry

from progressdb_server.api.routes.metrics import ApiMetrics
from progressdb_server.api.viewer.overview import totals
from progressdb_server.metrics import KmsMetrics, Mean


def test_appends_and_the_slowest_route_are_those_of_the_api() -> None:
    metrics, kms = ApiMetrics(CollectorRegistry()), KmsMetrics()
    routes = {
        "/v1/messages": 0.001,
        "/v1/threads/{thread}/messages": 0.002,
        "/v1/messages/{message}/reactions": 0.5,
        "/viewer/": 9.0,
    }
    for route, seconds in routes.items():
        request: Any = SimpleNamespace(route=route, method="POST")
        for _ in range(10 if route != "/v1/messages/{message}/reactions" else 3):
            metrics.finished(request, 200, seconds)
    assert totals(metrics, kms).appends == 20
    slowest = metrics.slowest()
    assert slowest is not None and slowest.name == "POST /v1/threads/{thread}/messages"
    assert kms.slowest() is None
    for _ in range(10):
        kms.exchanged(b"/encrypt", 0.25, answered=True)
    assert kms.slowest() == Mean(0.25, 10, "encrypt")
