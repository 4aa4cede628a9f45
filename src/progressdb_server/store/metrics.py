"""What the store counts, as a collector for a Prometheus registry.

Owns: plain numbers, raised in the event loop's thread and read at a scrape. It must never hold ids or content: its
labels are fixed words.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SECONDS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Distribution:
    """Counts per bucket, as a histogram needs them."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def metric(self, name: str, help_text: str) -> Metric:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), total))
        return HistogramMetricFamily(name, help_text, buckets=buckets, sum_value=self._sum)


class StoreMetrics(Collector):
    """`gauges`: name → (help, function), read at each scrape."""

    def __init__(self) -> None:
        self.failures = 0
        self.cache_hits = 0
        self.cache_misses = 0
        self.key_waits = 0
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._group_writes = Distribution(SIZES)
        self._commit_seconds = Distribution(SECONDS)
        self._opened = Distribution(SIZES)

    def committed(self, writes: int, seconds: float) -> None:
        self._group_writes.add(writes)
        self._commit_seconds.add(seconds)

    def opened(self, records: int) -> None:
        self._opened.add(records)

    def collect(self) -> Iterator[Metric]:
        yield self._group_writes.metric("progressdb_store_group_writes", "Writes committed as one group.")
        yield self._commit_seconds.metric("progressdb_store_commit_seconds", "Time to put and sync a group.")
        yield self._opened.metric("progressdb_store_decrypt_records", "Records decrypted in one batch.")
        cache = CounterMetricFamily("progressdb_store_thread_cache", "Look-ups of a thread's key.", labels=["result"])
        cache.add_metric(["hit"], self.cache_hits)
        cache.add_metric(["miss"], self.cache_misses)
        yield cache
        yield CounterMetricFamily("progressdb_store_failures", "Groups that the disk refused.", value=self.failures)
        yield CounterMetricFamily(
            "progressdb_store_key_waits", "Writes that waited for a thread's key to be switched.", value=self.key_waits
        )
        for name, (help_text, read) in self.gauges.items():
            yield GaugeMetricFamily(name, help_text, value=_read(read))


def _read(read: Callable[[], float]) -> float:
    try:
        return read()
    except Exception:  # noqa: BLE001  one that asks a failing disk: the others, which tell of it, are needed just then
        return math.nan
