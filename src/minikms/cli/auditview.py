"""How audit lines and reports look to a person, and as JSON.

Owns: the text of `minikms audit`. Invariant: what a log holds is shown only as the parsed event or a line that obeys
the format, so nothing in it reaches the terminal but printable ASCII. It must never judge.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from minikms.audit import record
from minikms.audit.chain import base64_text
from minikms.audit.check import Progress as Tell
from minikms.audit.record import Event, MalformedLineError
from minikms.audit.search import Totals
from minikms.audit.verdict import FINDINGS_COUNT_MAX, Report

_SHOWN_COUNT_MAX = 20
"""Rows of one table of `stats`; --json has them all."""


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Tell | None]:
    """Shows how far a check is, on standard error, where that is a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("Verifying", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report_json(report: Report) -> str:
    """One object. `head` is {"seq", "sig"} or null, as in `/status`."""
    built = {name: getattr(report, name) for name in report.__struct_fields__ if name not in ("head", "findings")}
    head = None if report.head is None else {"seq": report.head.seq, "sig": base64_text(report.head.sig)}
    return as_json(
        {"intact": report.intact, "judged": report.judged, "head": head, **built, "findings": report.findings}
    )


def as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def raw_line(line: bytes) -> str:
    """The line as it is, if it is an audit line: nothing else may reach a terminal."""
    try:
        record.split_line(line)
    except MalformedLineError as error:
        return as_json({"malformed": str(error)})
    return line.decode("ascii")


def report_lines(report: Report) -> Iterator[str]:
    if report.findings_count:
        count = report.findings_count
        yield f"The audit log is NOT intact: {count} finding{'s' if count != 1 else ''}."
        for finding in report.findings:
            place = f"{finding.file}:{finding.line}" if finding.line else finding.file
            yield f"  {place}: {finding.text} ({finding.kind})"
        if count > FINDINGS_COUNT_MAX:
            yield f"  … and {count - FINDINGS_COUNT_MAX} more"
        if report.given_up:
            yield "  There the check was given up: what follows was not looked at."
    elif not report.judged:
        yield "The audit log can't be judged by the public key: no line of it is signed yet."
    else:
        how = "every line by the audit key" if report.macs_checked else "by its signed lines"
        yield f"The audit log is intact{_part(report)}, judged {how}."
    if report.head is None:
        return
    yield f"  lines       {report.first_seq} to {report.head.seq}, in {report.segments} file(s); log {report.log_id}"
    if report.from_signed_line:
        yield f"  before      what stands before line {report.first_seq} was not looked at"
    elif report.first_seq > 1 and report.intact:
        yield f"  removed     lines 1 to {report.first_seq - 1}, as the log says"
    yield f"  head        {report.head.seq}:{base64_text(report.head.sig)}"
    yield f"  signed      up to line {report.covered_seq}, {report.checkpoints} signed line(s)"
    if report.public_key is not None:
        yield f"  key         version {report.key_version}, public key {base64_text(report.public_key)}"
    if report.lines_not_covered:
        note = "" if report.macs_checked else ": the public key can't judge them"
        yield f"  not signed  the last {report.lines_not_covered} line(s){note}"
    if report.lines_after_expected_head is not None:
        known_seq = report.head.seq - report.lines_after_expected_head
        note = "" if report.macs_checked or known_seq < report.covered_seq else "; that one is not signed yet"
        yield f"  anchor      {report.lines_after_expected_head} line(s) are newer than the expected head{note}"
    elif report.intact:
        yield "  anchor      none given: lines cut off cleanly at the end would not show (see --expect-head)"


def _part(report: Report) -> str:
    """Which part of the log was judged, where it was not all of it."""
    begin = f"from line {report.first_seq}" if report.from_signed_line else ""
    end = f"up to line {report.covered_seq}" if report.lines_not_covered and not report.macs_checked else ""
    return f" {begin} {end}".rstrip().replace("  ", " ")


def event_line(line: bytes) -> str:
    """One audit line for a person; a line that is none is said to be so, and not shown."""
    try:
        event = record.parse_line(line)[0]
    except MalformedLineError as error:
        return f"(not an audit line: {error})"
    return " ".join(
        [_time(event.ts), f"{event.seq:>8}", f"{event.type:<16}", event.actor, event.outcome, *_rest(event)]
    )


def _rest(event: Event) -> Iterator[str]:
    if event.pid:
        yield f"pid={event.pid}"
    if event.key_id:
        yield f"key={event.key_id}"
    if event.key_ids:
        yield f"keys={','.join(event.key_ids)}"
    if event.thread_id:
        yield f"thread={event.thread_id}"
    if event.count:
        yield f"count={event.count}"
    if event.request_id:
        yield f"request={event.request_id}"
    if event.request_ids:
        yield f"requests={','.join(event.request_ids)}"
    if event.detail:
        yield f"({event.detail})"
    for name, value in event.facts.items():
        yield f"{name}={value}"


def _time(ts: int) -> str:
    """RFC 3339 in UTC, to the millisecond."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ts // 10**9)) + f".{ts // 10**6 % 1000:03}Z"


def print_totals(totals: Totals) -> None:
    # An actor may be called [/bold], or what makes a link of it: shown, not obeyed.
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(f"{totals.lines} lines in {totals.files} file(s), {totals.disk_bytes} bytes on disk")
    if totals.lines:
        console.print(f"from {_time(totals.first_ts)} to {_time(totals.last_ts)}; {totals.items} items")
    if totals.malformed:
        console.print(f"{totals.malformed} lines are not audit lines: run `minikms audit verify`")
    for title, counts in (("type", totals.types), ("outcome", totals.outcomes), ("actor", totals.actors)):
        table = Table(title, "lines", box=None, pad_edge=False)
        table.columns[1].justify = "right"
        for name, count in list(counts.items())[:_SHOWN_COUNT_MAX]:
            table.add_row(name, str(count))
        console.print()
        console.print(table)
