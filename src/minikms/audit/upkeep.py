"""What a log needs beside its lines: compression, retention, forwarding, and trying again.

Owns: which of these is done when, and in which thread. `tick` belongs to the thread of the log and is called about once
a second; `work` belongs to one worker thread of its own and is called every few seconds: it may take as long as a file
takes to compress, or another machine to answer. Neither raises; `status` says what does not work. It must never hold up
a commit, nor touch a file that the log has not closed.
"""

from __future__ import annotations

from typing import Final

from minikms.audit.compress import compress_closed
from minikms.audit.forward import Forwarder, Forwarding
from minikms.audit.log import AuditLog
from minikms.audit.reading import DamagedSegmentError
from minikms.audit.retention import Retention
from minikms.errors import AuditUnavailableError

RETENTION_TICKS: Final = 3600
"""Retention looks once an hour, and soon after a start."""
FORWARD_STEPS_MAX: Final = 100
"""Of 1,000 lines, in one call of `work`."""


class Upkeep:
    """For one open log. `keep` None keeps every file; without a forwarder nothing is sent."""

    def __init__(self, log: AuditLog, *, keep: Retention | None = None, forwarder: Forwarder | None = None) -> None:
        self._log = log
        self._keep = keep
        self._forwarding = None if forwarder is None else Forwarding(log.directory, forwarder)
        self._ticks = 0
        self._forwarded = 0
        self._faults: dict[str, str] = {}

    def tick(self) -> None:
        """The log's chores; now and then, what retention lets go of."""
        self._log.tick()
        due = self._ticks % RETENTION_TICKS == 0
        self._ticks += 1
        if self._keep is None or not due:
            return
        try:
            self._log.remove_segments(self._keep)
        except (AuditUnavailableError, DamagedSegmentError, OSError) as error:
            self._faults["retention"] = _reason(error)
        else:
            self._faults.pop("retention", None)

    def work(self) -> None:
        """Compress what was closed, send what was committed."""
        try:
            compress_closed(self._log.directory, below=self._log.segment)
        except (DamagedSegmentError, OSError) as error:
            self._faults["compression"] = _reason(error)
        else:
            self._faults.pop("compression", None)
        if self._forwarding is not None:
            self._forward(self._forwarding)

    def _forward(self, forwarding: Forwarding) -> None:
        head = self._log.head["seq"]
        try:
            for _ in range(FORWARD_STEPS_MAX):
                sent = forwarding.step(int(head))
                self._forwarded += sent
                if not sent:
                    break
        except (DamagedSegmentError, OSError) as error:
            forwarding.close()
            self._faults["forwarding"] = _reason(error)
        else:
            self._faults.pop("forwarding", None)

    def status(self) -> dict[str, object]:
        """{"faults": {what: why}, "forwarded": lines since the start, or None without a forwarder}"""
        return {
            "faults": dict(self._faults),
            "forwarded": None if self._forwarding is None else self._forwarded,
        }

    def close(self) -> None:
        """After the last `work` has returned."""
        if self._forwarding is not None:
            self._forwarding.close()


def _reason(error: Exception) -> str:
    return error.strerror or "failed" if isinstance(error, OSError) else str(error)
