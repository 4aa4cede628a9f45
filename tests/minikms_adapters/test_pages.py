"""The program of each adapter's page runs, and so does the example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.harness.live_daemon import LiveDaemon

DOCS = Path(__file__).parents[2] / "docs"
SOCKET = "/run/minikms/minikms.sock"
FRAMEWORKS = {
    "langgraph.md": "langgraph.checkpoint.sqlite",
    "openai-agents.md": "agents",
    "pydantic-ai.md": "pydantic_ai",
    "sqlalchemy.md": "sqlalchemy",
}


@pytest.mark.parametrize("page", FRAMEWORKS)
def test_the_program_of_a_page_runs(
    page: str, daemon: LiveDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.library(FRAMEWORKS[page])
    monkeypatch.chdir(tmp_path)
    [program] = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert SOCKET in program
    assert program.count("\n") <= 25
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile(program.replace(SOCKET, str(daemon.socket)), page, "exec", dont_inherit=True), space)
    if "engine" in space:  # a program that ends would close these
        space["engine"].dispose()
        space["kms"].close()


def test_the_example_shows_the_audit_log_and_a_destroyed_thread() -> None:
    needs.library(FRAMEWORKS["langgraph.md"])
    done = subprocess.run(
        [sys.executable, str(DOCS.parent / "examples" / "agent_memory.py")],
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
