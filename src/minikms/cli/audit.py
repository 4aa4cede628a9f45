"""`minikms audit`: verify and read the audit log, change its key.

Owns: the flags, how lines and reports are shown, and the exit statuses: 0 intact or done, 1 altered or malformed, 2 a
key, a file or a line to begin with is missing, or the result is unknown. Invariants: `verify`, `tail` and `find`
work beside a running daemon, without its lock; of a log, only parsed events and lines that obey the format are shown,
which are printable ASCII without escapes, so a log can't drive the terminal. It must never hold a key.
"""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import App, Parameter, validators

from minikms.api.base64 import encode_text
from minikms.api.errors import KmsRefusedError, StartError
from minikms.audit import record
from minikms.audit.record import Event, MalformedLineError
from minikms.audit.rules import FINDINGS_COUNT_MAX
from minikms.audit.verdict import VerificationReport
from minikms.cli import audit_tree
from minikms.cli.console import (
    PACKAGE_DATA_DIR,
    PACKAGE_INDEX_DIR,
    DataDir,
    DataFiles,
    RootKey,
    Yes,
    chosen_data_dir,
    complain,
)
from minikms.commands.output import confirm, progress_bar
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, EXIT_MISSING, CommandError

if TYPE_CHECKING:
    from minikms.audit.record import LineRef
    from minikms.audit.rules import Trust


def report_json(report: VerificationReport, tree: audit_tree.TreeReport | None = None) -> str:
    """One object. `head` is {"seq", "sig"} or null, as in `/status`."""
    built = {name: getattr(report, name) for name in report.__struct_fields__ if name not in ("head", "findings")}
    head = None if report.head is None else {"seq": report.head.seq, "sig": encode_text(report.head.sig)}
    return as_json(
        {
            "intact": report.intact,
            "conclusive": report.conclusive,
            "head": head,
            **built,
            "findings": report.findings,
            **({} if tree is None else {"tree": tree}),
        }
    )


def as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def raw_line(line: bytes) -> str:
    """The line itself, if it is an audit line: nothing else may reach a terminal."""
    try:
        record.split_line(line)
    except MalformedLineError as error:
        return as_json({"malformed": str(error)})
    return line.decode("ascii")


def report_lines(report: VerificationReport, tree: audit_tree.TreeReport | None = None) -> Iterator[str]:
    if tree is not None:
        yield from audit_tree.fault_lines(tree)
    if report.findings_count:
        count = report.findings_count
        yield f"The audit log is NOT intact: {count} finding{'s' if count != 1 else ''}."
        for finding in report.findings:
            place = f"{finding.file}:{finding.line}" if finding.line else finding.file
            yield f"  {place}: {finding.text} ({finding.kind})"
        if count > FINDINGS_COUNT_MAX:
            yield f"  … and {count - FINDINGS_COUNT_MAX} more"
        if report.given_up:
            yield "  The check stopped there: the lines after it were not checked."
    elif not report.conclusive:
        yield "The audit log can't be checked with the public key: no line of it is signed yet."
    else:
        lines, key = ("every line was", "audit") if report.macs_checked else ("the signed lines were", "public")
        what = "lines that are there are" if tree is not None and tree.faults else "audit log is"
        yield f"The {what} intact{_part(report)}: {lines} checked with the {key} key."
    if tree is not None:
        yield from audit_tree.tree_lines(tree)
    if report.head is None:
        return
    yield f"  lines       {report.first_seq} to {report.head.seq}, in {report.segments} file(s); log {report.log_id}"
    if report.from_signed_line:
        yield f"  before      the lines before line {report.first_seq} were not checked"
    elif report.first_seq > 1 and report.intact:
        yield f"  removed     lines 1 to {report.first_seq - 1}, as the log itself records"
    yield f"  head        {report.head.seq}:{encode_text(report.head.sig)}"
    yield f"  signed      up to line {report.covered_seq}, {report.checkpoints} signed line(s)"
    if report.public_key is not None:
        yield f"  key         version {report.key_version}, public key {encode_text(report.public_key)}"
    if report.lines_not_covered:
        note = "" if report.macs_checked else ": the public key can't check them"
        yield f"  not signed  the last {report.lines_not_covered} line(s){note}"
    if report.lines_after_expected_head is not None:
        known_seq = report.head.seq - report.lines_after_expected_head
        note = "" if report.macs_checked or known_seq < report.covered_seq else "; that one is not signed yet"
        yield f"  anchor      {report.lines_after_expected_head} line(s) are newer than the expected head{note}"
    elif report.intact and tree is None:
        yield "  anchor      none given: lines missing at the end are not noticed (see --checkpoint, --expect-head)"


