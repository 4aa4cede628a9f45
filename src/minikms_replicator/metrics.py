"""The metrics of the replicator, on a listener of this host alone.

Owns: their names (docs/metrics.md). They have no label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class Figures(NamedTuple):
    """`confirmed_s`: since the last confirmed commit; None before the first."""

    serving: bool
    commits: int
    commit_s: float
    failures: int
    confirmed_s: float | None


class ReplicatorCollector(Collector):
    """`read` gives the figures of now."""

    def __init__(self, read: Callable[[], Figures]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        values = self._read()
        yield GaugeMetricFamily("minikms_replicator_serving", "1 while its member has the lease.", values.serving)
        yield CounterMetricFamily("minikms_replicator_commits", "Confirmed commits.", values.commits)
        yield CounterMetricFamily("minikms_replicator_commit_seconds", "Their duration in all.", values.commit_s)
        yield CounterMetricFamily(
            "minikms_replicator_failures", "Failures of the database and of the key service.", values.failures
        )
        if values.confirmed_s is not None:
            yield GaugeMetricFamily(
                "minikms_replicator_confirmed_seconds", "Since the last confirmed commit.", values.confirmed_s
            )
