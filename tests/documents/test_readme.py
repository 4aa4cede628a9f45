"""The README's commands work when they are pasted in their order: in a new directory, by an ordinary user."""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.harness.ports import free_port
from tests.progressdb_server.api.sdk import environment

PROJECT = Path(__file__).resolve().parents[2]
README = (PROJECT / "README.md").read_text("utf-8")
ORDINARY_UID = 45_679
DESCRIPTORS_MAX = 1024
"""The soft limit of open files that a shell has on most systems."""
PASTED_S_MAX = 400.0
STAMP = ".venv/.installed"

OF_MAKE = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "ARGS", "PYTHON", "VENV", "WORKERS"}
"""Variables of a `make test` that runs this test: its ARGS and VENV would reach the `make run` of the page."""


def blocks() -> list[tuple[str, str]]:
    """The language and the text of every block of commands, in order."""
    found = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
    assert {language for language, _ in found} == {"sh", "python"}
    return found


def pasted(port: int) -> str:
    """All blocks as one shell script, which stops at the first command that fails.

    Two things differ from the page: the port, and that `make` takes the environment as it is and only shows what
    `make test` would run, since this is one of the tests.
    """
    lines = ["set -euo pipefail"]
    for language, text in blocks():
        lines.append(f".venv/bin/python - <<'END'\n{text}END" if language == "python" else text)
    lines.append(re.search(r"`(kill .*?)`", README)[1] + "; wait")  # type: ignore[index]  # the page has it
    script = at_port("\n".join(lines), port)
    make = f"make --old-file={STAMP}"
    assert "\nmake run " in script and "\nmake test " in script
    return script.replace("\nmake run ", f"\n{make} run ").replace("\nmake test ", f"\n{make} --dry-run test ")


def at_port(text: str, port: int) -> str:
    return text.replace(":8080", f":{port}")


def as_ordinary_user() -> dict[str, Any]:
    """Arguments of Popen. Root runs the commands as another uid, if that can run this interpreter at all."""
    if os.geteuid() != 0:
        return {}
    user: dict[str, Any] = {"user": ORDINARY_UID, "group": ORDINARY_UID, "extra_groups": ()}
    return user if needs.runs_as(ORDINARY_UID) else {}


def limited() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS_MAX, hard))


@pytest.fixture
def new_directory() -> Iterator[Path]:
    """Holds what `make` reads, and the environment that the tests run in. Its path is short: sockets are made in it."""
    with tempfile.TemporaryDirectory(prefix="readme-") as made:
        place = Path(made)
        for file in ("Makefile", "pyproject.toml", ".gitignore"):
            shutil.copy2(PROJECT / file, place)
        for folder in ("tools/bootstrap", "examples"):
            shutil.copytree(PROJECT / folder, place / folder)
        (place / ".venv").symlink_to(sys.prefix)
        if user := as_ordinary_user():
            os.chown(place, user["user"], user["group"])
        yield place


def test_the_commands_work_pasted_in_order_and_git_ignores_what_they_make(new_directory: Path) -> None:
    needs.program("make")
    needs.program("curl")
    needs.program("git")
    before = set(os.listdir(new_directory))
    output = said(new_directory, pasted(free_port()))
    assert "Every check held" in output, "make run"
    assert output.count('"text":"hello"') == 2, "the message that curl stored, and read back"
    assert_as_shown(output)
    assert re.search(r"^hello$", output, re.MULTILINE), "what the program has decrypted"
    assert output.count("timestamp=") == 1, "the logs of the services"
    assert "the door code is 4711" in output, "the decrypted note"
    assert "The audit log is intact" in output
    made = sorted(set(os.listdir(new_directory)) - before)
    assert {"data", "demo-data", "kms", "root.key"} <= set(made)
    assert ignored(new_directory, made) == made


def test_the_wheel_alone_stores_a_message_and_shows_it(new_directory: Path) -> None:
    """The page's commands for it. What pip would take from a registry lies in the environment of the tests."""
    needs.program("curl")
    (new_directory / ".venv").unlink()
    (pip,) = (PROJECT / "tools/bootstrap").glob("pip-*.whl")
    hatchling = environment("hatchling-1.33", ("hatchling==1.33.0",))
    build = [str(hatchling), "-m", "hatchling", "build", "-t", "wheel", "-d", str(new_directory)]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True)
    [install] = re.findall(r"^python3 -m venv .* && \.venv/bin/pip install '\./.*'$", README, re.MULTILINE)
    install = install.replace("python3 -m venv", f"{sys.executable} -m venv --without-pip")
    offline = f"{sys.executable} {pip}/pip --python .venv/bin/python install -q --no-deps --no-index"
    packages = "$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')"
    script = f"""set -euo pipefail
        {install.replace(".venv/bin/pip install", offline)}
        echo {Path(pytest.__file__).parents[1]} > {packages}/others.pth
        .venv/bin/python -P -c 'import minikms; print(minikms.__file__)'
        {at_port(blocks()[0][1], free_port())}
        kill $(jobs -p); wait"""
    output = said(new_directory, script)
    assert output.startswith(f"{new_directory}/.venv/")
    assert output.count('"text":"hello"') == 2
    assert_as_shown(output)


def test_the_first_block_stops_where_another_program_has_the_port(new_directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        output = said(new_directory, at_port(blocks()[0][1], other.getsockname()[1]), status=1)
    assert output.startswith("It has ended: progressdb: cannot listen on 127.0.0.1:") and output.count("\n") == 1


def assert_as_shown(output: str) -> None:
    """The page's lines are in it, in their order; `…` is anything, and so is the port."""
    [shown] = re.findall(r"^```\n(timestamp.*?)```", README, re.DOTALL | re.MULTILINE)
    pattern = re.escape(shown).replace("…", ".*").replace(":8080", ":[0-9]+")
    assert re.search(f"^{pattern}", output, re.MULTILINE), output


def said(place: Path, script: str, *, status: int = 0) -> str:
    """What the script wrote, which ended with this status, as an ordinary user would run it there."""
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=place,
        env={name: value for name, value in os.environ.items() if name not in OF_MAKE}
        | {"HOME": str(place), "no_proxy": "127.0.0.1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limited,
        **as_ordinary_user(),
    )
    try:
        output, _ = shell.communicate(timeout=PASTED_S_MAX)
    finally:
        end_session(shell.pid)
    assert shell.returncode == status, output
    return str(output)


def ignored(place: Path, names: list[str]) -> list[str]:
    shutil.copy2(PROJECT / ".gitignore", place)
    with tempfile.TemporaryDirectory() as repository:
        git = ["git", "--git-dir", repository, "--work-tree", str(place)]
        subprocess.run([*git, "init", "--quiet"], check=True)
        listed = subprocess.run([*git, "check-ignore", *names], cwd=place, check=False, capture_output=True, text=True)
    return listed.stdout.splitlines()


def end_session(leader: int) -> None:
    """Ends what a script that failed half-way has left running, and waits until all of it is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(leader, number)
        except ProcessLookupError:
            return
        if became_true(lambda: not group_exists(leader), seconds=15.0):
            return


def group_exists(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def became_true(holds: Callable[[], bool], *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_the_page_names_what_a_newcomer_looks_for() -> None:
    for named in (
        "progressdb-minikms",
        "PyPI",
        "/viewer/",
        "/docs/",
        "/metrics",
        "PROGRESSDB_API_ADMIN_KEYS",
        "glossary",
    ):
        assert named in README, named
    commands = "".join(text for language, text in blocks() if language == "sh")
    for command in ("make run", "make test", "minikms init", "progressdb --addr"):
        assert command in commands, command
