"""`.ci/run` and unlucky tests: what runs once more, what is named as unstable, and what still fails the run.

The script's own function runs a small project with the real make, pytest and xdist.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from tests import needs

PROJECT = Path(__file__).resolve().parents[2]
MAKEFILE = (
    "test:\n\t@'$(PYTHON)' -m pytest -p xdist.plugin -p no:cacheprovider "
    "--import-mode=importlib -n $(WORKERS) $(ARGS)\n"
    "WORKERS ?= 1\nexport PYTEST_DISABLE_PLUGIN_AUTOLOAD = 1\n"
)
CONFTEST = f"""
import sys
sys.path.insert(0, {str(PROJECT)!r})
from tests.conftest import pytest_addoption, pytest_terminal_summary
"""
TESTS = """
import os, pathlib, pytest, signal
@pytest.mark.parametrize("n", range({unstable}))
def test_unstable(n):
    ran = pathlib.Path(f"ran [{{n}}]")
    first = not ran.exists()
    ran.touch()
    assert not first
def test_broken():
    pathlib.Path("broken ran").open("a").write("x")
    assert not {broken}
def test_good():
    if {interrupted}: os.kill(os.getppid(), signal.SIGKILL)  # the process that runs the workers
"""
SCRIPT = """
set -euo pipefail
unset CI
python={python}
say() {{ printf '== %s\\n' "$*"; }}
unstable=()
eval "$(grep -E '^unstable_max=' {script})"
eval "$(sed -n '/^run_tests() {{/,/^}}/p' {script})"
run_tests {project} make --no-print-directory -C {project} PYTHON="$python"
printf 'unstable: %s\\n' "${{unstable[@]}}"
"""


def run(project: Path, *, unstable: int, broken: bool = False, interrupted: bool = False) -> tuple[int, str]:
    """The exit status and the output of the tests of a project, run as CI runs them."""
    needs.program("make")
    (project / "Makefile").write_text(MAKEFILE)
    (project / "conftest.py").write_text(CONFTEST)
    (project / "test_sample.py").write_text(TESTS.format(unstable=unstable, broken=broken, interrupted=interrupted))
    places = {"script": PROJECT / ".ci" / "run", "project": project, "python": sys.executable}
    script = SCRIPT.format(**{name: shlex.quote(str(place)) for name, place in places.items()})
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=120, cwd=project)
    return done.returncode, done.stdout + done.stderr


def test_a_test_that_passes_when_it_runs_once_more_is_named_as_unstable(tmp_path: Path) -> None:
    status, output = run(tmp_path, unstable=2)
    assert status == 0, output
    named = [line for line in output.splitlines() if line.startswith("unstable: ")]
    assert sorted(named) == [f"unstable: test_sample.py::test_unstable[{n}]" for n in range(2)]
    assert (tmp_path / "broken ran").read_text() == "x"  # what passed does not run again


def test_a_test_that_fails_again_fails_the_run(tmp_path: Path) -> None:
    status, output = run(tmp_path, unstable=1, broken=True)
    assert status != 0
    assert "1 failed, 1 passed" in output
    assert "unstable: " not in output


def test_more_unstable_tests_than_the_bound_fail_the_run_at_once(tmp_path: Path) -> None:
    status, output = run(tmp_path, unstable=6)
    assert status != 0
    assert "once more" not in output


def test_a_run_that_did_not_reach_its_end_is_not_repeated(tmp_path: Path) -> None:
    status, output = run(tmp_path, unstable=1, interrupted=True)
    assert status != 0
    assert "once more" not in output
