"""The order of a run, and which tests `make quick` leaves out, from the durations that a run has measured.

Owns `tests/durations.txt`, which `make durations` writes: for each function of some weight its own seconds (all its
cases), the seconds of the shared fixtures that it uses, and its id. Invariants: the longest unit begins first; a module
with dear fixtures is one unit, so that they are made once; a test that ends its worker is not run again. A function
that is not in the file is quick. A plugin of pytest, which conftest.py registers.
"""

import functools
import itertools
import time
from collections import defaultdict
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from xdist.scheduler import LoadScopeScheduling

PATH = Path(__file__).with_name("durations.txt")
QUICK_SHARE = 0.02
"""`make quick` runs the shortest functions, as many as take this share of all seconds in the file."""
SMOKE = "tests/whole/test_smoke.py"
"""Always quick: one test for each program."""
WEIGHT_S_MIN = 0.05
"""A function that takes less is not in the file."""
UNIT_S_MAX = 20.0
"""A module that takes longer is divided into its functions, unless its fixtures are dear."""
DEAR_S = 1.0
SLOWEST = 10
"""How many tests CI names."""


class Duration(NamedTuple):
    own_s: float
    shared_s: float


@functools.cache
def kept() -> dict[str, Duration]:
    """The durations in the file, by function."""
    lines = (line.split() for line in PATH.read_text().splitlines())
    return {function: Duration(float(own_s), float(shared_s)) for own_s, shared_s, function in lines}


def function_of(nodeid: str) -> str:
    """The id of a test without its parameters."""
    return nodeid.partition("[")[0]


def module_of(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@functools.cache
def modules() -> dict[str, Duration]:
    """The durations in the file, by module."""
    own, shared = defaultdict[str, float](float), defaultdict[str, float](float)
    for function, duration in kept().items():
        own[module_of(function)] += duration.own_s
        shared[module_of(function)] = max(shared[module_of(function)], duration.shared_s)
    return {module: Duration(own[module], shared[module]) for module in own}


@functools.cache
def slow() -> frozenset[str]:
    """The functions that `make quick` leaves out. The seconds of one count with the fixtures that it shares."""
    shortest = sorted(kept(), key=lambda function: sum(kept()[function]))
    sums = itertools.accumulate(kept()[function].own_s for function in shortest)
    whole = sum(duration.own_s for duration in kept().values())
    left = {function for function, seconds in zip(shortest, sums, strict=True) if seconds > QUICK_SHARE * whole}
    return frozenset(function for function in left if module_of(function) != SMOKE)


class LongestFirst(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives each worker the longest unit that is left: a module, or a function of a long module."""

    def _split_scope(self, nodeid: str) -> str:
        own_s, shared_s = modules().get(module_of(nodeid), (0.0, 0.0))
        return function_of(nodeid) if own_s > UNIT_S_MAX and shared_s < DEAR_S else module_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        longest = max(self.workqueue, key=lambda unit: sum(modules().get(unit) or kept().get(unit) or ()))
        self.workqueue.move_to_end(longest, last=False)
        super()._assign_work_unit(node)

    def remove_node(self, node: Any) -> str | None:
        """Gives the tests of a worker that has ended to others, but not the one that ended it, which this returns."""
        units: dict[str, dict[str, bool]] = self.assigned_work.pop(node)
        left = [(unit, nodeid) for unit, tests in units.items() for nodeid, done in tests.items() if not done]
        if not left:
            return None
        unit, ending = left[0]
        units[unit][ending] = True
        self.workqueue.update((unit, units[unit]) for unit, _ in left[1:])
        for other in self.assigned_work:
            self._reschedule(other)
        return ending


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LongestFirst | None:
    return LongestFirst(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is not quick, where only that is asked for."""
    if config.getoption("quick"):
        left_out = [item for item in items if function_of(item.nodeid) in slow()]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if function_of(item.nodeid) not in slow()]


# --- measuring ------------------------------------------------------------------------------------------------------

_shared: dict[tuple[str, str], float] = {}
"""The seconds of each shared fixture, by the node that owns it and its name."""
_counted: set[tuple[str, str]] = set()
"""Those that the duration of an earlier phase had in it."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    begin = time.perf_counter()
    result = yield
    if fixturedef.scope != "function":
        place = request.node.nodeid, fixturedef.argname
        _shared[place] = time.perf_counter() - begin
        _counted.discard(place)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the own and the shared seconds of a test; xdist passes them on."""
    report = yield
    used = {(node.nodeid, name) for node in item.listchain() for name in getattr(item, "fixturenames", ())}
    used &= _shared.keys()
    shared_s = sum(_shared[place] for place in used)
    own_s = report.duration - sum(_shared[place] for place in used - _counted)
    report.__dict__["parts"] = [own_s, shared_s]
    _counted.update(used)
    return report


def write(reports: Iterable[pytest.TestReport]) -> None:
    """Replaces what the file says of each module that ran. A test that was skipped keeps its duration."""
    phases = [report for report in reports if report.when != "teardown"]  # in it the last test of a module pays for all
    own, shared = defaultdict[str, float](float), defaultdict[str, float](float)
    for report in phases:
        own_s, shared_s = report.__dict__.get("parts", (0.0, 0.0))  # a test that ended its worker has none
        own[function_of(report.nodeid)] += own_s
        shared[function_of(report.nodeid)] = max(shared[function_of(report.nodeid)], shared_s)
    skipped = {function_of(report.nodeid) for report in phases if report.skipped}
    ran = {module_of(report.nodeid) for report in phases}
    durations = {function: Duration(own[function], shared[function]) for function in own if function not in skipped}
    for function, duration in kept().items():
        if function in skipped or module_of(function) not in ran:
            durations[function] = duration
    lines = [
        f"{duration.own_s:.2f} {duration.shared_s:.2f} {function}\n"
        for function, duration in sorted(durations.items())
        if sum(duration) >= WEIGHT_S_MIN
    ]
    PATH.write_text("".join(lines))


def summary(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Lines with the slowest tests, and the seconds of the tests of each room."""
    tests, rooms = defaultdict[str, float](float), defaultdict[str, float](float)
    for report in reports:
        tests[report.nodeid] += report.duration
        rooms["/".join(report.nodeid.split("/")[1:-1][:2])] += report.duration
    slowest = sorted(tests.items(), key=lambda pair: -pair[1])[:SLOWEST]
    return [
        *(f"slow {seconds:6.1f} s: {nodeid}" for nodeid, seconds in slowest),
        *(f"room {seconds:6.1f} s: {room}" for room, seconds in sorted(rooms.items(), key=lambda pair: -pair[1])),
    ]