def _part(report: VerificationReport) -> str:
    """Which part of the log was verified, if not all of it."""
    begin = f"from line {report.first_seq}" if report.from_signed_line else ""
    end = f"up to line {report.covered_seq}" if report.lines_not_covered and not report.macs_checked else ""
    return f" {begin} {end}".rstrip().replace("  ", " ")


def event_line(line: bytes) -> str:
    """One audit line for a person. Of a malformed line, only the fault is shown."""
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


TAIL_LINES_MAX: Final = 100_000
FOLLOW_SECONDS: Final = 0.25
PUBLIC_KEY_FILE_CHARS_MAX: Final = 200

app = App(name="audit", help="Verify and read the audit log.")

Json = Annotated[bool, Parameter(name="--json", help="One JSON object instead of text.")]
JsonLines = Annotated[bool, Parameter(name="--json", help="The lines as they are in the log.")]


@app.command
@audit_tree.judging
def verify(
    *,
    files: DataFiles = DataFiles(),
    public_key: Annotated[
        list[str] | None,
        Parameter(help="Judge by the signed lines alone, with this public key (or a file that holds it). Repeatable."),
    ] = None,
    expect_head: Annotated[str | None, Parameter(help="SEQ:SIG of an earlier line that the log must contain.")] = None,
    from_checkpoint: Annotated[
        int,
        Parameter(
            help="Begin with the signed line that has this seq, instead of the first line.",
            validator=validators.Number(gte=0),
        ),
    ] = 0,
    checkpoint: Annotated[
        str | None,
        Parameter(help="Also compare the log with this tree checkpoint of its auditor: `minikms-auditor checkpoint`."),
    ] = None,
    log_key: audit_tree.LogKeys = None,
    witness: audit_tree.WitnessKeys = None,
    quorum: audit_tree.Quorum = None,
    max_age: Annotated[
        str, Parameter(help="How old a quorum's cosignatures may be: 90s, 10m, 1h, 7d.")
    ] = audit_tree.MAX_AGE,
    tiles: audit_tree.TreeDir = None,
    json: Json = False,
) -> int:
    """Check every line of the log. A daemon may be running.

    With the root key, each line is checked by its own MAC. With only --public-key, each line is checked by the next
    signed line, and lines after the last signed line can't be checked. Give the public key of the log's first line. The
    command shows the public key at the end of the log: compare it with the newest one that you know. Exit status: 0 the
    checked lines are intact, 1 altered or malformed, 2 the key, the log or the first line to check is missing, or no
    line could be checked.

    With --checkpoint every line up to the end of the tree is compared with it too, so that a cut or replaced log is
    found. Status 1 also says that the log is not that of the tree, or that the tree checkpoint is too old; 2 also that
    it could not be believed, or that its age is unknown, as without --witness. If the log's first lines were removed,
    or it was begun anew, give --tiles.
    """
    from minikms.audit.queries import verify_directory
    from minikms.audit.rules import Trust
    from minikms.custody.log_directory import log_directory
    from minikms.datadir import audit_keys, open_for_reading

    def judge(trust: Trust) -> VerificationReport:
        with progress_bar("Verifying", visible=not json, in_bytes=True) as progress:
            return verify_directory(
                log_directory(directory), trust, expect_head=head, from_checkpoint=from_checkpoint, progress=progress
            )

    directory = files.directory
    if checkpoint is None and (log_key or witness or quorum or tiles):
        raise StartError(
            "--log-key, --witness, --quorum and --tiles say what a tree checkpoint must be: give --checkpoint"
        )
    believed = None if checkpoint is None else audit_tree.policy(log_key, witness, quorum)
    head = None if expect_head is None else _head(expect_head)
    if head is not None and head.seq < from_checkpoint:
        raise StartError(f"--from-checkpoint {from_checkpoint} leaves out line {head.seq}, which is expected")
    if public_key:
        report = judge(Trust(public_keys=public_keys(public_key)))
    else:
        root = files.root_key.provider(directory)
        if root is None:
            raise StartError(
                "give the root key with --master-key-file, or only the log's public key with --public-key: "
                "the one that was shown when the data directory was made"
            )
        with open_for_reading(directory, root) as unlocked:
            report = judge(audit_keys(unlocked).trust())
    tree = None
    if checkpoint is not None and believed is not None:
        tree = audit_tree.compare_with_tree(log_directory(directory), checkpoint, believed, max_age, tiles)
    if json:
        print(report_json(report, tree))
    else:
        print("\n".join(report_lines(report, tree)))
    if report.findings_count or (tree is not None and tree.faults):
        return EXIT_FAILED
    return EXIT_GOOD if report.conclusive and (tree is None or tree.age_seconds is not None) else EXIT_MISSING


