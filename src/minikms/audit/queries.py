"""Reading a whole log: find events, verify everything.

Owns: what a query matches, which keys a thread had, and feeding the files of a directory to a `LogVerifier`.
Invariants: each file is read at most once, in bounded memory, beside a running daemon and without its lock; `find` does
not verify what it reads; the findings that `verify_directory` adds are about whole files that are missing or damaged.
It must never write, nor return a line that is malformed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Final

import msgspec

from minikms.api.errors import KmsRefusedError
from minikms.audit import record
from minikms.audit.blocks import ACTOR, KEY, OUTCOME, THREAD, TYPE, Lookup, name_number
from minikms.audit.following import segment_before
from minikms.audit.reader import LOG_NAME, DamagedSegmentError, SegmentFile, each_segment, list_segments
from minikms.audit.record import Event, LineRef, MalformedLineError, line_start
from minikms.audit.rules import Trust
from minikms.audit.verdict import LogVerifier, VerificationReport

_PROGRESS_LINES = 10_000


READ_TYPES: Final = ("decrypt", "decrypt_batch", "generate_data_key")
READ_OUTCOMES: Final = ("ok", "partly_refused")
"""Types and outcomes of events whose answer may hold plaintext."""
NEEDLES_MAX: Final = 32
"""The keys of a thread for which lines are searched. With more, parsing a line is cheaper than searching it for each.
"""


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """The conditions of a search: an event must match every field that is not empty.

    threads: the recorded forms of one thread id. thread_keys: ids of the thread's keys that are known already; an event
    that names one of them is about the thread. types, outcomes: one of these. since_ns, until_ns: Unix time, without
    the end; 0 for no bound.
    """

    threads: tuple[str, ...] = ()
    thread_keys: tuple[str, ...] = ()
    key: str = ""
    actors: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    outcomes: tuple[str, ...] = ()
    since_ns: int = 0
    until_ns: int = 0

    def matches(self, event: Event, thread_keys: AbstractSet[str] = frozenset()) -> bool:
        """`thread_keys`: of the thread, as far as they are known at this line."""
        return (
            (not self.threads or event.thread_id in self.threads or _names(event, thread_keys))
            and (not self.types or event.type in self.types)
            and (not self.outcomes or event.outcome in self.outcomes)
            and self.since_ns <= event.ts
            and (not self.until_ns or event.ts < self.until_ns)
            and (not self.key or event.key_id == self.key or self.key in event.key_ids)
            and (not self.actors or event.actor in self.actors)
            and (
                not self.requests
                or event.request_id in self.requests
                or not set(self.requests).isdisjoint(event.request_ids)
            )
        )

    def conditions(self, thread_keys: AbstractSet[str]) -> list[list[int]]:
        """For each condition that `minikms.audit.blocks` has numbers for: those of which a block must have one."""
        thread = [name_number(THREAD, text) for text in self.threads]
        thread += [name_number(KEY, text) for text in thread_keys] if thread else []
        fields = ((KEY, (self.key,)), (ACTOR, self.actors), (TYPE, self.types), (OUTCOME, self.outcomes))
        others = [[name_number(field, text) for text in texts if text] for field, texts in fields]
        return [numbers for numbers in (thread, *others) if numbers]

    def needles(self) -> list[tuple[bytes, ...]]:
        """For each field but the thread: byte strings, at least one of which occurs in a matching line."""
        members = (("type", self.types), ("outcome", self.outcomes))
        exact = (tuple(f'"{name}":"{text}"' for text in texts) for name, texts in members)
        fields = ((self.key,), self.actors, self.requests, *exact)
        return [tuple(text.encode() for text in texts) for texts in fields if any(texts)]

    def key_of_thread(self, event: Event) -> str:
        """The key that the event gives to the thread; empty if it gives none."""
        return event.key_id if event.thread_id in self.threads and event.outcome == "ok" else ""


def _names(event: Event, keys: AbstractSet[str]) -> bool:
    return event.key_id in keys or not keys.isdisjoint(event.key_ids)


def query(
    *,
    thread: str = "",
    thread_keys: Iterable[str] = (),
    key: str = "",
    actor: str = "",
    request: str = "",
    verb: str = "",
    outcome: str = "",
    reads: bool = False,
    since_ns: int = 0,
    until_ns: int = 0,
    audit_keys: Sequence[memoryview] = (),
) -> Query:
    """A query for texts as a person types them, actor and request also as the log has them, where some characters are
    escaped. With `audit_keys` it also finds a thread id recorded as an HMAC.

    `reads`: only events whose answer may hold plaintext, whatever `verb` is.
    """
    threads = [record.escape(thread), *(record.hash_thread_id(thread, each) for each in audit_keys)] if thread else []
    return Query(
        threads=tuple(threads),
        thread_keys=tuple(thread_keys),
        key=record.escape(key),
        actors=_forms(actor, record.ACTOR_CHARS_MAX),
        requests=_forms(request, record.TEXT_CHARS_MAX),
        types=READ_TYPES if reads else (record.escape(verb),) if verb else (),
        outcomes=(record.escape(outcome),) if outcome else READ_OUTCOMES if reads else (),
        since_ns=since_ns,
        until_ns=until_ns,
    )


def _forms(text: str, chars_max: int) -> tuple[str, ...]:
    """The text as the log has it, and as it is; none if it is empty."""
    return tuple(dict.fromkeys((record.escape(text, chars_max), text))) if text else ()


def find(directory: str, sought: Query, lookup: Lookup | None = None) -> Iterator[bytes]:
    """The lines, without their newlines, whose events match, oldest first. A line is about a thread if it names it, or
    a key that an earlier line gives to it: encryption and decryption are recorded by key. `lookup`: leaves out blocks.

    Raises OSError, DamagedSegmentError.
    """
    needles = sought.needles()
    keys = set(sought.thread_keys)
    of_thread = [text.encode() for text in (*sought.threads, *keys)]
    for file in each_segment(directory):
        lines = file.lines() if lookup is None else lookup.lines(file, lambda: sought.conditions(keys))
        for line in lines:
            # Search the bytes first: decoding every line of a large log would take minutes.
            is_searched = sought.threads and len(of_thread) <= NEEDLES_MAX
            if is_searched and not any(needle in line for needle in of_thread):
                continue
            wanted = all(any(needle in line for needle in some) for some in needles)
            if not (wanted or sought.threads):
                continue
            try:
                event = record.parse_line(line)[0]
            except MalformedLineError:
                continue
            if (key := sought.key_of_thread(event)) and key not in keys:
                keys.add(key)
                of_thread.append(key.encode())
            if wanted and sought.matches(event, keys):
                yield line


def shows_every_creation(directory: str) -> bool:
    """Whether the log goes back to the first key: its earliest lines were not removed, and it follows no other log, as
    after a restore or an accepted loss. Raises OSError, DamagedSegmentError.
    """
    for file in each_segment(directory):
        first = file.first_event()
        return first is not None and first.type == "genesis" and "previous" not in first.facts
    return False


Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the total, both as sizes on disk."""


