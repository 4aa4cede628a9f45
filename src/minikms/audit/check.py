"""Verifying a log where it lies: the workflow around the checker.

Owns: feeding the files of a directory to the `Verifier`, in order, and where to begin. It works beside a live daemon,
without its lock; memory stays bounded whatever the size. It must never write, and judges nothing that `verify` judges:
its own findings are of files that are missing, misnamed or damaged as a whole.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import ClassVar

from minikms.audit import segments
from minikms.audit.reading import DamagedSegmentError, SegmentFile, each_segment
from minikms.audit.record import Head, MalformedLineError, line_start, parse_line
from minikms.audit.segments import LOG_NAME
from minikms.audit.verdict import Report, Trust
from minikms.audit.verify import Verifier
from minikms.errors import MiniKmsError

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes in all, as they lie on the disk."""

_PROGRESS_LINES = 10_000


class AuditLogMissingError(MiniKmsError):
    """There is no log, or not the line that a check should begin with."""

    code: ClassVar[str] = "audit_missing"


def verify_directory(
    directory: str,
    trust: Trust,
    *,
    expect_head: Head | None = None,
    from_checkpoint: int = 0,
    progress: Progress | None = None,
) -> Report:
    """The report on the log in `directory`.

    from_checkpoint: seq of a signed line (`checkpoint`, `segment_close`, `audit_key`) to begin with; what stands
    before it is then not read. Raises AuditLogMissingError when there is no log or no such line, and OSError.
    """
    after = _segment_before(directory, from_checkpoint) if from_checkpoint else 0
    feeder = _Feeder(
        Verifier(trust, expect_head=expect_head, from_signed_line=from_checkpoint > 0),
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
    """Feeds files to a verifier, from the line `skip_to` on, and tells how far it is."""

    def __init__(self, verifier: Verifier, total: int, progress: Progress | None, *, skip_to: int) -> None:
        self.verifier = verifier
        self.files = 0
        self._total = total
        self._before = 0
        self._progress = progress
        self._sought = line_start(skip_to) if skip_to else b""

    @property
    def skipping(self) -> bool:
        """Whether the line to begin with has not been met."""
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
                    self._tell(file)
        except DamagedSegmentError as error:
            verifier.fault("segment", str(error))
        if file.rest and not self._sought:
            verifier.feed_incomplete(file.rest)
        if not self._sought:
            verifier.end_file()
        self._tell(file)
        self._before += file.position

    def _tell(self, file: SegmentFile) -> None:
        if self._progress is not None:
            done = self._before + file.position
            self._progress(done, max(done, self._total))


def _segment_before(directory: str, seq: int) -> int:
    """Number of the segment before the one that holds line `seq`, as far as the first lines tell."""
    before = last = 0
    for file in each_segment(directory):
        try:
            first = parse_line(file.first_line())[0]
        except (MalformedLineError, DamagedSegmentError):
            continue
        if first.seq > seq:
            break
        before, last = last, file.number
    return before


def _bytes_on_disk(directory: str, after: int) -> int:
    total = 0
    closed = segments.list_segments(directory)
    for name in [LOG_NAME, *(names[0] for number, names in closed.items() if number > after)]:
        with contextlib.suppress(FileNotFoundError):
            total += os.stat(os.path.join(directory, name), follow_symlinks=False).st_size
    return total
