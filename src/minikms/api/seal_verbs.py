"""The verbs that seal and unseal the daemon, and the probe that says whether it serves.

Owns: their entries, requests and answers, as `minikms.api.verbs` for all others. Invariant: no answer holds a key, a
share or a digest of one. It must never make the root key a field that shows in a repr.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import UNSET, UnsetType

from minikms.api.contract import (
    CODE_AUDIT_LAGGING,
    CODE_AUDIT_UNAVAILABLE,
    CODE_CONFLICT,
    CODE_INTERRUPTED,
    CODE_NOT_SEALED,
    CODE_SEALED,
    CODE_STORAGE_UNAVAILABLE,
    CODE_TOO_MANY_ATTEMPTS,
    CODE_UNSEAL_FAILED,
    CODE_WRONG_ROOT,
    CODE_WRONG_SHARE,
)
from minikms.api.verb import Request, Verb

READY: Final = Verb(
    "ready",
    "GET",
    "/ready",
    (),
    Request,
    str,
    "Check that the daemon serves: 503 while it is sealed, can't write its audit log, or waits for its auditor. "
    "Allowed users and the daemon's own user may ask",
    (CODE_AUDIT_LAGGING, CODE_AUDIT_UNAVAILABLE, CODE_SEALED),
    repeatable=True,
)
"""Not in `VERBS`: it asks for no role, and it is not audited."""


class SealAnswer(msgspec.Struct, frozen=True):
    """`sealed` is true: no key is in the memory of the daemon, and a restart stays sealed."""

    sealed: bool
    since: str


SEAL: Final = Verb(
    "seal",
    "POST",
    "/seal",
    ("rotate",),
    Request,
    SealAnswer,
    "Zero every key at once and serve nothing until an unseal. A restart stays sealed",
    (CODE_STORAGE_UNAVAILABLE,),
    repeatable=True,
)


class SharesProgress(msgspec.Struct, frozen=True):
    """The collected shares of one set, to which the newest share belongs: their numbers, how many are needed, and when
    they are zeroed (RFC 3339).
    """

    set_id: str
    numbers: list[int]
    threshold: int
    expires_at: str


class UnsealStatusAnswer(msgspec.Struct, frozen=True):
    """`since` and `by` are empty while the daemon is not sealed. `by` is empty too where a flag of the start sealed it.

    `stays_sealed`: a restart stays sealed. `from_source`: the daemon's own source of the root key can be read.
    `failed_attempts`: since the seal.
    """

    sealed: bool
    since: str = ""
    by: str = ""
    stays_sealed: bool = False
    from_source: bool = False
    failed_attempts: int = 0
    shares: SharesProgress | None = None


UNSEAL_STATUS: Final = Verb(
    "unseal_status",
    "GET",
    "/unseal",
    ("monitor",),
    Request,
    UnsealStatusAnswer,
    "Read whether the daemon is sealed, since when, and which shares are collected",
    repeatable=True,
)


class UnsealRequest(Request):
    """Exactly one member. `root_hex` (64 hex characters) is a root key, `share` the text of one share of a root key.
    `from_source` is true: the daemon reads its own source.
    """

    root_hex: str | UnsetType = UNSET
    share: str | UnsetType = UNSET
    from_source: bool | UnsetType = UNSET

    def __repr__(self) -> str:
        return "UnsealRequest()"


UNSEAL: Final = Verb(
    "unseal",
    "POST",
    "/unseal",
    ("unseal",),
    UnsealRequest,
    UnsealStatusAnswer,
    "Give a sealed daemon the root key, or a share of it. With the last share it serves again before the answer",
    (
        CODE_WRONG_ROOT,
        CODE_WRONG_SHARE,
        CODE_TOO_MANY_ATTEMPTS,
        CODE_NOT_SEALED,
        CODE_CONFLICT,
        CODE_UNSEAL_FAILED,
        CODE_STORAGE_UNAVAILABLE,
        CODE_INTERRUPTED,
    ),
)

SEAL_VERBS: Final = (SEAL, UNSEAL_STATUS, UNSEAL)
