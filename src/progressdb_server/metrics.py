"""The numbers that this process counts, as collectors for a Prometheus registry.

Owns: the histogram of this process, and what the store and the key service are counted by. Invariants: numbers are
plain ones, changed in the event loop's thread and read at a scrape, since the library's own take a lock for each
change; labels are fixed words (verbs, states, results) or addresses of the configuration, never an id or content. It
must never ask the store or the key service anything but the gauges that were registered here.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from minikms import api

COUNT_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Bucket bounds of a histogram of counts."""
COMMIT_BOUNDS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
EXCHANGE_BOUNDS_S: Final = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Histogram:
    """Counts of values by bucket, and their sum. `bounds` are inclusive upper bounds, ascending."""

    __slots__ = ("_bounds", "_counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """(bound as text, how many values are at most that), as `HistogramMetricFamily.add_metric` takes them."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*(str(float(bound)) for bound in self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets


SLOW_COUNT_MIN: Final = 10
"""Values of which a mean is shown."""


class Mean(NamedTuple):
    """The mean of `values`, in seconds. The largest sorts last."""

    seconds: float
    values: int
    name: str


def mean_of(name: str, histogram: Histogram) -> Mean | None:
    """None of fewer values than SLOW_COUNT_MIN."""
    count = histogram.count
    return Mean(histogram.sum / count, count, name) if count >= SLOW_COUNT_MIN else None


class StoreMetrics(Collector):
    """What the store counts. `gauges`: name → (help, function that is called at each scrape)."""

    def __init__(self) -> None:
        self.failures = 0
        self.cache_hits = 0
        self.cache_misses = 0
        self.key_waits = 0
        self.keys_renewed = 0
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._group_writes = Histogram(COUNT_BOUNDS)
        self._commit_seconds = Histogram(COMMIT_BOUNDS_S)
        self._opened = Histogram(COUNT_BOUNDS)

    def committed(self, writes: int, seconds: float) -> None:
        self._group_writes.add(writes)
        self._commit_seconds.add(seconds)

    def slowest(self) -> Mean | None:
        """The mean of a commit to the disk."""
        return mean_of("commit", self._commit_seconds)

    def opened(self, records: int) -> None:
        self._opened.add(records)

    def collect(self) -> Iterator[Metric]:
        for name, help_text, histogram in (
            ("progressdb_store_group_writes", "Writes committed as one group.", self._group_writes),
            ("progressdb_store_commit_seconds", "Time to put and sync a group.", self._commit_seconds),
            ("progressdb_store_decrypt_records", "Records decrypted in one batch.", self._opened),
        ):
            yield HistogramMetricFamily(name, help_text, buckets=histogram.buckets(), sum_value=histogram.sum)
        cache = CounterMetricFamily("progressdb_store_thread_cache", "Look-ups of a thread's key.", labels=["result"])
        cache.add_metric(["hit"], self.cache_hits)
        cache.add_metric(["miss"], self.cache_misses)
        yield cache
        for name, help_text, count in (
            ("progressdb_store_failures", "Groups that the disk refused.", self.failures),
            ("progressdb_store_keys_renewed", "New keys of threads whose key only decrypts.", self.keys_renewed),
            ("progressdb_store_key_waits", "Writes that waited for a thread's key to be switched.", self.key_waits),
        ):
            yield CounterMetricFamily(name, help_text, value=count)
        for name, (help_text, read) in self.gauges.items():
            yield GaugeMetricFamily(name, help_text, value=_read(read))


def _read(read: Callable[[], float]) -> float:
    try:
        return read()
    except Exception:  # noqa: BLE001  a gauge that reads a failing disk must not hide the metrics that report the failure
        return math.nan


def verb_of(target: bytes) -> str:
    """The first part of a request's target, which holds no id."""
    return target.partition(b"?")[0].split(b"/", 2)[1].decode("ascii")


class _Exchanges:
    __slots__ = ("failures", "seconds")

    def __init__(self) -> None:
        self.seconds = Histogram(EXCHANGE_BOUNDS_S)
        self.failures = 0


class KmsMetrics(Collector):
    """Exchanges with the key service, and what it last reported of itself (its status, asked every few seconds)."""

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        self.addresses = addresses
        self.address = ""
        """The one that served last, if the key service reported its status the last time."""
        self._verbs: dict[str, _Exchanges] = {}
        self._up = self._sealed = False
        self.exclusive = self.behind_gateway = False
        """The server's configuration: `kms.exclusive`, and whether `kms.url` is given."""
        self.last_status: api.StatusAnswer | None = None
        """None until the key service reported one, at `last_status_ns`."""
        self.last_status_ns = 0

    def exchanged(self, target: bytes, seconds: float, answered: bool) -> None:
        """`target`: of the request."""
        name = verb_of(target)
        verb = self._verbs.get(name)
        if verb is None:
            verb = self._verbs[name] = _Exchanges()
        if answered:
            verb.seconds.add(seconds)
        else:
            verb.failures += 1

    def answered(self, verbs: Collection[str]) -> int:
        """The exchanges of these verbs that the key service answered."""
        return sum(verb.seconds.count for name, verb in self._verbs.items() if name in verbs)

    def slowest(self) -> Mean | None:
        """The verb whose exchanges take longest in the mean."""
        means = (mean_of(name, verb.seconds) for name, verb in self._verbs.items())
        return max((one for one in means if one is not None), default=None)

    def seen(self, status: api.StatusAnswer) -> None:
        self._up = status.status == "ok"
        self._sealed = status.status == api.CODE_SEALED
        if not self._sealed:  # a sealed one knows neither keys nor epoch
            self.last_status = status
            self.last_status_ns = time.time_ns()

    def lost(self) -> None:
        self._up = self._sealed = False
        self.address = ""

    def collect(self) -> Iterator[Metric]:
        latency = HistogramMetricFamily(
            "progressdb_kms_request_duration_seconds", "Time of one exchange with the key service.", labels=["verb"]
        )
        failures = CounterMetricFamily(
            "progressdb_kms_failures", "Exchanges that the key service did not answer.", labels=["verb"]
        )
        for name, verb in self._verbs.items():
            latency.add_metric([name], buckets=verb.seconds.buckets(), sum_value=verb.seconds.sum)
            failures.add_metric([name], verb.failures)
        yield latency
        yield failures
        for name, help_text, is_so in (
            ("progressdb_kms_up", "1 when the key service said the last time that it serves.", self._up),
            ("progressdb_kms_sealed", "1 when the key service said the last time that it is sealed.", self._sealed),
            ("progressdb_kms_exclusive", "1 if only this server makes keys of threads there.", self.exclusive),
            ("progressdb_kms_gateway", "1 if the key service is behind a gateway (kms.url).", self.behind_gateway),
        ):
            yield GaugeMetricFamily(name, help_text, value=is_so)
        serving = GaugeMetricFamily(
            "progressdb_kms_serving", "1 for the address of the key service that serves.", labels=["address"]
        )
        for address in self.addresses:
            serving.add_metric([address], address == self.address)
        yield serving
        if self.last_status is not None:
            keys = self.last_status.keys
            by_state = GaugeMetricFamily("progressdb_kms_keys", "Keys by state, as last seen.", labels=["state"])
            states = {"active": 0, "retired": 0, **keys.by_state, "destroyed": keys.destroyed}
            for state, count in states.items():
                by_state.add_metric([state], count)
            yield by_state
