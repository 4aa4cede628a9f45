"""The metrics of the gateway, on a listener of their own.

Owns: their names (docs/metrics.md). No label may hold what a peer sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

GAUGES: Final = {
    "minikms_gateway_connections": "Open connections after their handshake.",
    "minikms_gateway_handshakes": "Handshakes that have not ended.",
    "minikms_gateway_kms_connections": "Open connections to the key service.",
    "minikms_gateway_kms_waiting": "Requests that wait for a connection to it.",
    "minikms_gateway_kms_reachable": "0 if the last attempt to reach it failed.",
    "minikms_gateway_reload_failed": "1 while changed files are not valid.",
    "minikms_gateway_certificate_expiry_timestamp_seconds": "When its own expires.",
    "minikms_gateway_crl_expiry_timestamp_seconds": "When the first expires.",
}


@dataclass(eq=False)
class GatewayCollector(Collector):
    """What the process counts. `read` gives the values of the gauges, without those that there are not. Times are in
    Unix seconds."""

    requests: Mapping[str, int]
    refused: Mapping[str, int]
    read: Callable[[], Mapping[str, float | None]]

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily("minikms_gateway_requests", "Requests sent to the key service.", labels=["verb"])
        for verb, count in self.requests.items():
            requests.add_metric([verb], count)
        yield requests
        refused = CounterMetricFamily("minikms_gateway_refused", "Peers and requests refused.", labels=["reason"])
        for reason, count in self.refused.items():
            refused.add_metric([reason], count)
        yield refused
        for name, value in self.read().items():
            if value is not None:
                yield GaugeMetricFamily(name, GAUGES[name], value)
