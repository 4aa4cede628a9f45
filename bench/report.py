"""Rows of figures, and the Markdown table made of them.

Owns the form of docs/benchmarks.md between its markers. Never rewrites what stands outside them.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENT = PROJECT / "docs" / "benchmarks.md"
BENCH = "bench"
"""The part of the document that has the table of budgets; bench/plots.py has others."""


@dataclass(frozen=True)
class Row:
    """One figure. `floor` and `goal` are in the unit of `value`; `less_is_better` turns the comparison round, so that
    the floor is what it may be at most. A budget without a goal is a floor alone. `lowest` and `highest` are those of
    several runs; None of one run.
    """

    what: str
    value: float
    unit: str
    floor: float | None = None
    goal: float | None = None
    less_is_better: bool = False
    note: str = ""
    lowest: float | None = None
    highest: float | None = None

    def verdict(self) -> str:
        """`goal`, `floor` or `below the floor`; empty where there is nothing to compare with."""
        if self.floor is None:
            return ""
        sign = -1 if self.less_is_better else 1
        if self.goal is not None and sign * self.value >= sign * self.goal:
            return "goal met"
        return "floor met" if sign * self.value >= sign * self.floor else "**below the floor**"


@dataclass(frozen=True)
class Missing:
    """A bench that could not run here, and what it lacks."""

    what: str
    reason: str


def merged(runs: Sequence[Sequence[Row | Missing]]) -> list[Row | Missing]:
    """One row for each figure of several runs: that of the run with the median, and the range. A figure that a run
    lacks is missing. Of an even number of runs, the lower one in the middle is the median. Figures are the same if they
    have one name, and of several with one name in a run if their turn is the same.
    """
    found: dict[tuple[str, int], list[Row | Missing]] = {}
    for run in runs:
        turns: Counter[str] = Counter()
        for each in run:
            found.setdefault((each.what, turns[each.what]), []).append(each)
            turns[each.what] += 1
    return [_merged(what, results, len(runs)) for (what, _), results in found.items()]


def _merged(what: str, results: list[Row | Missing], runs: int) -> Row | Missing:
    rows = [each for each in results if isinstance(each, Row)]
    if not rows:
        return results[0]
    if len(rows) < runs:
        return Missing(what, f"measured in {len(rows)} of {runs} runs")
    if runs == 1:
        return rows[0]
    values = [row.value for row in rows]
    median = statistics.median_low(values)
    return replace(rows[values.index(median)], lowest=min(values), highest=max(values))


def figure(value: float) -> str:
    """Three digits that count: 1.23, 45.6, 789, 12,345."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(results: list[Row | Missing]) -> str:
    """The Markdown table."""
    lines = ["| what | measured | floor | goal | | how |", "|---|---|---|---|---|---|"]
    for result in results:
        if isinstance(result, Missing):
            lines.append(f"| {result.what} | not measured | | | | {result.reason} |")
            continue
        floor = "" if result.floor is None else figure(result.floor)
        goal = "" if result.goal is None else figure(result.goal)
        measured = f"{figure(result.value)} {result.unit}".rstrip()
        if result.lowest is not None and result.highest is not None:
            measured += f" ({figure(result.lowest)} to {figure(result.highest)})"
        lines.append(f"| {result.what} | {measured} | {floor} | {goal} | {result.verdict()} | {result.note} |")
    return "\n".join(lines)


def heading(load_before: float, runs: int = 1) -> str:
    """Machine, commit and date: what a figure means nothing without; and how busy others kept the machine. The commit
    has no back-quotes, which in the documents are for names of the code.
    """
    ranges = (
        f" Each figure, and its note, is that of the median of {runs} runs; its range over the runs is in brackets."
        if runs > 1
        else ""
    )
    return (
        f"Measured {time.strftime('%Y-%m-%d')} at commit {commit()}: {machine()}. "
        f"Load average before the start: {load_before:.2f}.{ranges}"
    )


def machine() -> str:
    """Processor, cores, kernel and interpreter."""
    python = platform.python_version()
    return f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}, Python {python}"


def save(text: str, document: Path = DOCUMENT, part: str = BENCH) -> None:
    """Put `text` between the markers of a part of the document. Raises ValueError when the markers are not there, once
    each.
    """
    begin, end = markers(part)
    old = document.read_text(encoding="utf-8")
    if old.count(begin) != 1 or old.count(end) != 1:
        raise ValueError(f"{document} needs the lines {begin} and {end}, once each")
    before, rest = old.split(begin)
    after = rest.split(end)[1]
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def markers(part: str) -> tuple[str, str]:
    """The lines before and after what is saved."""
    return f"<!-- {part}: begin -->", f"<!-- {part}: end -->"


def say(text: str) -> None:
    """Progress, apart from the table: to standard error."""
    print(text, file=sys.stderr, flush=True)


def commit() -> str:
    """The commit that is checked out, and whether the source differs from it; `unknown` without git or a repository."""
    if shutil.which("git") is None:
        return "unknown"

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "bench")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" and changes not committed" if changed else "")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