class AuditLogMissingError(KmsRefusedError):
    """There is no log, or it does not have the line that a verification should begin with."""

    code = "audit_missing"


def verify_directory(
    directory: str,
    trust: Trust,
    *,
    expect_head: LineRef | None = None,
    from_checkpoint: int = 0,
    progress: Progress | None = None,
) -> VerificationReport:
    """Verify the log in `directory`.

    from_checkpoint: seq of a signed line (`checkpoint`, `segment_close`, `audit_key`) to begin with; earlier lines are
    not verified. Raises AuditLogMissingError if there is no log or no such line, and OSError.
    """
    after = segment_before(directory, from_checkpoint) if from_checkpoint else 0
    feeder = _Feeder(
        LogVerifier(trust, expect_head=expect_head, from_signed_line=from_checkpoint > 0),
        _bytes_on_disk(directory, after),
        progress,
        skip_to=from_checkpoint,
    )
    for file in each_segment(directory, after=after):
        feeder.feed(file)
        if feeder.verifier.exhausted:
            break
    if feeder.files == 0:
        raise AuditLogMissingError(f"there is no audit log in {directory}")
    if feeder.skipping:
        raise AuditLogMissingError(f"the audit log in {directory} has no line {from_checkpoint} to begin with")
    if not os.path.lexists(os.path.join(directory, LOG_NAME)):
        feeder.verifier.fault("missing", f"the file {LOG_NAME} is missing")
    return feeder.verifier.report()


class _Feeder:
    """Feeds files to a verifier, from the line `skip_to` on, and reports progress."""

    def __init__(self, verifier: LogVerifier, total: int, progress: Progress | None, *, skip_to: int) -> None:
        self.verifier = verifier
        self.files = 0
        self._total = total
        self._before = 0
        self._progress = progress
        self._sought = line_start(skip_to) if skip_to else b""

    @property
    def skipping(self) -> bool:
        """Whether the line to begin with was not found so far."""
        return bool(self._sought)

    def feed(self, file: SegmentFile) -> None:
        verifier = self.verifier
        verifier.begin_file(file.name, file.number)
        self.files += 1
        try:
            for count, line in enumerate(file.lines(), 1):
                if self._sought:
                    if not line.startswith(self._sought):
                        verifier.skip()
                        continue
                    self._sought = b""
                verifier.feed(line)
                if verifier.exhausted:
                    break
                if count % _PROGRESS_LINES == 0:
                    self._report_progress(file)
        except DamagedSegmentError as error:
            verifier.fault("segment", str(error))
        if file.rest and not self._sought:
            verifier.feed_incomplete(file.rest)
        if not self._sought:
            verifier.end_file()
        self._report_progress(file)
        self._before += file.position

    def _report_progress(self, file: SegmentFile) -> None:
        if self._progress is not None:
            done = self._before + file.position
            self._progress(done, max(done, self._total))


def _bytes_on_disk(directory: str, after: int) -> int:
    total = 0
    closed = list_segments(directory)
    for name in [LOG_NAME, *(names[0] for number, names in closed.items() if number > after)]:
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(os.path.join(directory, name), follow_symlinks=False).st_size
    return total
