"""The command trees: documented whole, started fast, quiet in pipes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from minikms.commands.usage import missing_library

PROJECT = Path(__file__).resolve().parents[2]
RUN_SECONDS_MAX = 60


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=PROJECT, capture_output=True, text=True, timeout=RUN_SECONDS_MAX, check=False)


def test_the_page_of_commands_is_what_the_commands_say() -> None:
    made = run(
        sys.executable, "-c", "import sys; sys.path.insert(0, 'tools'); import commands; print(commands.page(), end='')"
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout == (PROJECT / "docs" / "commands.md").read_text("utf-8"), "run: python tools/commands.py"


@pytest.mark.parametrize("package", ["minikms", "minikms_unlock", "progressdb_server"])
def test_help_imports_nothing_that_only_a_command_needs(package: str) -> None:
    """`--help` takes about the time of a cyclopts program with one command. Each module below would make it slower."""
    done = run(sys.executable, "-X", "importtime", "-m", package, "--help")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {f"{package}.cli.command", f"{package}.command"} & imported
    roots = {"cryptography", "uvloop", "asyncio", "httptools", "msgspec", "yaml", "ssl", "http"}
    modules = {"rich.markdown", "rich.progress", "importlib.metadata", "difflib"}
    rooms = {"minikms_daemon.server", "minikms.cli.status", "progressdb_server.config", "progressdb_server.cli.jobs"}
    assert not {name for name in imported if name.partition(".")[0] in roots} | (imported & (modules | rooms))


LIBRARIES = ("cryptography", "httptools", "uvloop", "pybase64", "prometheus_client", "cyclopts", "rich")
"""Of the extra `daemon`, as `sys.modules` names them."""


def without(libraries: Sequence[str], program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", f"import sys; sys.modules.update(dict.fromkeys({libraries})); {program}", *words)


def test_the_client_and_the_adapters_need_no_extra() -> None:
    done = without(LIBRARIES, "import minikms, minikms_adapters.records; minikms.Client, minikms.AsyncClient")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("module", "library", "words", "extra"),
    [
        ("minikms.cli", "cyclopts", ("status",), "daemon"),
        ("minikms_auditor.command", "cyclopts", (), "daemon"),
        ("minikms_gateway.command", "cyclopts", (), "daemon"),
        ("minikms_replicator.command", "cyclopts", (), "daemon"),
        ("minikms_replicator.command", "asyncpg", ("init", "--url", "x", "--role", "y"), "replicator"),
        ("minikms_unlock.command", "cyclopts", (), "daemon"),
        ("progressdb_server.cli", "cyclopts", (), "server"),
        ("progressdb_server.cli", "rocksdict", ("check", "--db", "."), "server"),
    ],
)
def test_a_program_without_its_extra_names_it(module: str, library: str, words: tuple[str, ...], extra: str) -> None:
    name = module.partition(".")[0].replace("_server", "").replace("_", "-")
    program = f"sys.argv[0] = {name!r}; from {module} import main; main()"
    done = without([library], program, *words)
    advice = f"install the wheel of progressdb-minikms with its extra `{extra}`"
    assert done.stderr == f"{name}: the library {library} is missing: {advice}\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert "extra `gateway`" in missing_library(ModuleNotFoundError(name="joserfc"), "minikms-gateway")


def test_the_help_of_a_command_says_what_its_exit_statuses_mean() -> None:
    for module, command in (("minikms", "rotate-kek"), ("minikms", "status"), ("progressdb_server", "status")):
        assert "Exit status: 0" in run(sys.executable, "-m", module, command, "--help").stdout


@pytest.mark.parametrize("module", ["minikms", "progressdb_server"])
def test_help_names_every_command_on_standard_output(module: str) -> None:
    done = run(sys.executable, "-m", module, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert {"serve", "status", "backup"} <= set(done.stdout.split())


def test_piped_output_has_no_colour() -> None:
    assert "\x1b" not in run(sys.executable, "-m", "minikms", "--help").stdout


@pytest.mark.parametrize(
    "words", [("minikms", "completion", "bash"), ("progressdb_server", "config", "show", "--db", "somewhere")]
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_shows_in_the_exit_status_alone(words: Sequence[str], unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            (sys.executable, "-m", *words),
            cwd=PROJECT,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=RUN_SECONDS_MAX,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_picture_is_made_of_a_tour_that_ended_well() -> None:
    picture = (PROJECT / "docs" / "demo.svg").read_text("utf-8")
    assert "All&#160;went&#160;as&#160;it&#160;should." in picture
    assert "@font-face" not in picture
