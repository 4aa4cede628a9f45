"""Writes docs/commands.md from the command trees themselves: `python tools/commands.py`.

Owns: the page's form. A test compares the page with what this makes, so that no flag goes undocumented.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from cyclopts import App, Argument

from minikms.usage import label

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
OPENING = """\
# Commands

`tools/commands.py` generates this page from the commands' help, and a test in `tests/commands` compares the two.
[Transcripts](../tests/commands/transcripts) show the commands in use.

Each command ends with one of these exit statuses: **0** done, or a check passed; **1** a check failed, or the request
was refused; **2** wrong usage, or a required file, key or service is missing; **130** interrupted; **141** the reader
of a pipe closed it. Results go to standard output, everything else to standard error. Colour, progress bars and
questions appear only on a terminal; `NO_COLOR` is respected. `--json` prints complete values for programs. A flag has
precedence over its environment variable, which is named in brackets; an empty variable counts as unset. No command
takes a key in its arguments: root keys come from files or a terminal, API keys from the configuration or a file. Every
command but `serve`, `demo` and `completion` has `--json`. An error is one sentence on standard error that begins with
the name of the program.
"""


def page() -> str:
    from minikms.cli.command import app as minikms
    from minikms_gateway.command import app as gateway
    from minikms_unlock.command import app as unlock
    from progressdb_server.cli.command import app as progressdb

    helpers = ((gateway, "minikms-gateway"), (unlock, "minikms-unlock"))
    programs = ((minikms, "minikms"), *helpers, (progressdb, "progressdb"))
    return OPENING + "".join(line for app, name in programs for line in _section(app, name))


def _section(app: App, words: str) -> Iterator[str]:
    yield f"\n## {words}\n\n{_escaped(_help_text(app))}\n"
    yield from _flags(app)
    for name in _shown(app):
        yield from _command(app[name], f"{words} {name}")


def _command(app: App, words: str) -> Iterator[str]:
    yield f"\n### {words}\n\n{_escaped(_help_text(app))}\n"
    inner = _shown(app)
    if not inner:
        yield from _flags(app)
    for name in inner:
        yield from _command(app[name], f"{words} {name}")


def _shown(app: App) -> list[str]:
    return sorted(name for name in app if not name.startswith("-") and app[name].show)


def _help_text(app: App) -> str:
    """The whole docstring of a command, or the help of a group of commands."""
    command = app.default_command
    text = inspect.getdoc(command) if command is not None else None
    if text is None or getattr(command, "__name__", "") == "serve":
        text = app.help if app.name != ("serve",) else text
    return text or app.help


def _flags(app: App) -> Iterator[str]:
    if app.default_command is None:
        return
    rows = []
    for argument in app.assemble_argument_collection():
        if not argument.show:
            continue
        names = _names(argument)
        rows.append(f"| {names} | {_escaped(argument.parameter.help or '')} |\n")
    if rows:
        yield "\n| | |\n|---|---|\n"
        yield from rows


def _names(argument: Argument) -> str:
    """A positional argument as in `--help`: KEY-ID, [SOURCE], [THREADS...]."""
    name = label(argument)
    if name is None:
        return ", ".join(f"`{name}`" for name in argument.names if not name.startswith("--no-"))
    several = "..." if argument.is_var_positional() else ""
    return f"`{name}{several}`" if argument.required else f"`[{name}{several}]`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    sys.stdout.write(f"wrote {PAGE}\n")
