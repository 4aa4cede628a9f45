"""Writes docs/commands.md from the command trees themselves: `python tools/commands.py`.

Owns: the page's form, a row for each command but `completion`, which every program has. Its arguments and flags are
said by `--help` alone. A test compares the page with what this makes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
OPENING = """\
# Commands

`tools/commands.py` generates this page. `--help` after a command says all that it does, its arguments and its flags.
Transcripts in `tests/commands/transcripts` show the commands in use.

- Exit statuses: **0** done, or a check passed; **1** a check failed, or the request was refused; **2** wrong
  usage, or a required file, key or service is missing; **130** interrupted; **141** the reader of a pipe
  closed it.
- Results go to standard output, everything else to standard error. An error is one sentence that begins with
  the name of the program. Colour, progress bars and questions appear only on a terminal; `NO_COLOR` is
  respected. `--json` prints complete values for programs, and an error as `{"error": TEXT}`.
- Without `--socket`, `MINIKMS_SOCKET` or `PROGRESSDB_KMS_SOCKET`, a command uses the first of
  `kms/minikms.sock`, `data/run/minikms.sock` and `/run/minikms/minikms.sock`, and says so. The first two must lie
  in directories that only this user can write to. Nothing is sent before the user that serves it is checked.
- A flag has precedence over its environment variable, which `--help` names in brackets. An empty variable
  counts as unset.
- No command takes a key in its arguments: root keys come from files or a terminal, API keys from the
  configuration or a file.
- Each program also has `completion`, which prints the completion script of a shell.
"""


def page() -> str:
    from minikms.cli.command import app as minikms
    from minikms_auditor.command import app as auditor
    from minikms_gateway.command import app as gateway
    from minikms_replicator.command import app as replicator
    from minikms_unlock.command import app as unlock
    from progressdb_server.cli.command import app as progressdb

    helpers = (auditor, "auditor"), (gateway, "gateway"), (replicator, "replicator"), (unlock, "unlock")
    named = ((app, f"minikms-{name}") for app, name in helpers)
    programs = ((minikms, "minikms"), *named, (progressdb, "progressdb"))
    return OPENING + "".join(line for app, name in programs for line in _section(app, name))


def _section(app: App, words: str) -> Iterator[str]:
    yield f"\n## {words}\n\n{_escaped(app.help)}\n\n| command | what it does |\n|---|---|\n"
    yield from _rows(app, words)


def _rows(app: App, words: str) -> Iterator[str]:
    for name in sorted(name for name in app if not name.startswith("-") and app[name].show):
        inner, called = app[name], f"{words} {name}"
        rows = list(_rows(inner, called))
        yield from rows
        if not rows and name != "completion":
            yield f"| `{called}` | {_escaped(_summary(inner))} |\n"


def _summary(app: App) -> str:
    """The first sentence of its docstring."""
    text = inspect.getdoc(app.default_command) if app.default_command is not None else None
    return re.split(r"(?<=[.])\s", " ".join((text or app.help).split()))[0]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
