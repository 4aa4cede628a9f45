"""The program of each page runs as its reader runs it: with the packages of the page's command, and the README's key
service; it prints what the page says, also the second time.
"""

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from minikms import Client
from tests import needs
from tests.documents.machine import PROJECT, blocks

README = PROJECT / "README.md"
DOCS = PROJECT / "docs"
LIBRARIES = {
    "client.md": "minikms",
    "django.md": "django",
    "langgraph.md": "langgraph.checkpoint.sqlite",
    "openai-agents.md": "agents",
    "pydantic-ai.md": "pydantic_ai",
    "sqlalchemy.md": "sqlalchemy",
}
"""What the program of each page imports."""
OWN = "progressdb-minikms"
WHEEL = f"./progressdb_minikms-{metadata.version(OWN)}-py3-none-any.whl"
START_S_MAX = 60.0
PROGRAM_S_MAX = 120.0
INSTALL_S_MAX = 900.0


def program(page: str) -> tuple[str, str]:
    """The programs of a page as one, and what they print."""
    text = (DOCS / page).read_text("utf-8")
    pairs = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", text, re.DOTALL)
    assert len(pairs) == text.count("```python") >= 1, "a program without what it prints"
    return "".join(source for source, _ in pairs), "".join(printed for _, printed in pairs)


def install_command(page: str) -> str:
    """The page's first block; client.md needs the wheel alone."""
    found = blocks(DOCS / page)
    return found[0] if found else f"pip install {WHEEL}"


def runs_twice(python: Path, directory: Path, source: str, printed: str) -> None:
    for _ in range(2):
        done = subprocess.run(
            [python, "-c", source], cwd=directory, env={"PATH": os.defpath}, capture_output=True, text=True,
            timeout=PROGRAM_S_MAX, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, printed), done.stderr


@contextmanager
def key_service(directory: Path) -> Iterator[None]:
    """Begun by the commands of the README's section, in a directory with `.venv`, whose programs are on PATH."""
    section = README.read_text("utf-8").partition("## miniKMS alone")[2]
    commands = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert commands
    shell = subprocess.Popen(
        ["bash", "-ec", f"trap 'kill $(jobs -p); wait' TERM\n{commands[1]}wait"],
        cwd=directory,
        env=os.environ | {"PATH": f"{directory}/.venv/bin:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
    )
    try:
        with Client(str(directory / "kms/minikms.sock"), wait_s=START_S_MAX) as kms:
            kms.health()
        yield
    finally:
        shell.send_signal(signal.SIGTERM)
        shell.wait()


@pytest.fixture(scope="module")
def reader() -> Iterator[Path]:
    """A directory in which the README's commands have started a key service."""
    with tempfile.TemporaryDirectory(prefix="reader-") as made:
        (Path(made) / ".venv").symlink_to(sys.prefix)
        with key_service(Path(made)):
            yield Path(made)


# --- without the packages that the page's command would not install --------------------------------------------------

ABSENT = """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name in NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent)
"""


def installed_by(command: str) -> set[str]:
    """The distributions that `pip install` of this command would install, by their canonical names."""
    words = shlex.split(command, comments=True)
    assert words[:2] == ["pip", "install"] and words[2].partition("[")[0] == WHEEL
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *words[3:]]
    for extra in re.findall(r"\.whl\[([\w-]+)\]", command):
        lines += project["optional-dependencies"][extra]
    wanted = [("", line) for line in lines]
    seen = set()
    while wanted:
        extra, line = wanted.pop()
        one = Requirement(line)
        if one.marker and not one.marker.evaluate({"extra": extra}):
            continue
        for having in ("", *one.extras):
            if (one.name, having) not in seen:
                seen.add((one.name, having))
                wanted += [(having, each) for each in metadata.requires(one.name) or ()]
    return {canonicalize_name(name) for name, _ in seen} | {OWN}


@functools.cache
def owners() -> dict[str, set[str]]:
    """The distributions that have each module, or a part of it."""
    found: dict[str, set[str]] = {}
    for each in metadata.distributions():
        owner = canonicalize_name(each.name)
        for line in (each.read_text("RECORD") or "").splitlines():
            file = line.partition(",")[0]
            if file.endswith((".py", ".so")):
                *folders, name = file.split("/")
                parts = [*folders, name.partition(".")[0]]
                for length in range(1, len(parts) + 1):
                    found.setdefault(".".join(parts[:length]), set()).add(owner)
    return found


@pytest.mark.parametrize("page", LIBRARIES)
def test_a_page_needs_what_its_command_installs_and_no_other(page: str, reader: Path) -> None:
    needs.library(LIBRARIES[page])
    source, printed = program(page)
    installed = installed_by(install_command(page))
    absent = {name for name, having in owners().items() if not having & installed}
    tops = {name for name in absent if name.rpartition(".")[0] not in absent}
    runs_twice(Path(sys.executable), reader, f"NAMES = {tops}{ABSENT}{source}", printed)


def test_the_program_of_the_readme_makes_one_key(reader: Path) -> None:
    [source] = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    runs_twice(Path(sys.executable), reader, source, "hello\n")
    with Client(str(reader / "kms/minikms.sock")) as kms:
        assert len(kms.list_keys(thread_id="thread-1").keys) == 1


def test_the_example_shows_the_audit_log_and_a_destroyed_thread() -> None:
    needs.library(LIBRARIES["langgraph.md"])
    done = subprocess.run(
        [sys.executable, PROJECT / "examples/agent_memory.py"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown, _, log = done.stdout.partition("the audit log:")
    assert "'salary' 0 times" in shown
    assert "bob's thread from a backup: thread bob" in shown
    assert "ada's thread is still there: My salary is 48,000." in shown
    assert "create_dek" in log
    assert "destroy_key" in log


@pytest.mark.torture
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", LIBRARIES)
def test_a_page_works_without_a_checkout(page: str) -> None:
    """With the wheel, and what pip takes from the registry."""
    pip = next(PROJECT.glob("tools/bootstrap/pip-*.whl")) / "pip"
    script = f"""set -e
{sys.executable} {pip} wheel -q --no-deps --wheel-dir . {PROJECT}
{sys.executable} -m venv --without-pip .venv
pip() {{ {sys.executable} {pip} --python .venv/bin/python "$@"; }}
pip install '{WHEEL}[daemon]'
{install_command(page)}"""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL", "PYTHON"))}
    with tempfile.TemporaryDirectory(prefix="reader-") as made:
        subprocess.run(["bash", "-c", script], cwd=made, env=environ, timeout=INSTALL_S_MAX, check=True)
        with key_service(Path(made)):
            runs_twice(Path(made) / ".venv/bin/python", Path(made), *program(page))
