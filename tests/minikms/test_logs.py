"""structlog without rich: a faster start. Tracebacks show no values of variables, with rich or without."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)


@pytest.mark.parametrize("module", ["minikms.daemon.process", "progressdb_server.server"])
def test_neither_daemon_nor_server_imports_rich(module: str) -> None:
    """`import structlog` alone would; `from minikms.logs import structlog` does not."""
    program = f"import sys, {module}; print([name for name in sys.modules if name.partition('.')[0] == 'rich'])"
    assert run(program).stdout == "[]\n"


def test_rich_can_be_imported_afterwards() -> None:
    assert run("import minikms.logs, rich.console; print(rich.console.Console().width > 0)").stdout == "True\n"


@pytest.mark.parametrize("module", ["minikms.logs", "progressdb_server.logs"])
def test_a_log_of_text_cannot_command_the_terminal(module: str) -> None:
    """A peer chose the value: a witness, an issuer, a database."""
    program = f"""
from {module} import *
from {module} import structlog
service_logger("text") if {module!r} == "minikms.logs" else configure("console", "info")
structlog.get_logger().warning("failed", why="\\x1b[2J \\x9b31m \\r all is well")
"""
    log = run(program).stderr
    assert "?[2J ?31m ? all is well" in log
    assert log.rstrip("\n").isprintable()


@pytest.mark.parametrize("first", ["", "import rich.console, structlog"], ids=["without rich", "with rich"])
def test_a_traceback_in_the_servers_log_shows_no_values_of_variables(first: str) -> None:
    """With rich, structlog would show the local variables of every frame."""
    program = """
from progressdb_server import logs
logs.configure("console", "info")
def fail():
    held = "zx9-" + "secret"
    return 1 // (held == "")
try:
    fail()
except ZeroDivisionError:
    logs.structlog.get_logger("progressdb").exception("broken")
"""
    log = run(f"{first}\n{program}").stderr
    assert "broken" in log
    assert "ZeroDivisionError" in log
    assert "zx9-secret" not in log
