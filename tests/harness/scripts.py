"""How a test starts a script of the tests in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]


def interpreter_words(module: str) -> tuple[str, str]:
    """The interpreter's arguments that run `module`, such as `tests.minikms.audit.auditwriter`, in any directory.

    `-m` would need the project as the working directory, and a path would not find the module's own imports.
    """
    start = (
        f"import runpy, sys; sys.path.insert(0, {str(PROJECT)!r}); runpy.run_module({module!r}, run_name='__main__')"
    )
    return "-c", start
