"""What people and programs see of a result.

Owns: the console, tables, and JSON. Invariants: colour only on a terminal and never under NO_COLOR; nothing is wrapped
or cut where the output is no terminal; text from elsewhere is shown without control characters and never taken for
markup; questions are asked on a terminal only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from minikms.cli.outcome import EXIT_WANTING, CommandError

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_COLUMNS: Final = 4096
"""Wider than any line: what reads a pipe wants whole lines."""


def as_json(value: object) -> str:
    """Indented; msgspec's structs as objects, bytes as base64."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def print_json(value: object) -> None:
    print(as_json(value))


def console(*, errors: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if errors else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    return Console(stderr=errors, highlight=False, markup=False, emoji=False, width=width)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for column, title in zip(table.columns, titles, strict=True):
        column.overflow = "fold"  # an id that is cut short can't be used
        if title in right:
            column.justify = "right"
    for row in rows:
        table.add_row(*(Text(clean(str(cell))) for cell in row))
    console().print(table)


def print_facts(facts: Iterable[tuple[str, object]], *, indent: int = 0) -> None:
    """Names and values, one a line, the values below each other."""
    lines = [(name, clean(str(value))) for name, value in facts]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        console().print(" " * indent + f"{name.ljust(width)}  {value}", soft_wrap=True)


def clean(text: str) -> str:
    """Without what could drive a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def byte_count(size: int) -> str:
    """`1,234 bytes`, `12.3 MiB`."""
    amount = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 10_000:
            return f"{size:,} bytes" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"


def duration(seconds: int) -> str:
    """`3 d 4 h`, `5 min`, `42 s`: the two largest parts."""
    parts = []
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def confirm(question: str, *, yes: bool) -> None:
    """Returns when the answer is yes. Raises CommandError for a no, or where nobody can be asked."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandError("this asks for a confirmation, and nobody is at a terminal; say yes with --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("nothing was done", EXIT_WANTING)
