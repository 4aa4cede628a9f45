"""What the server counts of its key service, as a collector for a Prometheus registry.

Owns: how long exchanges took and which were not answered, and what the key service last said of itself (the server
asks every few seconds, see `store.conversations`). Invariants: labels are the names of verbs and states, never an id;
an exchange costs one look-up and a few additions. It must never ask the key service anything itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SECONDS: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_UP: Final = "1 when the key service answered the last time that it was asked for its status."


class _Verb:
    __slots__ = ("counts", "failures", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.seconds = 0.0
        self.failures = 0


def _verb(target: bytes) -> str:
    """The verb of a target: its first part, which holds no id."""
    return target.partition(b"?")[0].split(b"/", 2)[1].decode("ascii")


class KmsMetrics(Collector):
    def __init__(self) -> None:
        self._verbs: dict[str, _Verb] = {}
        self._up = False
        self._status: Mapping[str, Any] = {}

    def exchanged(self, target: bytes, seconds: float, answered: bool) -> None:
        name = _verb(target)
        verb = self._verbs.get(name)
        if verb is None:
            verb = self._verbs[name] = _Verb()
        if answered:
            verb.counts[bisect_left(SECONDS, seconds)] += 1
            verb.seconds += seconds
        else:
            verb.failures += 1

    def seen(self, status: Mapping[str, Any]) -> None:
        self._status = status
        self._up = status.get("status") == "ok"

    def lost(self) -> None:
        self._up = False

    def collect(self) -> Iterator[Metric]:
        latency = HistogramMetricFamily(
            "progressdb_kms_request_seconds", "Time of one exchange with the key service.", labels=["verb"]
        )
        failures = CounterMetricFamily(
            "progressdb_kms_failures", "Exchanges that the key service did not answer.", labels=["verb"]
        )
        for name, verb in self._verbs.items():
            latency.add_metric([name], buckets=_cumulated(verb.counts), sum_value=verb.seconds)
            failures.add_metric([name], verb.failures)
        yield latency
        yield failures
        yield GaugeMetricFamily("progressdb_kms_up", _UP, value=self._up)
        keys = self._status.get("keys")
        if isinstance(keys, Mapping):
            by_state = GaugeMetricFamily("progressdb_kms_keys", "Keys by state, as last seen.", labels=["state"])
            states = {"active": 0, "retired": 0, **keys.get("by_state", {}), "destroyed": keys.get("destroyed", 0)}
            for state, count in states.items():
                by_state.add_metric([state], count)
            yield by_state


def _cumulated(counts: list[int]) -> list[tuple[str, float]]:
    total = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, SECONDS), "+Inf"), counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
