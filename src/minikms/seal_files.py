"""The files of the sealed state: the marker, the record of a lease's end, and those of attempts to unseal.

Owns: the files of the data directory that a sealed daemon writes, which has no key to sign an audit line with.
Invariants:
- While `sealed.json` exists, in whatever state, every start stays sealed.
- An attempt is recorded durably before the root key or share is tried, so that a crash hides none. The next unseal, or
  start that is not sealed, adds the records to the audit log, and only then are they removed. A crash between the two
  repeats lines; a repeated line has the same `attempt` id.
- The end of a lease keeps no start sealed. Its record is for the audit log, as those of attempts are.
- Each file is bounded. Of more than ATTEMPTS_KEPT records the oldest are dropped, and counted; those of wrong root
  keys and shares after all others, so that other attempts don't push them out.
- Nothing authenticates the files. A writer of the data directory can alter them before the unseal. A record
  that does not have the expected form is dropped, and counted.

They must never hold a root key, a share, or text of a caller.
"""

from __future__ import annotations

import os
import re
import secrets
from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import StorageUnavailableError
from minikms.audit import Event
from minikms.audit.record import ACTOR_SELF, Facts
from minikms.crypto.shares import SHARES_COUNT_MAX
from minikms.platform.clock import now_ns, rfc3339
from minikms.platform.files import read_file_bounded, remove_file, replace_file
from minikms.policy.principal import Principal

SEALED_TEXT: Final = (
    "the key service is sealed: it has no key until an operator unseals it with `minikms unseal`, and then it goes on "
    "by itself"
)
MARKER_NAME: Final = "sealed.json"
ATTEMPTS_NAME: Final = "unseal-attempts.json"
LAPSE_NAME: Final = "lapsed.json"
MARKER_FORMAT: Final = "minikms-sealed"
ATTEMPTS_FORMAT: Final = "minikms-unseal-attempts"
LAPSE_FORMAT: Final = "minikms-lapsed"
VERSION: Final = 1
MARKER_BYTES_MAX: Final = 4096
ATTEMPTS_BYTES_MAX: Final = 256 * 1024
ATTEMPTS_KEPT: Final = 256

ANOTHER_MEMBER: Final = "another_member"
"""The actor of a seal that came from another host of a replicated key service."""
_ACTOR: Final = re.compile(rf"peer_uid:[0-9]{{1,10}}|{ANOTHER_MEMBER}", re.ASCII)
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
_ID: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)

LeaseEnd = Literal["refused", "ended"]
Kind = Literal["root_hex", "from_source", "share"]
Outcome = Literal["begun", "wrong_root", "wrong_share", "share_kept", "refused", "failed"]
"""`begun`: the daemon ended during the attempt, or the outcome could not be written. `refused`: the text was no share,
or the share did not fit those before it.
"""
WRONG: Final = frozenset[Outcome](("wrong_root", "wrong_share"))


class Marker(msgspec.Struct, forbid_unknown_fields=True):
    """Who sealed the daemon, and when. `at` is RFC 3339 in UTC; empty where the file could not be read. `seals`: the
    count that the other hosts of a replicated key service are to learn of; absent if there are none.
    """

    format: str = MARKER_FORMAT
    version: int = VERSION
    at: str = ""
    actor: str = ""
    pid: int = 0
    seals: int | UnsetType = UNSET

    @classmethod
    def of(cls, who: Principal, seals: int | UnsetType = UNSET) -> Marker:
        return cls(MARKER_FORMAT, VERSION, rfc3339(now_ns()), who.actor, who.pid, seals)

    @classmethod
    def of_another(cls) -> Marker:
        return cls(MARKER_FORMAT, VERSION, rfc3339(now_ns()), ANOTHER_MEMBER, os.getpid())


class Lapse(msgspec.Struct, forbid_unknown_fields=True):
    """The daemon sealed itself: the lease of its root key was refused, or has ended. `at` as in `Marker`."""

    format: str
    version: int
    at: str
    pid: int
    lease: LeaseEnd

    @classmethod
    def now(cls, lease: LeaseEnd) -> Lapse:
        return cls(LAPSE_FORMAT, VERSION, rfc3339(now_ns()), os.getpid(), lease)

    def event(self, why: str = "") -> Event:
        facts: Facts = {"at": self.at, "lease": self.lease}
        return Event(type=api.SEAL.name, actor=ACTOR_SELF, pid=self.pid, detail=why, facts=facts)


class Attempt(msgspec.Struct, forbid_unknown_fields=True):
    """One attempt to unseal. `at_ns` is Unix time; `share` the number of the share, 0 where none is known."""

    attempt: str
    at_ns: int
    actor: str
    pid: int
    kind: Kind
    outcome: Outcome
    share: int

    @classmethod
    def by_itself(cls) -> Attempt:
        """An attempt of the daemon, with its own source."""
        return cls(secrets.token_hex(8), now_ns(), ACTOR_SELF, os.getpid(), "from_source", "begun", 0)


