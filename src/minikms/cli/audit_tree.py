"""`minikms audit verify --checkpoint`, `export` and `verify-export`: the audit log beside a tree checkpoint.

Owns: the flags that name keys and witnesses, the comparison of the log with a tree, and how its result is shown.
Invariants: who verifies an export needs nothing but the export and those keys; how new a log is comes from cosignatures
alone, so without a witness it is unknown. It must never hold a key.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal, ParamSpec

import msgspec
from cyclopts import Parameter, validators

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsRefusedError, StartError
from minikms.audit import export as exporting
from minikms.audit import note, ocsf, record
from minikms.audit.export import Exported, ProofChecker, TreeFault
from minikms.audit.note import VerifiedCheckpoint, WitnessPolicy, open_checkpoint, parse_vkey
from minikms.audit.reader import each_segment
from minikms.audit.record import MalformedLineError
from minikms.audit.tiles import Tiles
from minikms.audit.tree import ProofError
from minikms.cli.console import DataDir, chosen_data_dir, complain
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, EXIT_MISSING, CommandError

P = ParamSpec("P")

MAX_AGE: Final = "1h"
CLOCK_SECONDS_MAX: Final = 300
"""How far ahead of this machine's clock a witness's may be."""
_AGE: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_AGE_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LOG_TYPES: Final = (note.TYPE_ED25519, note.TYPE_ECDSA)
_LOG_ID_CHARS: Final = 32

LogKeys = Annotated[
    list[str] | None,
    Parameter(
        name="--log-key",
        help="Verifier key of the tree's log, as `minikms-auditor check-config` shows it. Repeatable: each must have "
        "signed then.",
    ),
]
WitnessKeys = Annotated[list[str] | None, Parameter(name="--witness", help="Verifier key of a witness. Repeatable.")]
Quorum = Annotated[
    int | None,
    Parameter(name="--quorum", help="How many of the witnesses must have cosigned: without it, all.",
              validator=validators.Number(gte=1))
]  # fmt: skip
TreeDir = Annotated[
    str | None,
    Parameter(name="--tiles", help="The tree's directory, as the auditor has it in `tree/` of its state directory."),
]


def judging(command: Callable[P, int | None]) -> Callable[P, int]:
    """A command whose exit status judges the log: 1 for a line that is not proven, 2 where something to judge by is
    missing."""

    @wraps(command)
    def judge(*args: P.args, **flags: P.kwargs) -> int:
        try:
            return command(*args, **flags) or EXIT_GOOD
        except BrokenPipeError:
            raise  # the reader of the output has left: `command.run` ends the process
        except (CommandError, KmsRefusedError, OSError) as error:
            named = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else ""
            complain(named or str(error))
            return EXIT_FAILED if isinstance(error, ProofError) else EXIT_MISSING

    return judge


class TreeReport(msgspec.Struct, frozen=True):
    """The result of the comparison with a tree. witnessed_at: Unix seconds at which a quorum knew no larger tree; None
    without witnesses. age_seconds: since then. faults: also a tree checkpoint that is too old.
    """

    origin: str
    size: int
    cosigned: tuple[tuple[str, int], ...]
    witnessed_at: int | None
    age_seconds: int | None
    faults: tuple[TreeFault, ...]


def policy(log_keys: Sequence[str] | None, witnesses: Sequence[str] | None, quorum: int | None) -> WitnessPolicy:
    if not log_keys:
        raise StartError("give the verifier key of the tree's log with --log-key")
    keys = tuple(parse_vkey(text, _LOG_TYPES) for text in log_keys)
    cosigners = tuple(parse_vkey(text, (note.TYPE_COSIGNATURE,)) for text in witnesses or ())
    believed = WitnessPolicy(keys, cosigners, len(cosigners) if quorum is None else quorum)
    believed.check()
    return believed


def compare_with_tree(
    log_directory: str, checkpoint: str, believed: WitnessPolicy, max_age: str, tree_dir: str | None
) -> TreeReport:
    """Compares the lines with the tree. Raises KmsRefusedError, for example if the tree checkpoint can't be believed,
    and OSError.
    """
    age_max_s = _seconds(max_age)
    content = exporting.read_bounded(Path(checkpoint), note.NOTE_BYTES_MAX)
    if content is None:
        raise StartError(f"there is no file {checkpoint}")
    opened = open_checkpoint(content, believed)
    faults = [*_compared(log_directory, opened, tree_dir)]
    at = opened.quorum_time(believed.quorum)
    now = int(time.time())
    if at is not None and at > now + CLOCK_SECONDS_MAX:
        faults.append(
            TreeFault("stale", "the witnesses have cosigned the tree checkpoint in the future: check the clock")
        )
    elif at is not None and now - at > age_max_s:
        text = f"the tree checkpoint is {now - at} s old: since {_rfc3339(at)} no quorum has said that it is the newest"
        faults.append(TreeFault("stale", text))
    size, origin = opened.checkpoint.size, opened.checkpoint.origin
    return TreeReport(origin, size, opened.cosigned, at, None if at is None else max(0, now - at), tuple(faults))


def _compared(log_directory: str, opened: VerifiedCheckpoint, tree_dir: str | None) -> list[TreeFault]:
    size, root = opened.checkpoint.size, opened.checkpoint.root
    lines = _lines(log_directory)
    if tree_dir is None:
        seq, line = next(lines, (0, b""))
        if seq != 1:
            raise StartError(
                f"the log begins with line {seq}, so the tree can't be computed from it alone: give --tiles DIR"
            )
        return exporting.compare(_with_first(seq, line, lines), size, root, None, 0)
    directory = Path(tree_dir)
    index = exporting.read_bounded(directory / exporting.INDEX_NAME, exporting.INDEX_BYTES_MAX)
    if index is None:
        raise StartError(f"there is no {exporting.INDEX_NAME} of a tree in {tree_dir}")
    seq, line = next(lines, (0, b""))
    log_id = _log_id(line)
    ranges = [each for each in exporting.parse_index(index) if each.log_id == log_id and each.first_leaf < size]
    if not ranges:
        return [TreeFault("foreign", f"the tree has no line of the log {log_id}")]
    first = ranges[-1].first_leaf + seq - ranges[-1].first_seq
    if not 0 <= first < size:
        raise StartError(f"the log begins with line {seq}, which the tree does not have")
    leaves = Tiles(exporting.tile_reader(directory), size).leaves()
    return exporting.compare(_with_first(seq, line, lines), size, root, leaves, first)


def _with_first(seq: int, line: bytes, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    if line:
        yield seq, line
        yield from lines


def _lines(log_directory: str) -> Iterator[tuple[int, bytes]]:
    for file in each_segment(log_directory):
        for line in file.lines():
            yield record.peek_seq(line), line


def _log_id(line: bytes) -> str:
    """The id of the log that begins with `line`."""
    try:
        return str(record.parse_line(line)[0].facts.get("log_id", ""))[:_LOG_ID_CHARS]
    except MalformedLineError:
        return ""


def fault_lines(report: TreeReport) -> Iterator[str]:
    for fault in report.faults:
        yield f"The audit log is NOT that of the tree checkpoint: {fault.text} ({fault.kind})."


def tree_lines(report: TreeReport) -> Iterator[str]:
    names = ", ".join(name for name, _ in report.cosigned) or "nobody"
    yield f"  tree        {report.origin}, {report.size} leaves, cosigned by {names}"
    if report.age_seconds is None:
        yield "  age         unknown: without a witness, a newer tree and a longer log may have been removed"
    else:
        yield f"  age         {report.age_seconds} s: no line that is older is missing at the end of the log"


# --- export -----------------------------------------------------------------------------------------------------------


@judging
def export(
    *,
    data_dir: DataDir = None,
    since: Annotated[
        str, Parameter(help="Only lines of this time or later: 2026-11-28, or 2026-11-28T10:00:00Z.")
    ] = "",
    until: Annotated[str, Parameter(help="Only lines before this time.")] = "",
    tiles: TreeDir = None,
    format: Annotated[
        Literal["line", "ocsf"], Parameter(help="ocsf: events of the class API Activity, with the proof in `unmapped`.")
    ] = "line",
) -> None:
    """Print lines of the log as JSON, each with the proof that it is under the newest tree checkpoint.

    `minikms audit verify-export` checks lines without the log. A line that no tree checkpoint has yet is left out, and
    standard error says how many those are. Exit status: 0 done, 1 a line is not the one in the tree, 2 the log or the
    tree is missing.
    """
    from minikms.custody.log_directory import log_directory

    if tiles is None:
        raise StartError("name the tree's directory with --tiles")
    begin = _nanoseconds(since, "--since") if since else 0
    end = _nanoseconds(until, "--until") if until else record.INTEGER_MAX
    prover = exporting.open_tree(Path(tiles))
    log_id, left_out = "", 0
    for seq, line in _lines(log_directory(chosen_data_dir(data_dir))):
        log_id = log_id or _log_id(line)
        try:
            event = record.parse_line(line)[0]
        except MalformedLineError as error:
            raise ProofError(f"line {seq} of the log is not an audit line: {error}") from None
        if not begin <= event.ts < end:
            continue
        try:
            proven = prover.prove(log_id, seq, line)
        except exporting.NotInTreeError:
            left_out += 1
            continue
        is_event = format == "ocsf"
        content = ocsf.encode(log_id, event, line, proven.proof) if is_event else msgspec.json.encode(proven)
        sys.stdout.buffer.write(content + b"\n")
    sys.stdout.flush()
    if left_out:
        print(f"minikms: {left_out} line(s) are not under the tree checkpoint yet and were left out", file=sys.stderr)


class ExportReport(msgspec.Struct):
    """What an export proves. first_seq, last_seq: of its lines. complete: no line between them is missing."""

    lines: int = 0
    first_seq: int = 0
    last_seq: int = 0
    complete: bool = True
    origin: str = ""
    witnessed_at: int | None = None


@judging
def verify_export(
    file: Annotated[
        str, Parameter(help="What `minikms audit export` or `minikms-auditor prove` printed; - reads standard input.")
    ],
    *,
    log_key: LogKeys = None,
    witness: WitnessKeys = None,
    quorum: Quorum = None,
    json: Annotated[bool, Parameter(help="One JSON object instead of text.")] = False,
) -> int:
    """Check exported lines without the log.

    Each must be in the tree whose tree checkpoint the keys have signed. It says from which line to which, and whether a
    line between them is missing. Exit status: 0 every line is proven, 1 one is not, 2 a key or the file is missing, or
    there is no line.
    """
    report = ExportReport()
    checker = ProofChecker(policy(log_key, witness, quorum))
    with opened(file) as source:
        previous = -1
        while raw := source.readline(exporting.EXPORTED_BYTES_MAX):
            index = _check(checker, raw, report)
            if index <= previous:
                raise ProofError(f"line {report.lines} of the export is not after the one before: sort them, each once")
            report.complete = report.complete and previous in (-1, index - 1)
            previous = index
    if json:
        print(msgspec.json.encode(report).decode())
    elif report.lines:
        print(f"{report.lines} line(s) are proven: lines {report.first_seq} to {report.last_seq} of {report.origin}.")
        print("  No line between them is missing." if report.complete else "  Lines between them were left out.")
        at = report.witnessed_at
        print("  No witness has cosigned." if at is None else f"  A quorum of witnesses cosigned, last {_rfc3339(at)}.")
    else:
        print("The export has no line.")
    return EXIT_GOOD if report.lines else EXIT_MISSING


def opened(file: str) -> BinaryIO:
    return sys.stdin.buffer if file == "-" else open(file, "rb")


def _check(checker: ProofChecker, raw: bytes, report: ExportReport) -> int:
    """The leaf of an exported line. Raises ProofError, NoteError."""
    place = f"line {report.lines + 1} of the export"
    try:
        exported = msgspec.json.decode(raw, type=Exported)
        proven = checker.check(exported)
        seq = record.parse_line(proven.line)[0].seq
    except UNDECODABLE:
        raise ProofError(f"{place} is not one of `minikms audit export`") from None
    except (ProofError, note.NoteError, MalformedLineError) as error:
        raise ProofError(f"{place}: {error}") from None
    report.lines += 1
    report.first_seq, report.last_seq = report.first_seq or seq, seq
    report.origin = proven.opened.checkpoint.origin
    report.witnessed_at = proven.opened.quorum_time(checker.quorum)
    return proven.index


def _nanoseconds(text: str, flag: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise StartError(f"{flag} takes a time such as 2026-11-28 or 2026-11-28T10:00:00Z") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()) * 10**9


def _seconds(text: str) -> int:
    match = _AGE.fullmatch(text)
    if match is None:
        raise StartError("--max-age takes a number of seconds, minutes, hours or days: 90s, 10m, 1h, 7d")
    return int(match[1]) * _AGE_SECONDS[match[2]]


def _rfc3339(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
