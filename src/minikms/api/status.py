"""The answer to `GET /status`, as a client reads it.

Owns: the names and types of its members. Invariants: a member that a client does not know is ignored, and one that a
service does not report has an empty value, so that programs of different ages understand each other. An empty value
must never look like good news: it is not `ok`, not writable, not in force, not complete.

docs/spec/api.md says what the members mean.
"""

from __future__ import annotations

import msgspec


class RootLeaseStatus(msgspec.Struct, frozen=True):
    """The lease of the root key, in seconds. `last_failure`: why the last question was not granted; empty if it was.
    `outcomes`: questions since the start by `granted`, `refused`, `away`.
    """

    seconds: int = 0
    left_seconds: int = 0
    granted_at: str = ""
    last_failure: str = ""
    outcomes: dict[str, int] = {}


class RootStatus(msgspec.Struct, frozen=True):
    """`fingerprint`: of the root key in use. `slots`: the fingerprints of all root keys that open the keyring. `lease`:
    None without one.
    """

    provider: str = ""
    fingerprint: str = ""
    slots: list[str] = []
    lease: RootLeaseStatus | None = None


class KekStatus(msgspec.Struct, frozen=True):
    """One version of the KEK. `created_at` is RFC 3339 in UTC."""

    version: int = 0
    state: str = ""
    created_at: str = ""


class RotationStatus(msgspec.Struct, frozen=True):
    """A rotation of the KEK that runs or is about to. `total` is None while the number of keys is not known yet."""

    from_version: int = 0
    to_version: int = 0
    started_at: str = ""
    new_root: bool = False
    rewrapped: int = 0
    last_error: str = ""
    total: int | None = None


class PruningStatus(msgspec.Struct, frozen=True):
    """A prune of KEKs that runs: key files and backups of them; `total`: about how many there are."""

    read: int = 0
    total: int = 0


class KeysStatus(msgspec.Struct, frozen=True):
    """Counts of keys. `indexing`: key files are still being read. `unreadable_files`: at most 100 key ids, with the
    reason for each. `writable`: whether a key can be made or changed; None where the service does not report it.
    """

    indexing: bool = True
    by_state: dict[str, int] = {}
    by_kek_version: dict[str, int] = {}
    destroyed: int = 0
    unreadable: int = 0
    unreadable_files: dict[str, str] = {}
    writable: bool | None = None
    unavailable_reason: str = ""


class HeadStatus(msgspec.Struct, frozen=True):
    """The last line of the audit log: its number and its MAC in base64."""

    seq: int = 0
    sig: str = ""


class DurableStatus(msgspec.Struct, frozen=True):
    """The last line of the audit log that is on the disk for certain: its number and its MAC in base64."""

    seq: int = 0
    mac: str = ""


class PositionStatus(msgspec.Struct, frozen=True):
    """How far an auditor has taken the audit log. `age_seconds`: of its last report; None before the first one since
    the start. `lag_lines`: durable lines after its position; before its first report, all durable lines.
    """

    seq: int = 0
    origin: str = ""
    age_seconds: int | None = None
    lag_lines: int = 0


class UpkeepStatus(msgspec.Struct, frozen=True):
    """`faults`: the reason for each job that fails."""

    faults: dict[str, str] = {}


class AuditStatus(msgspec.Struct, frozen=True):
    """The audit log. `unavailable_since` is Unix time in nanoseconds, 0 while the log can be written. `position`: None
    if no auditor was ever attached.
    """

    head: HeadStatus = msgspec.field(default_factory=HeadStatus)
    durable: DurableStatus = msgspec.field(default_factory=DurableStatus)
    writable: bool = False
    unavailable_reason: str = ""
    unavailable_since: int = 0
    events_dropped: int = 0
    chore_fault: str = ""
    disk_full: bool = False
    reserve_bytes: int = 0
    log_id: str = ""
    audit_key_version: int = 0
    lines_not_signed: int = 0
    segment: int = 0
    segment_bytes: int = 0
    fsync: str = ""
    synced: bool = False
    public_key: str = ""
    position: PositionStatus | None = None
    upkeep: UpkeepStatus = msgspec.field(default_factory=UpkeepStatus)