class _AttemptFile(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    dropped: int
    records: list[Attempt]


def read_marker(directory: int) -> Marker | None:
    """None: there is no marker. A marker that can't be read counts: its fields are empty."""
    try:
        data = read_file_bounded(MARKER_NAME, MARKER_BYTES_MAX, dir_fd=directory)
    except StorageUnavailableError:
        return Marker()
    if data is None:
        return None
    try:
        marker = msgspec.json.decode(data, type=Marker)
    except UNDECODABLE:
        return Marker()
    known = (marker.format, marker.version) == (MARKER_FORMAT, VERSION)
    if not known or _TIME.fullmatch(marker.at) is None or _ACTOR.fullmatch(marker.actor) is None:
        return Marker()
    return marker


def write_marker(directory: int, marker: Marker) -> None:
    """Durable on return. Raises StorageUnavailableError."""
    replace_file(directory, MARKER_NAME, msgspec.json.encode(marker))


def read_lapse(directory: int) -> Lapse | None:
    """The lapse that an earlier process recorded; None without one, or for one that can't be read."""
    try:
        data = read_file_bounded(LAPSE_NAME, MARKER_BYTES_MAX, dir_fd=directory)
        lapse = None if data is None else msgspec.json.decode(data, type=Lapse)
    except (StorageUnavailableError, *UNDECODABLE):
        return None
    if lapse is None or (lapse.format, lapse.version) != (LAPSE_FORMAT, VERSION) or not 0 <= lapse.pid < 1 << 31:
        return None
    return None if _TIME.fullmatch(lapse.at) is None else lapse


def write_lapse(directory: int, lapse: Lapse) -> None:
    """Durable on return. Raises StorageUnavailableError."""
    replace_file(directory, LAPSE_NAME, msgspec.json.encode(lapse))


def write_attempts(directory: int, data: bytes) -> None:
    """Writes what `AttemptRecords.encode` made. Durable on return. Raises StorageUnavailableError."""
    replace_file(directory, ATTEMPTS_NAME, data)


def remove_seal_files(directory: int) -> None:
    """Removes the records, and last the marker. Durable on return. Raises StorageUnavailableError."""
    remove_file(directory, ATTEMPTS_NAME)
    remove_file(directory, LAPSE_NAME)
    remove_file(directory, MARKER_NAME)


class AttemptRecords:
    """The records since the last unseal, oldest first. `dropped`: how many more there were."""

    def __init__(self, records: list[Attempt], dropped: int) -> None:
        self._records = records
        self.dropped = dropped

    @classmethod
    def load(cls, directory: int) -> AttemptRecords:
        """Loads the records of an earlier process. A file that can't be read counts as one dropped record."""
        try:
            data = read_file_bounded(ATTEMPTS_NAME, ATTEMPTS_BYTES_MAX, dir_fd=directory)
            if data is None:
                return cls([], 0)
            file = msgspec.json.decode(data, type=_AttemptFile)
        except (StorageUnavailableError, *UNDECODABLE):
            return cls([], 1)
        if (file.format, file.version) != (ATTEMPTS_FORMAT, VERSION):
            return cls([], 1)
        attempts = [record for record in file.records if _is_well_formed(record)][-ATTEMPTS_KEPT:]
        return cls(attempts, max(0, file.dropped) + len(file.records) - len(attempts))

    def begin(self, who: Principal, kind: Kind) -> Attempt:
        """A new record, not yet on disk."""
        if len(self._records) == ATTEMPTS_KEPT:
            others = (record for record in self._records if record.outcome not in WRONG)
            self._records.remove(next(others, self._records[0]))
            self.dropped += 1
        attempt = Attempt(secrets.token_hex(8), now_ns(), who.actor, who.pid, kind, "begun", 0)
        self._records.append(attempt)
        return attempt

    def take_back(self, attempt: Attempt) -> None:
        """Forgets the newest record, which could not be written: the attempt is not made."""
        if self._records and self._records[-1] is attempt:
            self._records.pop()

    def encode(self) -> bytes:
        """The file."""
        return msgspec.json.encode(_AttemptFile(ATTEMPTS_FORMAT, VERSION, self.dropped, list(self._records)))

    def failed(self) -> list[Attempt]:
        """The attempts with a wrong root key or share. A disk that fails, or a crash, is no attempt of this kind."""
        return [record for record in self._records if record.outcome in WRONG]

    def slowed(self) -> list[Attempt]:
        """The attempts that count for `SlowDown`: also text that is no share, since it may be a guess."""
        return [record for record in self._records if record.outcome in WRONG or record.outcome == "refused"]

    def events(self, *, but: Attempt | None = None) -> list[Event]:
        """The lines about all attempts `but` the one that unsealed, which has a line of its own."""
        events = [
            Event(
                type="unseal_attempt",
                actor=record.actor,
                pid=record.pid,
                outcome=record.outcome,
                facts=_facts(record),
            )
            for record in self._records
            if record is not but
        ]
        if self.dropped:
            detail = "records of attempts to unseal were dropped: too many, or damaged"
            events.append(Event(type="unseal_attempt", actor="minikms", count=self.dropped, detail=detail))
        return events


def _facts(record: Attempt) -> Facts:
    facts: Facts = {"at": rfc3339(record.at_ns), "attempt": record.attempt, "kind": record.kind}
    return {**facts, "share": record.share} if record.share else facts


def _is_well_formed(record: Attempt) -> bool:
    return (
        0 <= record.share <= SHARES_COUNT_MAX
        and _ID.fullmatch(record.attempt) is not None
        and _ACTOR.fullmatch(record.actor) is not None
        and 0 <= record.at_ns < 1 << 63
        and 0 <= record.pid < 1 << 31
    )
