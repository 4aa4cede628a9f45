"""What every test shares: Hypothesis profiles, environment, process state, bytecode, time limits, event loops, the
report of skips, and a directory that other users can enter.

Owns no other fixture; each room keeps its own beside its tests.
Never start a process or touch the network here.
"""

import asyncio
import compileall
import functools
import gc
import inspect
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from tests import durations, needs

TORTURE_S_MAX = 3600
"""The longest that one torture test may take; the limit of every other test is `timeout` in pyproject.toml."""

SOURCE = Path(__file__).parents[1] / "src"
"""Compiled before the first test: whether a program finds bytecode or writes it changes its system calls."""

# The machine is shared and slow at times: a deadline per example would fail tests for the load of others. Examples are
# derived from the test itself, so that two runs give the same result; `make torture` draws new ones each time.
settings.register_profile("random", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("random"), derandomize=True, print_blob=True)

# No test sees what the person who runs it has configured for the two programs.
for _name in [name for name in os.environ if name.startswith(("PROGRESSDB_", "MINIKMS_"))]:
    del os.environ[_name]

# A thousand starts of the programs would compile their source a thousand times, where the environment forbids bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Some programs complain about files that others can write, others about files that nobody else can read.
os.umask(0o022)

# A shell that starts the tests in the background ignores these two, and every child would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture
def as_root() -> None:
    """For tests that read the memory of other processes, or become other users."""
    needs.root()


def in_a_loop_of_its_own(test: Callable[..., object], run: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(test)
    def run_test(**fixtures: Any) -> None:
        run(test(**fixtures))

    return run_test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failed-to", metavar="FILE", help="when tests fail, write their ids to FILE, for `pytest @FILE`")
    parser.addoption("--quick", action="store_true", help="leave out the tests that took long when they were measured")
    parser.addoption("--measure", action="store_true", help="write the durations of the tests to tests/durations.txt")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("random" if config.getoption("markexpr") == "torture" else "repeatable")
    config.pluginmanager.register(durations)
    gc.disable()  # what the collection makes stays to the end of the run
    if not hasattr(config, "workerinput"):  # once, before xdist starts its processes
        compileall.compile_dir(SOURCE, quiet=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each torture test the long limit, unless it has its own, and each coroutine function an event loop."""
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = in_a_loop_of_its_own(item.obj, uvloop.run if item.get_closest_marker("uvloop") else asyncio.run)
        if item.get_closest_marker("torture") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TORTURE_S_MAX))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    """Close the run with what was skipped, why, and the command that installs what is missing; list what failed. Under
    CI name what took longest.

    A run that was interrupted, or that pytest itself ended, writes no list: its other tests never ran. A worker of
    xdist writes none either: it goes on for a moment after the process that runs it was killed.
    """
    stats = terminalreporter.stats
    path = None if hasattr(config, "workerinput") else config.getoption("--failed-to")
    if path and exitstatus == pytest.ExitCode.TESTS_FAILED:
        failed = dict.fromkeys(report.nodeid for report in [*stats.get("failed", []), *stats.get("error", [])])
        Path(path).write_text("".join(f"{nodeid}\n" for nodeid in failed))
    skipped = stats.get("skipped", [])
    lines = needs.report(report.longrepr[2] for report in skipped)
    if not hasattr(config, "workerinput"):
        reports = [report for group in stats.values() for report in group if isinstance(report, pytest.TestReport)]
        if config.getoption("measure"):
            durations.write(reports)
        if os.environ.get("CI") == "true":
            lines = [*durations.summary(reports), *lines]
    for line in lines:
        terminalreporter.write_line(line)


@pytest.fixture
def public() -> Iterator[Path]:
    """Not pytest's own temporary directory, whose parents are private."""
    with tempfile.TemporaryDirectory(prefix="minikms-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
