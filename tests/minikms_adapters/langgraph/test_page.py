"""The program of docs/langgraph.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.harness.live_daemon import LiveDaemon

PAGE = Path(__file__).parents[3] / "docs" / "langgraph.md"
SOCKET = "/run/minikms/minikms.sock"


def test_the_program_of_the_page_runs(daemon: LiveDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [program] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert SOCKET in program
    assert program.count("\n") <= 24
    exec(compile(program.replace(SOCKET, str(daemon.socket)), PAGE.name, "exec"), {"__name__": "page"})
