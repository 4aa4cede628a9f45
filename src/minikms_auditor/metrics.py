"""The metrics of the auditor, on a listener of this host alone.

Owns: their names (docs/metrics.md). No label may hold what a peer sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minikms_auditor.auditor import Status


class AuditorCollector(Collector):
    """`read` gives the status of the last step."""

    def __init__(self, read: Callable[[], Status]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        status = self._read()
        for name, text, value in _gauges(status):
            yield GaugeMetricFamily(name, text, value)
        cosigned = GaugeMetricFamily(
            "minikms_auditor_witness_cosigned_seconds", "Unix time of its last cosignature.", labels=["witness"]
        )
        for witness in status.witnesses:  # named by the configuration
            cosigned.add_metric([witness.name], witness.cosigned_at)
        yield cosigned


def _gauges(status: Status) -> Iterable[tuple[str, str, float]]:
    yield "minikms_auditor_alarm", "1 while nothing is signed because something is wrong.", bool(status.alarm)
    yield "minikms_auditor_errors", "What fails now: the key service, a signer, the disk.", len(status.errors)
    yield "minikms_auditor_tree_size", "Leaves of the tree.", status.size
    yield "minikms_auditor_published_size", "Leaves under the published tree checkpoint.", status.published_size
    yield "minikms_auditor_witnessed_seconds", "Unix time at which a quorum knew no larger tree.", status.witnessed_at
    yield (
        "minikms_auditor_lag_lines",
        "Durable lines that are not under the published tree checkpoint.",
        status.lag_lines,
    )
    yield "minikms_auditor_step_seconds", "Unix time of the last step.", status.updated_at