class MemoryStatus(msgspec.Struct, frozen=True):
    """The arena, and the opened keys in it."""

    arena: str = ""
    locked_bytes: int = 0
    keys_in_memory: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    cache_evictions: int = 0


class MeasureStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """A measure that hardens the process. `why`: the reason why it is not in force."""

    measure: str
    in_force: bool
    why: str = ""


class HttpStatus(msgspec.Struct, frozen=True):
    """Connections now, bytes of answers that wait to be read now, and counts since the start."""

    connections: int = 0
    connections_max: int = 0
    unread_bytes: int = 0
    requests: int = 0
    refused: int = 0
    accept_failures: int = 0


class PolicyStatus(msgspec.Struct, frozen=True):
    """The policy in force. `sha256`: of its file. `last_error`: why the last reload failed; empty if it did not.
    `budgets_exhausted`: hour budgets that refuse requests now.
    """

    sha256: str = ""
    generation: int = 0
    age_seconds: int = 0
    last_error: str = ""
    budgets_exhausted: int = 0


class MemberStatus(msgspec.Struct, frozen=True):
    """A host of a replicated key service, as it reported `seen_seconds` ago."""

    member_id: str = ""
    name: str = ""
    mode: str = ""
    number: int = 0
    term: int = 0
    seen_seconds: float = 0.0


class ReplicaStatus(msgspec.Struct, frozen=True):
    """This host of a replicated key service. `serving`: the member that has the lease, as far as is known here.
    `lag_changes`: changes of the database that are not here yet. `heard_seconds`: since the last request of the
    replicator; None before the first. `why`: of the mode, where there is a reason. `members`: their last reports.
    """

    member_id: str = ""
    mode: str = ""
    serving: str = ""
    term: int = 0
    number: int = 0
    lag_changes: int = 0
    lease_seconds: float = 0.0
    heard_seconds: float | None = None
    why: str = ""
    members: list[MemberStatus] = []


class Condition(msgspec.Struct, frozen=True):
    """Something that is not well. `severity`: `failing`, if requests are refused because of it; `degraded`, if somebody
    has to act; `notice`. `action`: what to do. `runbook`: the entry of the runbook; empty if it has none.
    """

    name: str
    severity: str
    sentence: str
    action: str = ""
    runbook: str = ""

    @property
    def text(self) -> str:
        """The sentence, and what to do."""
        return f"{self.sentence}; {self.action}" if self.action else self.sentence


class StatusAnswer(msgspec.Struct, frozen=True):
    """`status` is `ok`, or why the service can't work in one word, with `reason` as a sentence. `epoch` is 0 where the
    service does not report one. `policy` is None without a policy file, `replica` where the service has one host.
    `disk_free_bytes`: for the data directory; None where the service does not report it. `conditions`: None where the
    service names none, because it is older or shows only a part of its status.
    """

    status: str = ""
    pid: int = 0
    uid: int = 0
    uptime_seconds: int = 0
    reason: str = ""
    epoch: int = 0
    keyring_id: str = ""
    root: RootStatus = msgspec.field(default_factory=RootStatus)
    keks: list[KekStatus] = []
    rotation: RotationStatus | None = None
    pruning: PruningStatus | None = None
    keys: KeysStatus = msgspec.field(default_factory=KeysStatus)
    audit: AuditStatus = msgspec.field(default_factory=AuditStatus)
    memory: MemoryStatus = msgspec.field(default_factory=MemoryStatus)
    hardening: list[MeasureStatus] = []
    http: HttpStatus = msgspec.field(default_factory=HttpStatus)
    policy: PolicyStatus | None = None
    replica: ReplicaStatus | None = None
    disk_free_bytes: int | None = None
    warnings: list[str] = []
    conditions: list[Condition] | None = None