@app.command
@audit_tree.judging
def tail(
    *,
    data_dir: DataDir = None,
    lines: Annotated[int, Parameter(help="How many.", validator=validators.Number(gte=0, lte=TAIL_LINES_MAX))] = 10,
    follow: Annotated[
        bool, Parameter(name=("--follow", "-f"), help="Continue with new lines as they are written.")
    ] = False,
    json: JsonLines = False,
) -> None:
    """Show the last lines of the log, without verifying them."""
    from minikms.audit.following import LogFollower, last_lines
    from minikms.audit.record import peek_seq

    directory = found_log(data_dir)
    newest_lines = last_lines(directory, lines) if lines else []
    _print_lines(newest_lines, json=json)
    if follow:
        newest = newest_lines or last_lines(directory, 1)
        follower = LogFollower(directory, after_seq=peek_seq(newest[-1]) if newest else 0)
        reader = select.poll()
        reader.register(sys.stdout, 0)  # POLLERR and POLLHUP are always reported
        while True:
            _print_lines(follower.read(), json=json)
            if reader.poll(FOLLOW_SECONDS * 1000):
                raise BrokenPipeError


@app.command
@audit_tree.judging
def find(
    *,
    data_dir: DataDir = None,
    thread: Annotated[str, Parameter(help="Thread id.")] = "",
    key: Annotated[str, Parameter(help="Key id.")] = "",
    actor: Annotated[str, Parameter(help="Actor, as in the log: peer_uid:1000.")] = "",
    request: Annotated[str, Parameter(help="Request id, of a request or of an item in a batch.")] = "",
    reads: Annotated[bool, Parameter(help="Only lines whose answer may hold plaintext.", show_default=False)] = False,
    index: Annotated[
        str | None, Parameter(help="The index of the auditor, in its state directory; '' for none.", show_default=False)
    ] = None,
    root_key: RootKey = RootKey(),
    json: JsonLines = False,
) -> int:
    """Show the lines about a thread, key, actor or request, without verifying them. With several of these, a line
    must match all.

    A line is about a thread if it names the thread or one of its keys, older ones included. `--thread ID --reads` shows
    when the thread was read, and the ids of the requests; the log of the message server names who sent a request. Where
    the oldest lines were removed, or the log follows another one, the keys are also taken from the key files, each of
    which is read.

    With the index, which is used if this user can read it, only blocks of lines are read that may match. Whoever can
    write it can hide lines: in doubt give --index ''.

    The search for a thread in a log with hashed thread ids (--audit-hash-thread-ids) needs the root key. Exit status: 0
    found, 1 nothing found, 2 the log is missing.
    """
    from contextlib import ExitStack

    from minikms.audit.blocks import Lookup
    from minikms.audit.queries import find as find_lines
    from minikms.audit.queries import query, shows_every_creation
    from minikms.datadir import audit_keys, open_for_reading

    if not (thread or key or actor or request or reads):
        raise CommandError("give something to find: --thread, --key, --actor, --request or --reads")
    lines = 0
    directory, keys = found_log(data_dir), chosen_data_dir(data_dir)
    index = readable_index(keys) if index is None else index
    lookup = Lookup(index, directory) if index else None
    with ExitStack() as stack:
        mac_keys: tuple[memoryview, ...] = ()
        root = root_key.provider(keys)
        if thread and root is not None:
            unlocked = stack.enter_context(open_for_reading(keys, root))
            mac_keys = tuple(audit_keys(unlocked).trust().mac_keys.values())
        of_thread = _keys_of_thread(keys, thread) if thread and not shows_every_creation(directory) else ()
        sought = query(
            thread=thread,
            thread_keys=of_thread,
            key=key,
            actor=actor,
            request=request,
            reads=reads,
            audit_keys=mac_keys,
        )
        for line in find_lines(directory, sought, lookup):
            _print_lines([line], json=json)
            lines += 1
    if lookup is not None:
        count = lookup.taken + lookup.left_out
        complain(f"by {index}: {lookup.taken} of {count} blocks read, and {lookup.whole} files that it does not have")
    return EXIT_GOOD if lines else EXIT_FAILED


