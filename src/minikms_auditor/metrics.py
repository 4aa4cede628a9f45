"""The metrics of the auditor, on a listener of this host alone.

Owns: their names (docs/metrics.md). No label may hold what a peer sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minikms_auditor.auditor import Status
from minikms_auditor.sinks import SinkStatus

_SINK_METRICS: Final[tuple[tuple[str, str, Callable[[SinkStatus], float]], ...]] = (
    ("minikms_auditor_sink_lag_lines", "Lines of the tree that the receiver does not have.", lambda it: it.lag_lines),
    ("minikms_auditor_sink_delivered_timestamp_seconds", "When it last succeeded.", lambda it: it.delivered_at),
    ("minikms_auditor_sink_failures_total", "Failed attempts since the start.", lambda it: it.failures),
    ("minikms_auditor_sink_rejected_lines", "Lines in its file of rejected lines.", lambda it: it.rejected),
    ("minikms_auditor_sink_waits", "1 while it waits for `minikms-auditor skip`.", lambda it: bool(it.waits_at)),
)


class AuditorCollector(Collector):
    """`read` gives the status of the last step."""

    def __init__(self, read: Callable[[], Status]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        status = self._read()
        for name, text, value in _gauges(status):
            yield GaugeMetricFamily(name, text, value)
        cosigned = GaugeMetricFamily(
            "minikms_auditor_witness_cosigned_timestamp_seconds", "When it last cosigned.", labels=["witness"]
        )
        for witness in status.witnesses:  # named by the configuration
            cosigned.add_metric([witness.name], witness.cosigned_at)
        yield cosigned
        for name, text, of in _SINK_METRICS:
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(name, text, labels=["sink"])
            for sink in status.sinks:  # named by the configuration
                family.add_metric([sink.name], of(sink))
            yield family


def _gauges(status: Status) -> Iterable[tuple[str, str, float]]:
    yield "minikms_auditor_alarm", "1 while nothing is signed because something is wrong.", bool(status.alarm)
    yield "minikms_auditor_errors", "What fails now: the key service, a signer, the disk.", len(status.errors)
    yield "minikms_auditor_tree_size", "Leaves of the tree.", status.size
    yield "minikms_auditor_published_size", "Leaves under the published tree checkpoint.", status.published_size
    yield "minikms_auditor_witnessed_timestamp_seconds", "When a quorum knew no larger tree.", status.witnessed_at
    yield (
        "minikms_auditor_lag_lines",
        "Durable lines that are not under the published tree checkpoint.",
        status.lag_lines,
    )
    yield "minikms_auditor_step_timestamp_seconds", "When the last step ended.", status.updated_at
