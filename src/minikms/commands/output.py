"""How all commands of this distribution show results: tables, JSON, progress bars, questions.

Invariants: colour only on a terminal and never under NO_COLOR; nothing is wrapped or cut where the output is no
terminal; text from elsewhere is shown without control characters and never taken for markup; questions are asked on a
terminal only. It must never import at a start what only some results need.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from minikms.commands.usage import EXIT_FAILED, CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from minikms.api import Condition

NAMED_COUNT_MAX: Final = 20
"""The things that one sentence names."""
PROGRESS_SECONDS: Final = 0.1
"""Between two updates of a bar, which a caller may report to for each of a million items."""
_PIPE_COLUMNS: Final = 4096
"""Wider than any line: a program that reads a pipe needs whole lines."""


def as_json(value: object) -> str:
    """Indented, in ASCII; msgspec's structs as objects, bytes as base64. A file name that is no UTF-8 keeps its
    surrogates, which msgspec's own encoder refuses."""
    import json

    import msgspec

    return json.dumps(msgspec.to_builtins(value), indent=2)


def print_json(value: object) -> None:
    print(as_json(value))


class Table(NamedTuple):
    """Rows of cells below their titles. `right`: the titles of the columns of numbers."""

    titles: Sequence[str]
    rows: Iterable[Sequence[object]]
    right: Sequence[str] = ()


class Facts(NamedTuple):
    """Names with their values, and how far their lines are indented."""

    pairs: Iterable[tuple[str, object]]
    indent: int = 0


def print_result(value: object, text: str | Iterable[str] | Table | Facts, *, json: bool) -> None:
    """The value as JSON, or the table, the facts, the text or its lines. A line may quote others: it stays one line."""
    if json:
        print_json(value)
        return
    if isinstance(text, Table):
        print_table(*text)
        return
    if isinstance(text, Facts):
        print_facts(text.pairs, indent=text.indent)
        return
    from minikms.api.printable import clean

    for line in text.split("\n") if isinstance(text, str) else text:
        print(clean(line))


def terminal(*, errors: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if errors else sys.stdout
    width = None if stream.isatty() else _PIPE_COLUMNS
    return Console(stderr=errors, highlight=False, markup=False, emoji=False, width=width)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    from rich.table import Table
    from rich.text import Text

    from minikms.api.printable import clean

    table = Table(*titles, box=None, pad_edge=False, header_style="bold")
    for column, title in zip(table.columns, titles, strict=True):
        column.overflow = "fold"  # a truncated id can't be used
        if title in right:
            column.justify = "right"
    for row in rows:
        table.add_row(*(Text(clean(str(cell))) for cell in row))
    terminal().print(table)


def print_facts(facts: Iterable[tuple[str, object]], *, indent: int = 0) -> None:
    """Names and values, one pair a line, the values aligned."""
    from minikms.api.printable import clean

    lines = [(name, clean(str(value))) for name, value in facts]
    width = max((len(name) for name, _ in lines), default=0)
    for name, value in lines:
        terminal().print(" " * indent + f"{name.ljust(width)}  {value}", soft_wrap=True)


def name_list(names: Sequence[str]) -> str:
    """The first NAMED_COUNT_MAX names, and how many more there are."""
    from minikms.api.printable import clean

    more = f" and {len(names) - NAMED_COUNT_MAX} more" if len(names) > NAMED_COUNT_MAX else ""
    return ", ".join(clean(name) for name in names[:NAMED_COUNT_MAX]) + more


def condition_lines(conditions: Iterable[Condition]) -> Iterator[str]:
    """A line for each condition, with its name and what to do."""
    for one in conditions:
        yield f"{one.severity}: {one.name}: {one.text}"


def counted(number: int, what: str, several: str = "") -> str:
    """`1 key`, `2,000 keys`."""
    return f"{number:,} {what if number == 1 else several or what + 's'}"


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


class Progress(Protocol):
    def __call__(self, done: int, total: int | None, what: str = ...) -> None:
        """Move the bar: how many things or bytes are done, and of how many; another `what` is shown in its place."""


@contextmanager
def progress_bar(what: str, *, visible: bool, in_bytes: bool = False) -> Iterator[Progress]:
    """A bar on standard error, if it is `visible` and that is a terminal."""
    from rich import progress

    console = terminal(errors=True)
    counts = (
        [progress.DownloadColumn(), progress.TransferSpeedColumn()] if in_bytes else [progress.MofNCompleteColumn()]
    )
    name = progress.TextColumn("{task.description}", markup=False)
    columns = (name, progress.BarColumn(), *counts, progress.TimeRemainingColumn())
    disable = not (visible and console.is_terminal)
    with progress.Progress(*columns, console=console, disable=disable, transient=True) as bar:
        task, due = bar.add_task(what, total=None), 0.0

        def report(done: int, total: int | None, what: str = what) -> None:
            nonlocal due
            if not disable and (done == total or time.monotonic() >= due):
                bar.update(task, description=what, completed=done, total=total)
                due = time.monotonic() + PROGRESS_SECONDS

        yield report


def confirm(question: str, *, yes: bool, number: int | None = None) -> None:
    """Returns when the answer is yes, or of an action on many things their number. Raises CommandError when it is
    another, or when standard input is no terminal.
    """
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandError(
            "nothing was done: this needs a confirmation, and there is no terminal to ask on: confirm with --yes"
        )
    how = "[y/N]" if number is None else f"Type their number, {number}, to go on:"
    print(f"{question} {how} ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in (("y", "yes") if number is None else (str(number),)):
        raise CommandError("nothing was done", EXIT_FAILED)
