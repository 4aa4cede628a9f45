"""The metrics of the gateway, on a listener of their own.

Owns: their names (docs/metrics.md). No label may hold what a peer sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Values(NamedTuple):
    """What the process counts. Times are in Unix seconds."""

    requests: dict[str, int]
    refused: dict[str, int]
    connections: int
    handshakes: int
    kms_connections: int
    kms_waiting: int
    kms_reachable: bool
    reload_failed: bool
    certificate_until: float
    crl_until: float | None


class GatewayCollector(Collector):
    """`read` gives what the process counts."""

    def __init__(self, read: Callable[[], Values]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        values = self._read()
        requests = CounterMetricFamily("minikms_gateway_requests", "Requests sent to the key service.", labels=["verb"])
        for verb, count in values.requests.items():
            requests.add_metric([verb], count)
        yield requests
        refused = CounterMetricFamily("minikms_gateway_refused", "Peers and requests refused.", labels=["reason"])
        for reason, count in values.refused.items():
            refused.add_metric([reason], count)
        yield refused
        for name, text, value in _gauges(values):
            if value is not None:
                yield GaugeMetricFamily(name, text, value)


def _gauges(values: Values) -> Iterable[tuple[str, str, float | None]]:
    yield "minikms_gateway_connections", "Open connections after their handshake.", values.connections
    yield "minikms_gateway_handshakes", "Handshakes that have not ended.", values.handshakes
    yield "minikms_gateway_kms_connections", "Open connections to the key service.", values.kms_connections
    yield "minikms_gateway_kms_waiting", "Requests that wait for a connection to it.", values.kms_waiting
    yield "minikms_gateway_kms_reachable", "0 if the last attempt to reach it failed.", values.kms_reachable
    yield "minikms_gateway_reload_failed", "1 while changed files are not valid.", values.reload_failed
    yield "minikms_gateway_certificate_expiry_timestamp_seconds", "When its own expires.", values.certificate_until
    yield "minikms_gateway_crl_expiry_timestamp_seconds", "When the first expires.", values.crl_until
