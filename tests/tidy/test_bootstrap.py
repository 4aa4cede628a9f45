"""`make venv` on a bare machine: what tools/bootstrap/make_venv.py refuses before it changes anything.

That it installs is shown by every run of the tests: they run in what it made.
"""

import ast
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
BOOTSTRAP = PROJECT / "tools" / "bootstrap"


def bootstrap(
    directory: Path, script: Path = BOOTSTRAP / "make_venv.py", *before: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", *(before or (str(script),)), str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)


def test_a_directory_that_is_no_virtual_environment_is_never_cleared(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("precious")
    done = bootstrap(tmp_path)
    assert done.returncode == 1
    assert "is no virtual environment" in done.stderr
    assert (tmp_path / "letters").read_text() == "precious"


@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("-h", 0), ("--upgrade", 1)])
def test_an_option_prints_the_usage_and_makes_no_environment(tmp_path: Path, option: str, status: int) -> None:
    script = BOOTSTRAP / "make_venv.py"
    command = [sys.executable, "-I", str(script), option]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status
    assert "usage:" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_altered_pip_wheel_is_not_run(tmp_path: Path) -> None:
    copied = shutil.copytree(BOOTSTRAP, tmp_path / "bootstrap")
    (wheel,) = copied.glob("*.whl")
    altered = bytearray(wheel.read_bytes())
    altered[len(altered) // 2] ^= 1
    wheel.write_bytes(altered)
    done = bootstrap(tmp_path / "venv", copied / "make_venv.py")
    assert done.returncode == 1
    assert "was altered" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_wheel_is_the_one_that_the_script_names_and_expects() -> None:
    named = runpy.run_path(str(BOOTSTRAP / "make_venv.py"))
    digest = hashlib.sha256(Path(named["PIP_WHEEL"]).read_bytes()).hexdigest()
    assert digest == named["PIP_WHEEL_SHA256"]


def test_a_finished_environment_is_left_as_it_is_without_network(tmp_path: Path) -> None:
    """A checkout gives the files that say what to install a new date: nothing is installed again for that."""
    named = runpy.run_path(str(BOOTSTRAP / "make_venv.py"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    stamp = tmp_path / ".installed"
    stamp.write_text(named["described"](str(tmp_path)) + named["requirements_digest"]())
    os.utime(stamp, (1, 1))
    done = bootstrap(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert stamp.stat().st_mtime > PROJECT.joinpath("pyproject.toml").stat().st_mtime
    assert (tmp_path / "bin" / "python").read_bytes() == b""


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 10, 13)])
def test_an_old_python_gets_an_error_that_names_the_remedy(tmp_path: Path, version: tuple[int, int, int]) -> None:
    pretend = (
        "import runpy, sys; sys.version_info = "
        f"{version}; script = sys.argv.pop(1); sys.argv[0] = script; runpy.run_path(script, run_name='__main__')"
    )
    done = bootstrap(tmp_path / "venv", BOOTSTRAP / "make_venv.py", "-c", pretend, str(BOOTSTRAP / "make_venv.py"))
    assert done.returncode == 1
    assert f"is Python {'.'.join(map(str, version))}; this project needs 3.11 or newer" in done.stderr
    assert "make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_the_script_parses_on_the_oldest_python_that_it_speaks_to() -> None:
    ast.parse((BOOTSTRAP / "make_venv.py").read_text("utf-8"), feature_version=(3, 7))
