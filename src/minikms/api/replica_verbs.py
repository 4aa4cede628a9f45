"""The verbs of a key service on several hosts: what a replicator asks of its daemon, and what an operator asks.

Owns: their entries, requests and answers, as `minikms.api.verbs` for all others (docs/spec/replica.md). Invariants:
what passes through a replicator is wrapped or authenticated; it holds no key. It must never carry a root key.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from minikms.api.contract import (
    CODE_CONFLICT,
    CODE_INTERRUPTED,
    CODE_LAST_ROOT,
    CODE_NOT_FOUND,
    CODE_NOT_PINNED,
    CODE_NOT_TESTED,
    CODE_REPLICA_FORKED,
    CODE_REPLICA_ROLLED_BACK,
    CODE_STORAGE_UNAVAILABLE,
)
from minikms.api.verb import Base64, Request, Verb

REPLICA_FILES_MAX: Final = 4096
"""Key files of one commit, or of one request to follow."""
REPLICA_BYTES_MAX: Final = 6 * 1024 * 1024
"""Contents of one commit, or of one request to follow, before their base64. Less than BODY_BYTES_MAX allows."""
MEMBERS_MAX: Final = 9
REPLICATOR_SILENT_SECONDS: Final = 10
"""A replicator asks its daemon each second: after this time without a request it is away."""
MEMBER_SILENT_SECONDS: Final = 30
"""The last report of a member is no news after this time."""
POLL_SECONDS_MAX: Final = 1.0
"""How long the daemon waits for a change before it answers `replica_next`. Well below the lease."""
LEASE_SECONDS: Final = 10
"""A member serves no longer than this after the instant that its replicator has noted before the renewal."""

REPLICA_NUMBER_MAX: Final = 2**63 - 1
"""The largest term, change, count of seals, and time: the largest number of a column of the database."""

Mode = Literal["sealed", "following", "taking_over", "serving", "refused"]
LEASED_MODES: Final = ("taking_over", "serving")
"""The modes in which a member uses its lease."""


class ReplicaFile(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a key's file."""

    key_id: str
    content: Base64


class MemberReport(msgspec.Struct, forbid_unknown_fields=True):
    """What a member says of itself, for the other members. `policy` and `pin`: SHA-256 of the files, hexadecimal; empty
    without one. `version`: of the program. `seen_seconds`: how long ago the database got it, by the database's clock.
    """

    member_id: str
    name: str
    mode: Mode
    number: int
    term: int
    version: str
    policy: str
    pin: str
    why: str
    seen_seconds: float


class ReplicaHead(msgspec.Struct, forbid_unknown_fields=True):
    """The head as it was read in the database. `member`: who has the lease; empty if it was released. `number`: of the
    last change. `state`: authenticated by the keyring (`minikms.keys.replica`), empty before the first change.
    `keyring`: the content of its file; absent if `number` is the one that the daemon has.
    """

    keyring_id: str
    term: int
    member: str
    number: int
    seals: int
    wanted: str
    state: Base64
    keyring: Base64 | UnsetType = UNSET


class ReplicaFollowRequest(Request):
    """Without `head`: only asks for the position. Else a part of what one snapshot of the database has after change
    `after`: `files`, and `tombstones`, the records after the first `tombstones_after`. `complete`: the last part.
    """

    after: int
    files: list[ReplicaFile]
    tombstones_after: int
    tombstones: Base64
    complete: bool
    head: ReplicaHead | UnsetType = UNSET
    members: list[MemberReport] | UnsetType = UNSET


ASK_POSITION: Final = ReplicaFollowRequest(after=0, files=[], tombstones_after=0, tombstones="", complete=True)


class ReplicaPosition(msgspec.Struct, frozen=True):
    """The position of a member. `number`, `term`: of the last change that it has as a whole. `tombstones`: the records
    that it has. `seals`: the least count of seals that the head should have. `ready`: it can take over. `wants`: an
    operator asked for this. `begins`: it may fill an empty database. `report`: for the other members. `members`: the
    ids of the hosts in the keyring; empty while it is sealed.
    """

    keyring_id: str
    member_id: str
    mode: Mode
    number: int
    term: int
    tombstones: int
    seals: int
    ready: bool
    wants: bool
    begins: bool
    report: MemberReport
    members: list[str] = msgspec.field(default_factory=list)


REPLICA_FOLLOW: Final = Verb(
    "replica_follow",
    "POST",
    "/replica/follow",
    ("replicate",),
    ReplicaFollowRequest,
    ReplicaPosition,
    "Give a member changes of the database, and ask how far it is. Not audited",
    (CODE_REPLICA_FORKED, CODE_REPLICA_ROLLED_BACK, CODE_CONFLICT, CODE_STORAGE_UNAVAILABLE, CODE_INTERRUPTED),
    repeatable=True,
)


class ReplicaNextRequest(Request):
    """The head is the member's, in `term`, with `number` changes and `seals`, by a commit that its standbys confirmed;
    `asked_ns` was read from CLOCK_BOOTTIME before that commit began. `wanted`: the member that is to take over.
    """

    term: int
    number: int
    seals: int
    asked_ns: int
    wanted: str | UnsetType = UNSET
    members: list[MemberReport] | UnsetType = UNSET


