"""How a test runs a script, a few lines of Python or `minikms audit verify` in a process of its own."""

import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Final

from tests.harness import forked

PROJECT: Final = Path(__file__).resolve().parents[2]


def interpreter_words(module: str) -> tuple[str, str]:
    """The interpreter's arguments that run `module`, such as `tests.minikms.audit.auditwriter`, in any directory.

    `-m` would need the project as the working directory, and a path would not find the module's own imports.
    """
    start = (
        f"import runpy, sys; sys.path.insert(0, {str(PROJECT)!r}); runpy.run_module({module!r}, run_name='__main__')"
    )
    return "-c", start


def python_program(path: Path, source: str, *options: str) -> None:
    """Make `path` a program of these lines of Python. The path of the interpreter may have spaces and be longer than a
    kernel takes behind `#!`."""
    module = path.with_name(f"{path.name}-program.py")  # which no import finds
    module.write_text(source)
    path.write_text(f'#!/bin/sh\nunset PWD\nexec {shlex.join([sys.executable, *options, str(module)])} "$@"\n')
    path.chmod(0o755)


def answer_of(prologue: str, code: str, *arguments: str) -> Any:
    """The value of `answer`, JSON, after a fresh interpreter has run both. `code` may be indented."""
    source = f"import json\n{prologue}\n{textwrap.dedent(code)}\nprint(json.dumps(answer))\n"
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def verify_audit(data_dir: Path, key_file: str | Path | None = None) -> None:
    """`minikms audit verify` finds the log intact. Without `key_file` it looks for the key beside the directory."""
    key = [] if key_file is None else ["--master-key-file", key_file]
    done = forked.run("minikms", "audit", "verify", "--data-dir", data_dir, *key)
    assert done.returncode == 0, done.stdout + done.stderr
