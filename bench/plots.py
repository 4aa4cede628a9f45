"""Growth as tables and plots: `python -m bench.plots` makes the SVG files of docs/plots from the CSV files beside them.

Owns: both forms of file, which columns a plot shows, and the tables of growth in docs/benchmarks.md. The plots are
written by hand rather than with a library: a few polylines need none. Invariants: the same figures give the same bytes,
so that a test can compare; the horizontal axis is logarithmic, and a vertical one that is not begins at zero.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bench import report
from bench.report import PROJECT, figure

DIRECTORY = PROJECT / "docs" / "plots"
KEYS = DIRECTORY / "keys.csv"
STORE = DIRECTORY / "store.csv"
STARTS = DIRECTORY / "starts.csv"
THREADS = DIRECTORY / "threads.csv"
"""The latter two hold what `bench growth_keys growth_rotations` and `bench.growth --lists` print."""

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 76, 48, 56, 48
"""Margins, in pixels as all lengths here."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Of Okabe and Ito, which most colour-blind people can tell apart; each series has its own mark as well."""
STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Plot:
    """One picture: some columns of a table, which have one unit, over its first column."""

    name: str
    table: Path
    title: str
    columns: tuple[str, ...]
    logarithmic: bool = False

    @property
    def file(self) -> Path:
        return self.table.parent / f"{self.name}.svg"


PLOTS = (
    Plot("keys-encrypts", KEYS, "Encrypts a second", ("encrypts of cached keys/s", "first encrypts of a key/s")),
    Plot("keys-creates", KEYS, "Keys a second", ("creates/s", "rotated keys/s")),
    Plot("keys-start", KEYS, "Seconds from the start to the first answer", ("start to encrypt (s)",)),
    Plot("keys-memory", KEYS, "Resident memory of the key service, MiB", ("resident (MiB)",)),
    Plot("store-appends", STORE, "Appends a second", ("appends/s",)),
    Plot(
        "store-reads",
        STORE,
        "Milliseconds of a read",
        ("last 1000 (ms)", "512 threads (ms)", "last 50 (ms)", "get (ms)"),
        logarithmic=True,
    ),
    Plot("store-memory", STORE, "Most resident memory of the process, MiB", ("peak MiB",)),
    Plot("starts", STARTS, "Seconds until every verb answers", ("after a stop (s)", "after a crash (s)"), True),
    Plot("starts-lists", STARTS, "Milliseconds of a list of a thread's keys", ("list (ms)",)),
    Plot("threads-lists", THREADS, "Microseconds of each listed thread", ("list (µs)", "search (µs)")),
    Plot("threads-rotations", THREADS, "Milliseconds of the rotation of a thread", ("rotation (ms)",)),
    Plot("threads-purges", THREADS, "Purged threads a second", ("purges/s",)),
)


def keep(table: Path, columns: Sequence[str], rows: Sequence[Sequence[float]], load_before: float) -> None:
    """Write the file, its plots, and the table in docs/benchmarks.md with what the figures were measured on."""
    write_csv(table, columns, rows)
    text = "\n".join([head(columns), *map(line, rows)])
    report.save(f"{report.heading(load_before)}\n\n{text}", report.DOCUMENT, table.stem)
    draw(table)


def head(columns: Sequence[str]) -> str:
    """Of the Markdown table."""
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def line(row: Sequence[float]) -> str:
    """Of the Markdown table; the first figure is whole."""
    cells = (figure(value) if value >= 0.1 else f"{value:.2g}" for value in row[1:])
    return f"| {row[0]:,.0f} | {' | '.join(cells)} |"


def draw(table: Path) -> None:
    """Write the pictures of a table. Raises as `read_csv`."""
    for plot in PLOTS:
        if plot.table == table:
            plot.file.write_text(svg(plot), encoding="utf-8")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Replaces the file. A value keeps four digits that count; those of the first column are whole."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([f"{row[0]:.0f}", *(f"{float(f'{value:.4g}'):.12g}" for value in row[1:])] for row in rows)


def read_csv(path: Path) -> dict[str, list[float]]:
    """Column → values, the first column first. Raises OSError; ValueError when it is no table of numbers above 0."""
    with open(path, encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    table = {name: [float(row[index]) for row in rows] for index, name in enumerate(columns)}
    if not rows or min(min(values) for values in table.values()) <= 0:
        raise ValueError(f"{path} has no rows, or a value that is not above 0")
    return table


def svg(plot: Plot) -> str:
    """The picture of the figures that are in the table now."""
    table = read_csv(plot.table)
    across, sizes = next(iter(table.items()))
    values = [value for column in plot.columns for value in table[column]]
    x = Axis.decades(sizes, LEFT, WIDTH - RIGHT)
    y = (Axis.decades if plot.logarithmic else Axis.from_zero)(values, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="{escape(plot.title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 20, plot.title, "start", ' font-weight="bold"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, across),
    ]
    for tick in y.ticks:
        parts.append(_line(LEFT, y.place(tick), WIDTH - RIGHT, y.place(tick)))
        parts.append(_text(LEFT - 8, y.place(tick) + 4, f"{tick:,.10g}", "end"))
    for tick in x.ticks:
        parts.append(_line(x.place(tick), TOP, x.place(tick), HEIGHT - BOTTOM))
        parts.append(_text(x.place(tick), HEIGHT - BOTTOM + 18, f"{tick:,.10g}"))
    legend_at = float(LEFT)
    for number, column in enumerate(plot.columns):
        points = [(x.place(size), y.place(value)) for size, value in zip(sizes, table[column], strict=True)]
        drawn = " ".join(f"{across:.1f},{up:.1f}" for across, up in points)
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{COLOURS[number]}" stroke-width="2"/>')
        parts += [_mark(number, *point) for point in points]
        parts += [_mark(number, legend_at + 5, 37), _text(legend_at + 14, 41, column, "start")]
        legend_at += 34 + 7.2 * len(column)
    return "\n".join([*parts, "</svg>", ""])


@dataclass(frozen=True)
class Axis:
    """From values to pixels: `begin` is the place of the first tick, `end` that of the last one."""

    ticks: tuple[float, ...]
    begin: float
    end: float
    logarithmic: bool

    @classmethod
    def decades(cls, values: Sequence[float], begin: float, end: float) -> Axis:
        """Logarithmic, from a power of ten to another one around the values."""
        first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
        return cls(tuple(10.0**power for power in range(first, max(last, first + 1) + 1)), begin, end, True)

    @classmethod
    def from_zero(cls, values: Sequence[float], begin: float, end: float) -> Axis:
        """Linear, in about five even steps to a round number that is not below the values."""
        rough = max(values) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * each for each in STEPS if unit * each >= rough * 0.999)
        count = math.ceil(max(values) / step - 1e-9)
        return cls(tuple(step * number for number in range(count + 1)), begin, end, False)

    def place(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.begin + (self.end - self.begin) * (value - low) / (high - low)


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222"{more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _mark(number: int, x: float, y: float) -> str:
    colour = COLOURS[number]
    if number == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    if number == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    corners = ((0, -5), (5, 4), (-5, 4)) if number == 2 else ((0, -5), (5, 0), (0, 5), (-5, 0))
    points = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def main() -> None:
    """Writes every picture. Raises as `read_csv`."""
    for table in (KEYS, STORE, STARTS, THREADS):
        draw(table)


if __name__ == "__main__":
    main()