@app.command(name="rotate-key")
@audit_tree.judging
def rotate_key(
    *,
    files: DataFiles = DataFiles(),
    json: Json = False,
) -> None:
    """Make a new audit key while the daemon is stopped.

    The log names it in a line signed with the old one. Keep the new public key where you keep the old one. Exit status:
    0 done, 2 refused.
    """
    from minikms.offline import rotate_audit_key

    key = rotate_audit_key(*files.opened())
    public_key = encode_text(key.public_key)
    if json:
        print(as_json({"version": key.version, "public_key": public_key, "head": key.head}))
    else:
        print(f"The audit key is now version {key.version}.")
        print(f"  public key  {public_key}   keep it outside the data directory")
        print(f"  head        {key.head['seq']}:{key.head['sig']}")


@app.command
@audit_tree.judging
def detach(
    *,
    files: DataFiles = DataFiles(),
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Forget the auditor while the daemon is stopped, so that another origin can be attached. A line says so.

    Until then retention deletes nothing that the auditor has not taken. Exit status: 0 done, 2 refused.
    """
    from minikms.offline import detach_auditor

    directory, root = files.opened()
    confirm("Detach the auditor? Lines that it has not taken may be deleted then.", yes=yes)
    origin = detach_auditor(directory, root)
    if json:
        print(as_json({"origin": origin}))
    else:
        print(f"Detached {origin}. Remove the grant of its auditor from the policy file, or it attaches itself again.")


app.command(audit_tree.export)
app.command(audit_tree.verify_export, name="verify-export")


# --- shared ----------------------------------------------------------------------------------------------------------


def found_log(data_dir: str | None) -> str:
    """The directory of the audit log. Raises StartError when no part of one is in it."""
    from minikms.audit.reader import LOG_NAME, list_segments
    from minikms.custody.log_directory import log_directory

    directory = log_directory(chosen_data_dir(data_dir))
    if not os.path.lexists(os.path.join(directory, LOG_NAME)) and not list_segments(directory):
        raise StartError(f"there is no audit log in {directory}")
    return directory


def readable_index(data_dir: str) -> str | None:
    """The index of the package's auditor, if this is its data directory and this user may read it."""
    readable = data_dir == PACKAGE_DATA_DIR and os.access(PACKAGE_INDEX_DIR, os.R_OK | os.X_OK)
    return PACKAGE_INDEX_DIR if readable else None


def _keys_of_thread(directory: str, thread: str) -> list[str]:
    """Ids of the thread's keys whose files are there and can be read."""
    from minikms.custody.settled_keys import SettledKeys

    key_ids: list[str] = []
    with SettledKeys(directory) as settled:
        for key in settled.each(settled.key_ids()):
            if not isinstance(key.record, KmsRefusedError) and key.record.thread_id == thread:
                key_ids.append(key.key_id)
    return key_ids


def public_keys(texts: Sequence[str]) -> frozenset[bytes]:
    """Public keys as text, or in files of such text. Raises StartError."""
    keys = set()
    for text in texts:
        key = _public_key(text)
        if key is None:
            try:
                with open(text, encoding="ascii") as file:
                    key = _public_key(file.read(PUBLIC_KEY_FILE_CHARS_MAX).strip())
            except (OSError, UnicodeDecodeError):
                raise StartError(f"{text} is neither a public key nor a file that can be read") from None
        if key is None:
            raise StartError(f"the file {text} does not hold a public key: 44 characters of base64, or 64 of hex")
        keys.add(key)
    return frozenset(keys)


def _public_key(text: str) -> bytes | None:
    from minikms.api.base64 import decode_exact
    from minikms.audit.chain import PUBLIC_KEY_BYTES

    if re.fullmatch(r"[0-9a-fA-F]{64}", text):
        return bytes.fromhex(text)
    return decode_exact(text, PUBLIC_KEY_BYTES)


def _head(text: str) -> LineRef:
    from minikms.audit.chain import parse_head

    head = parse_head(text)
    if head is None:
        raise StartError("--expect-head is SEQ:SIG, as `head` in `minikms status` or in this command's output")
    return head


def _print_lines(lines: Sequence[bytes], *, json: bool) -> None:
    for line in lines:
        print(raw_line(line) if json else event_line(line))
    if lines:
        sys.stdout.flush()
