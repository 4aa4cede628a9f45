"""Counts and times of the verbs, and the page of `/metrics`.

Owns: how often each verb is called and how long its answers take; the names of the key service's metrics
(docs/metrics.md) and their text format (Prometheus, version 0.0.4). Invariants:

- Every request that reaches a verb is counted once. An answer of the same turn of the event loop counts from the turn's
  first request to the end of the turn's audit write, which is an upper bound; an answer of a later turn has its own
  time. So the clock is read once a turn, not once a request.
- Every metric has its help and type; a scrape reads counters that exist already and the kernel's, and
  does no I/O.

No label may hold what a client sent, a key id, a thread id or a path.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from minikms.conditions import KEY_SERVICE, gauge
from minikms.platform import process_metrics
from minikms.platform.clock import unix_seconds

SECONDS: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Upper bounds. Only a rotation, or a failing disk, takes longer."""

T = TypeVar("T")


class WeightedHistogram:
    """Counts values by upper bound. `bounds` ascend; one more count is for values above all of them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Adds the same value `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class VerbTimes:
    """Used in the event loop's thread. `clock`: seconds, monotonic."""

    def __init__(self, verbs: Iterable[str], clock: Callable[[], float] = time.perf_counter) -> None:
        self.requests = dict.fromkeys(verbs, 0)
        self.seconds = {verb: WeightedHistogram(SECONDS) for verb in self.requests}
        self._clock = clock
        self._asked: list[str] = []
        self._began_s = 0.0

    def asked(self, verb: str) -> None:
        """A request has reached the verb."""
        requests = self._asked
        if not requests:
            self._began_s = self._clock()
        requests.append(verb)

    def later(self, answer: Awaitable[T]) -> Awaitable[T]:
        """The last request is answered by `answer` in a later turn. Returns what to await instead of it."""
        verb = self._asked.pop()
        self.requests[verb] += 1
        return self._timed(verb, self._clock(), answer)

    async def _timed(self, verb: str, began_s: float, answer: Awaitable[T]) -> T:
        try:
            return await answer
        finally:
            self.seconds[verb].add(self._clock() - began_s)

    def end_turn(self) -> None:
        """All requests of this turn but those given to `later` are answered."""
        requests = self._asked
        if not requests:
            return
        seconds = self._clock() - self._began_s
        count = requests.count(requests[0])
        counts = {requests[0]: count} if count == len(requests) else Counter(requests)
        for verb, count in counts.items():
            self.requests[verb] += count
            self.seconds[verb].add(seconds, count)
        requests.clear()


CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

