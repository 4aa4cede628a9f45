"""The order of a run and the choice of `make quick`, from measured durations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import durations
from tests.durations import Duration

PROJECT = Path(__file__).resolve().parents[2]
CONFTEST = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from tests.conftest import pytest_addoption
from tests.durations import pytest_xdist_make_scheduler
"""
TESTS = """
import os, pathlib
def test_first():
    pass
def test_that_ends_its_worker():
    pathlib.Path("ran").open("a").write("x")
    os._exit(1)
def test_last():
    pass
"""


def test_a_test_that_ends_its_worker_fails_once_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_sample.py").write_text(TESTS)
    words = [sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-p", "no:cacheprovider", "-n", "2"]
    done = subprocess.run(
        [*words, "--dist", "loadscope"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "1 failed, 2 passed" in done.stdout, done.stdout
    assert (tmp_path / "ran").read_text() == "x"


def test_quick_leaves_out_what_takes_most_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixtures that a function shares count, and the smoke tests stay."""
    seconds = {
        "tests/a.py::test_short": Duration(0.1, 0.0),
        "tests/a.py::test_beside_a_dear_fixture": Duration(0.0, 9.0),
        "tests/b.py::test_long": Duration(9.0, 0.0),
        f"{durations.SMOKE}::test_program": Duration(5.0, 0.0),
    }
    monkeypatch.setattr(durations, "kept", lambda: seconds)
    durations.slow.cache_clear()
    try:
        assert durations.slow() == {"tests/a.py::test_beside_a_dear_fixture", "tests/b.py::test_long"}
    finally:
        durations.slow.cache_clear()
