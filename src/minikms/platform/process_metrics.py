"""What each process reports of itself to Prometheus: its build, and the metrics of Prometheus' own libraries.

Owns: what was installed (`Build`), the names and texts of these metrics, and the descriptors of procfs that they are
read from. Invariant: the descriptors are opened once in a process, because a hardened one can't open them; what could
not be opened is not reported.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from minikms.platform.clock import boot_ns

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector

_STAT_BYTES_MAX: Final = 4096
# proc_pid_stat(5): the fields after the name of the program, from 0
_START_TICKS: Final = 19
_RESIDENT_PAGES: Final = 21


class Sample(NamedTuple):
    name: str
    kind: Literal["counter", "gauge"]
    text: str
    value: float
    labels: dict[str, str] = {}  # noqa: RUF012  never changed


class Build(NamedTuple):
    """`commit`: of the release or archive; empty in a checkout. `python`: the interpreter's version."""

    version: str
    commit: str
    python: str


def build() -> Build:
    from importlib import metadata

    commit = Path(__file__).parents[1].joinpath("COMMIT").read_text("utf-8").strip()  # git archive(1) writes it
    python = ".".join(map(str, sys.version_info[:3]))
    return Build(metadata.version("progressdb-minikms"), "" if commit.startswith("$") else commit, python)


class _Process(NamedTuple):
    """`stat` and `descriptors` are descriptors of a file and a directory in procfs; None: it can't be read here."""

    build: Build
    stat: int | None
    descriptors: int | None
    started: float


_processes: dict[int, _Process] = {}
"""The open files of each process, by pid."""


def open_process_files(known: Build | None = None) -> _Process:
    """Called before the process is hardened, with its build if that is `known`."""
    pid = os.getpid()  # a forked process has its own
    if pid not in _processes:
        stat = _opened("/proc/self/stat", 0)
        started = 0.0
        if stat is not None:
            since_boot = int(_fields(stat)[_START_TICKS]) / os.sysconf("SC_CLK_TCK")
            started = time.time() - boot_ns() / 1e9 + since_boot
        _processes[pid] = _Process(known or build(), stat, _opened("/proc/self/fd", os.O_DIRECTORY), started)
    return _processes[pid]


def samples(build_info: str) -> Iterator[Sample]:
    """`build_info`: the name of the metric whose labels are the build."""
    process = open_process_files()
    yield Sample(build_info, "gauge", "1, with the build as labels.", 1, process.build._asdict())
    yield Sample("process_cpu_seconds_total", "counter", "Processor time, in seconds.", time.process_time())
    yield Sample("process_max_fds", "gauge", "Limit of open files.", resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if process.descriptors is not None:
        with contextlib.suppress(OSError):  # listing takes one more, and none may be left
            yield Sample("process_open_fds", "gauge", "Open files.", len(os.listdir(process.descriptors)))
    if process.stat is not None:
        resident = int(_fields(process.stat)[_RESIDENT_PAGES]) * resource.getpagesize()
        yield Sample("process_resident_memory_bytes", "gauge", "Memory in use.", resident)
        yield Sample("process_start_time_seconds", "gauge", "Unix time of the start.", process.started)


def collector(build_info: str) -> Collector:
    """The same for a registry of prometheus_client, which the key service does not import."""
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector

    class Samples(Collector):
        def collect(self) -> Iterator[Metric]:
            for sample in samples(build_info):
                family = Metric(sample.name.removesuffix("_total"), sample.text, sample.kind)
                family.add_sample(sample.name, sample.labels, sample.value)
                yield family

    return Samples()


def _opened(path: str, flags: int) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    except OSError:
        return None


def _fields(stat: int) -> list[bytes]:
    return os.pread(stat, _STAT_BYTES_MAX, 0).rpartition(b")")[2].split()