Samples = Iterable[tuple[Mapping[str, str], float]]
_NONE: Final[dict[str, str]] = {}


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, help_text: str, samples: Samples) -> None:
        self._head(name, kind, help_text)
        for labels, value in samples:
            self._lines.append(f"{name}{_labels(labels)} {_number(value)}")

    def one(self, name: str, kind: str, help_text: str, value: float) -> None:
        self.add(name, kind, help_text, [(_NONE, value)])

    def histograms(self, name: str, help_text: str, label: str, by_label: Mapping[str, WeightedHistogram]) -> None:
        self._head(name, "histogram", help_text)
        for value, histogram in by_label.items():
            total = 0
            for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
                total += count
                self._lines.append(f"{name}_bucket{_labels({label: value, 'le': bound})} {total}")
            self._lines.append(f"{name}_sum{_labels({label: value})} {_number(histogram.sum)}")
            self._lines.append(f"{name}_count{_labels({label: value})} {total}")

    def _head(self, name: str, kind: str, help_text: str) -> None:
        self._lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]

    def encode(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    escaped = (value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') for value in labels.values())
    return "{" + ",".join(f'{name}="{value}"' for name, value in zip(labels, escaped, strict=True)) + "}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _labelled(label: str, values: Mapping[str, int]) -> Samples:
    return [({label: name}, value) for name, value in values.items()]


POLICY_REFUSALS: Final = (
    "proxy",
    "forbidden",
    "unknown_key",
    "requests_per_second",
    "concurrent",
    "decrypts_per_hour",
    "reencrypts_per_hour",
)
"""Why a policy refuses requests, and items of batches."""


def page(
    status: Mapping[str, Any],
    *,
    times: VerbTimes,
    batches: Mapping[str, WeightedHistogram],
    policy_refusals: Mapping[str, int],
) -> bytes:
    """`status` is what `minikms_daemon.server.status.StatusPage.build` returns; `batches`: sizes of batches by verb."""
    page = _Page()
    _add_requests(page, status, times, batches)
    _add_keys(page, status)
    _add_rotation(page, status["rotation"])
    _add_audit(page, status["audit"], status["uptime_seconds"])
    _add_policy(page, status["policy"] or {}, policy_refusals)
    if status["replica"] is not None:
        _add_replica(page, status["replica"], status["uptime_seconds"])
    _add_process(page, status)
    return page.encode()


def _add_requests(
    page: _Page, status: Mapping[str, Any], times: VerbTimes, batches: Mapping[str, WeightedHistogram]
) -> None:
    http = status["http"]
    page.add("minikms_requests_total", "counter", "Requests that reached a verb.", _labelled("verb", times.requests))
    page.one("minikms_http_requests_total", "counter", "Requests whose head was read.", http["requests"])
    page.one("minikms_http_refused_total", "counter", "Inputs that were not a request.", http["refused"])
    page.one("minikms_http_connections", "gauge", "Open connections.", http["connections"])
    page.one("minikms_http_connections_max", "gauge", "Connections admitted.", http["connections_max"])
    page.one("minikms_http_unread_bytes", "gauge", "Answers and requests that wait.", http["unread_bytes"])
    failures = http["accept_failures"]
    page.one("minikms_http_accept_failures_total", "counter", "Failures of accept(2).", failures)
    used = {verb: histogram for verb, histogram in times.seconds.items() if any(histogram.counts)}
    page.histograms("minikms_request_duration_seconds", "From the request to the end of the audit write.", "verb", used)
    page.histograms("minikms_batch_items", "Items of a batch.", "verb", batches)


def _add_keys(page: _Page, status: Mapping[str, Any]) -> None:
    keys, memory = status["keys"], status["memory"]
    by_state = {"active": 0, "retired": 0, **keys["by_state"], "destroyed": keys["destroyed"]}
    page.add("minikms_keys", "gauge", "Keys by state.", _labelled("state", by_state))
    by_kek = _labelled("kek_version", keys["by_kek_version"])
    page.add("minikms_keys_by_kek", "gauge", "Keys by the KEK version that wraps them.", by_kek)
    made_at = [({"kek_version": str(kek["version"])}, unix_seconds(kek["created_at"])) for kek in status["keks"]]
    page.add("minikms_kek_created_timestamp_seconds", "gauge", "When each KEK was made.", made_at)
    page.one("minikms_keys_unreadable", "gauge", "Key files that can't be read.", keys["unreadable"])
    page.one("minikms_keys_indexing", "gauge", "1 while a start still reads key files.", keys["indexing"])
    page.one("minikms_cache_keys", "gauge", "Opened keys in locked memory.", memory["keys_in_memory"])
    page.one("minikms_cache_hits_total", "counter", "Keys found opened.", memory["cache_hits"])
    page.one("minikms_cache_misses_total", "counter", "Keys that had to be opened.", memory["cache_misses"])
    page.one("minikms_cache_evictions_total", "counter", "Keys dropped by number or age.", memory["cache_evictions"])


def _add_rotation(page: _Page, rotation: Mapping[str, Any] | None) -> None:
    running = rotation or {"rewrapped": 0, "total": 0, "last_error": ""}
    page.one(
        "minikms_kek_rotation_running", "gauge", "1 while a KEK rotation runs or is about to.", rotation is not None
    )
    page.one("minikms_kek_rotation_rewrapped", "gauge", "Keys rewrapped by the one that runs.", running["rewrapped"])
    page.one("minikms_kek_rotation_keys", "gauge", "Keys there are, for the one that runs.", running["total"] or 0)
    failing = bool(running["last_error"])
    page.one("minikms_kek_rotation_failing", "gauge", "1 while the one that runs is held up by an error.", failing)


def _add_audit(page: _Page, audit: Mapping[str, Any], uptime_seconds: int) -> None:
    page.one("minikms_audit_lines_total", "counter", "Lines of the audit log.", audit["head"]["seq"])
    page.one("minikms_audit_writable", "gauge", "1 while the audit log can be written.", audit["writable"])
    page.one("minikms_audit_synced", "gauge", "1 when all of it is on the disk.", audit["synced"])
    dropped = audit["events_dropped"]
    page.one("minikms_audit_dropped_total", "counter", "Events that could not be written.", dropped)
    page.one("minikms_audit_segment_bytes", "gauge", "Size of the current segment.", audit["segment_bytes"])
    position = audit["position"] or {"seq": 0, "age_seconds": 0, "lag_lines": 0}
    page.one("minikms_audit_position_line", "gauge", "Last line that an auditor has taken.", position["seq"])
    age = uptime_seconds if position["age_seconds"] is None else position["age_seconds"]
    page.one("minikms_audit_position_age_seconds", "gauge", "Since its last report, or since the start.", age)
    page.one("minikms_audit_lag_lines", "gauge", "Durable lines that it has not taken.", position["lag_lines"])
    page.one("minikms_audit_reserve_bytes", "gauge", "Disk space reserved for its last lines.", audit["reserve_bytes"])


def _add_policy(page: _Page, policy: Mapping[str, Any], refusals: Mapping[str, int]) -> None:
    by_reason = {reason: refusals.get(reason, 0) for reason in POLICY_REFUSALS}
    page.add("minikms_policy_refusals_total", "counter", "Refusals by the policy.", _labelled("reason", by_reason))
    page.one(
        "minikms_policy_generation", "gauge", "Rises with each policy; 0 without one.", policy.get("generation", 0)
    )
    page.one(
        "minikms_policy_age_seconds", "gauge", "Seconds since the policy came into force.", policy.get("age_seconds", 0)
    )
    failed = bool(policy.get("last_error"))
    page.one("minikms_policy_reload_failed", "gauge", "1 while the file on disk is not in force.", failed)
    exhausted = policy.get("budgets_exhausted", 0)
    page.one("minikms_policy_budgets_exhausted", "gauge", "Hourly budgets that refuse requests now.", exhausted)


def _add_replica(page: _Page, replica: Mapping[str, Any], uptime_seconds: int) -> None:
    page.one("minikms_replica_serving", "gauge", "1 while this host serves.", replica["mode"] == "serving")
    page.one("minikms_replica_term", "gauge", "Of the last change here.", replica["term"])
    page.one("minikms_replica_lease_seconds", "gauge", "Left of the lease of this host.", replica["lease_seconds"])
    page.one(
        "minikms_replica_lag_changes", "gauge", "Changes of the database that are not here.", replica["lag_changes"]
    )
    heard = uptime_seconds if replica["heard_seconds"] is None else replica["heard_seconds"]
    page.one("minikms_replica_heard_seconds", "gauge", "Since the last request of the replicator, or the start.", heard)


def _add_process(page: _Page, status: Mapping[str, Any]) -> None:
    hardening = [({"measure": str(measure["measure"])}, measure["in_force"]) for measure in status["hardening"]]
    page.add("minikms_hardening", "gauge", "1 where a measure is in force.", hardening)
    page.one("minikms_memory_locked_bytes", "gauge", "Memory for raw keys.", status["memory"]["locked_bytes"])
    page.one("minikms_disk_free_bytes", "gauge", "For data and audit log, the lesser.", status["disk_free_bytes"])
    page.one("minikms_root_slots", "gauge", "Root keys that open the keyring.", len(status["root"]["slots"]))
    lease = status["root"].get("lease") or {"outcomes": {}}
    left = [(_NONE, lease["left_seconds"])] if "left_seconds" in lease else []
    page.add("minikms_root_lease_seconds", "gauge", "Left of the lease of the root key.", left)
    outcomes = _labelled("outcome", lease["outcomes"])
    page.add("minikms_root_lease_questions_total", "counter", "Questions to the unlock service.", outcomes)
    page.one("minikms_epoch", "gauge", "Rises with every start and keyring write.", status["epoch"])
    page.one("minikms_up", "gauge", "1 when it serves, 0 while verbs are refused.", status.get("status") == "ok")
    page.one("minikms_warnings", "gauge", "Warnings in /status.", len(status["warnings"]))
    held = gauge(KEY_SERVICE, status["conditions"])
    page.add("minikms_condition", "gauge", "1 while something is wrong, by condition and severity.", held)
    for sample in process_metrics.samples("minikms_build_info"):
        page.add(sample.name, sample.kind, sample.text, [(sample.labels, sample.value)])