class ReplicaCommit(msgspec.Struct, frozen=True):
    """One transaction: the head goes from change `previous` to `number`, where its term and member are as granted.
    `keyring`: empty if it stays. `destroyed`: key ids whose files go.
    """

    previous: int
    number: int
    state: bytes
    keyring: bytes
    tombstones_after: int
    tombstones: bytes
    files: list[ReplicaFile]
    destroyed: list[str]


class ReplicaNextAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`commit`: to make before the next request; without it the lease is only renewed. `release`: the member serves no
    more, and the head is to be released. `position`: as in `replica_follow`; with a `mode` other than `serving` and
    `taking_over`, or an older `number`, the member must follow first.
    """

    position: ReplicaPosition
    commit: ReplicaCommit | None = None
    release: bool = False


REPLICA_NEXT: Final = Verb(
    "replica_next",
    "POST",
    "/replica/next",
    ("replicate",),
    ReplicaNextRequest,
    ReplicaNextAnswer,
    "Grant a member its lease until the next commit, confirm the last one, and wait for the next. Not audited",
    (CODE_REPLICA_FORKED, CODE_REPLICA_ROLLED_BACK, CODE_CONFLICT, CODE_INTERRUPTED),
    repeatable=True,
)


class ReplicaStatusAnswer(msgspec.Struct, frozen=True):
    """`enabled`: this daemon is a member. `serving`: the member that has the lease, as far as is known here.
    `lease_seconds`: left of the lease of this member. `members`: the last reports.
    """

    enabled: bool
    member_id: str = ""
    mode: Mode = "following"
    serving: str = ""
    term: int = 0
    number: int = 0
    lease_seconds: float = 0.0
    why: str = ""
    heard_seconds: float | None = None
    """Since the last request of the replicator; None before the first."""
    members: list[MemberReport] = msgspec.field(default_factory=list)


REPLICA_STATUS: Final = Verb(
    "replica_status",
    "GET",
    "/replica",
    ("monitor",),
    Request,
    ReplicaStatusAnswer,
    "Read which member serves, and what the members report",
    repeatable=True,
)


class PromoteReplicaRequest(Request):
    """`replace_database`: this member may fill an empty database, with higher numbers than it has seen."""

    replace_database: bool | UnsetType = UNSET


PROMOTE_REPLICA: Final = Verb(
    "promote_replica",
    "POST",
    "/replica/promote",
    ("rotate",),
    PromoteReplicaRequest,
    ReplicaStatusAnswer,
    "Ask that this member takes over from the one that serves",
    (CODE_CONFLICT, CODE_STORAGE_UNAVAILABLE, CODE_INTERRUPTED),
    repeatable=True,
)


class ReplicaInvitation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a new host needs to make its request. `public_key`: what it tells the members is sealed to this. `seals`:
    the count that the inviting member has obeyed, so that an earlier seal does not seal the new host.
    """

    format: str
    keyring_id: str
    member_id: str
    slot_id: str
    public_key: bytes
    seals: int


class ReplicaEvidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which keys a host has, or the database: `name` is empty then. `number`, `term`: of its last change. `keys`: the
    SHA-256 of each key's file. `destroyed`: the 16 bytes of each destroyed key, hexadecimal.
    """

    keyring_id: str
    name: str
    term: int
    number: int
    keys: dict[str, str]
    destroyed: list[str]


INVITE_REPLICA: Final = Verb(
    "invite_replica",
    "POST",
    "/replica/invite",
    ("rotate",),
    Request,
    ReplicaInvitation,
    "Make the invitation of a new host. Nothing changes",
    (CODE_CONFLICT, CODE_INTERRUPTED),
    repeatable=True,
)


class AddReplicaRequest(Request):
    """The request of a new host: the public part of its root key's slot, and the slot's authentication key, sealed to
    the key of the invitation.
    """

    keyring_id: str
    member_id: str
    name: str
    slot_id: str
    fingerprint: str
    provider: str
    commitment: Base64
    public_key: Base64
    sealed_auth: Base64


class ReplicaAnswer(msgspec.Struct, frozen=True):
    member_id: str
    name: str
    slot_id: str
    fingerprint: str


ADD_REPLICA: Final = Verb(
    "add_replica",
    "POST",
    "/members",
    ("rotate",),
    AddReplicaRequest,
    ReplicaAnswer,
    "Add a host: a slot for its root key, and keys for its audit log",
    (CODE_CONFLICT, CODE_NOT_PINNED, CODE_STORAGE_UNAVAILABLE, CODE_INTERRUPTED),
)


class MemberRequest(Request):
    member_id: str


REMOVE_REPLICA: Final = Verb(
    "remove_replica",
    "POST",
    "/members/{member_id}/remove",
    ("rotate",),
    MemberRequest,
    ReplicaAnswer,
    "Remove a host and its root key; a KEK rotation follows",
    (
        CODE_NOT_FOUND,
        CODE_CONFLICT,
        CODE_LAST_ROOT,
        CODE_NOT_TESTED,
        CODE_STORAGE_UNAVAILABLE,
        CODE_INTERRUPTED,
    ),
)

REPLICA_VERBS: Final = (
    REPLICA_FOLLOW,
    REPLICA_NEXT,
    REPLICA_STATUS,
    PROMOTE_REPLICA,
    INVITE_REPLICA,
    ADD_REPLICA,
    REMOVE_REPLICA,
)
