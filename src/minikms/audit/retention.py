"""Closed files that need not be kept any longer.

Owns: which of them may go, and deleting them. Rules: only the oldest go, one after the other, as long as all closed
files together hold more than `bytes_max`; none goes that was closed less than `days_min` ago; each is named, with the
head that it ended with, by a durable and signed `retention` line before any is deleted, so that a verifier can tell it
from one that was taken away. It must never touch the file being written, nor delete where it can't read what follows.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import msgspec

from minikms.audit import record, segments
from minikms.audit.chain import base64_bytes, base64_text
from minikms.audit.reading import each_segment
from minikms.audit.record import ACTOR_SELF, Event, Head, MalformedLineError

_DAY_NS: Final = 24 * 3600 * 1_000_000_000


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """bytes_max: of all closed files together, 0 for no bound. days_min: the floor, which wins over `bytes_max`."""

    bytes_max: int = 0
    days_min: int = 90


KEEP_ALL: Final = Retention()


class Removal(msgspec.Struct, frozen=True):
    """A closed file that may go: its number, its names, the head that it ended with."""

    number: int
    names: tuple[str, ...]
    last: Head

    def event(self) -> Event:
        """What the log must say, durably, before `delete`."""
        facts: record.Facts = {
            "last_seq": self.last.seq,
            "last_sig": base64_text(self.last.sig),
            "removed_segment": self.number,
        }
        return Event(type=record.TYPE_RETENTION, actor=ACTOR_SELF, facts=facts)


def due(directory: str, keep: Retention, now_ns: int) -> list[Removal]:
    """The files that may go now, oldest first. Raises OSError."""
    closed = segments.list_segments(directory)
    total = sum(_size(directory, name) for names in closed.values() for name in names)
    removals = []
    for number, names in closed.items():
        if not keep.bytes_max or total <= keep.bytes_max:
            break
        following = _first_event(directory, number + 1)
        if following is None or now_ns - following.ts < keep.days_min * _DAY_NS:
            break
        sig = base64_bytes(following.facts.get("previous_sig"), record.MAC_BYTES)
        seq = following.facts.get("previous_seq")
        if sig is None or not isinstance(seq, int):
            break
        removals.append(Removal(number, tuple(names), Head(seq, sig)))
        total -= sum(_size(directory, name) for name in names)
    return removals


def delete(directory: str, removal: Removal) -> list[str]:
    """Delete the file, in each form that there is. Returns the names. Raises OSError."""
    for name in removal.names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    segments.fsync_directory(directory)
    return list(removal.names)


def _first_event(directory: str, number: int) -> Event | None:
    """The first event of segment `number`, or None when that is not the next file or can't be read."""
    for file in each_segment(directory, after=number - 1):
        if file.number != number:
            return None
        try:
            return record.parse_line(file.first_line())[0]
        except MalformedLineError:
            return None
    return None


def _size(directory: str, name: str) -> int:
    try:
        return os.stat(os.path.join(directory, name), follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
