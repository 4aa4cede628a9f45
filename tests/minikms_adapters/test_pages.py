"""The program of each adapter's page runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.harness.live_daemon import LiveDaemon

DOCS = Path(__file__).parents[2] / "docs"
SOCKET = "/run/minikms/minikms.sock"


@pytest.mark.parametrize("page", ["langgraph.md", "openai-agents.md", "sqlalchemy.md"])
def test_the_program_of_a_page_runs(
    page: str, daemon: LiveDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [program] = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert SOCKET in program
    assert program.count("\n") <= 25
    space: dict[str, Any] = {"__name__": "page"}
    exec(compile(program.replace(SOCKET, str(daemon.socket)), page, "exec", dont_inherit=True), space)
    if "engine" in space:  # a program that ends would close these
        space["engine"].dispose()
        space["kms"].close()
