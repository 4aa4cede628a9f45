"""The verbs of root keys, entries of the table in `minikms.api.verbs`: list, add, test, remove.

Invariants: those of `minikms.api.verbs`. A `repr` must never show a root key.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from minikms.api.contract import (
    CODE_CONFLICT,
    CODE_INTERNAL,
    CODE_INTERRUPTED,
    CODE_LAST_ROOT,
    CODE_NOT_FOUND,
    CODE_NOT_PINNED,
    CODE_NOT_TESTED,
    CODE_STORAGE_UNAVAILABLE,
    CODE_WRONG_SLOT,
)
from minikms.api.verb import Request, Verb

_WRITE: Final = (CODE_STORAGE_UNAVAILABLE, CODE_INTERRUPTED)


class GivenShares(Request):
    """The set of shares that gives a root key back. `digests`: of each share, in the order of their numbers, base64."""

    set_id: str
    threshold: int
    digests: list[str]


class AddRootRequest(Request):
    """`root_hex` is the root key, 64 hex characters. `provider` names where it comes from, for people."""

    provider: str
    root_hex: str
    shares: GivenShares | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"AddRootRequest(provider={self.provider!r})"


class SlotRequest(Request):
    """A request about one slot, which the path names."""

    slot_id: str


class RootTestRequest(Request):
    """`root_hex` is the root key, 64 hex characters. The path names the slot, the body does not."""

    root_hex: str
    slot_id: str | UnsetType = UNSET

    def __repr__(self) -> str:
        return f"RootTestRequest(slot_id={self.slot_id!r})"


class RootShares(msgspec.Struct, frozen=True):
    set_id: str
    threshold: int
    count: int


class RootAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A root key. Times are RFC 3339 in UTC.

    `state`: an `active` one opens the keyring. A `revoking` one was removed, and opens DEKs until the KEK rotation that
    follows has ended. `in_use`: this run of the daemon was started under it, or has written it to the key file.
    `tested_at`: when it last proved that it opens the keyring. `replaces`: the slot that is removed once this one was
    proved. `pinned`: whether the pin file names it; None without a pin file, or for another host's.
    """

    slot_id: str
    fingerprint: str
    provider: str
    state: Literal["active", "revoking"]
    in_use: bool
    created_at: str = ""
    tested_at: str = ""
    removed_at: str = ""
    replaces: str = ""
    shares: RootShares | None = None
    pinned: bool | None = None


class RootListAnswer(msgspec.Struct, frozen=True):
    roots: list[RootAnswer]


LIST_ROOTS: Final = Verb(
    "list_roots",
    "GET",
    "/roots",
    ("monitor",),
    Request,
    RootListAnswer,
    "List the root keys that open the keyring, and the removed ones whose revocation has not ended",
    repeatable=True,
)
ADD_ROOT: Final = Verb(
    "add_root",
    "POST",
    "/roots",
    ("rotate",),
    AddRootRequest,
    RootAnswer,
    "Add a root key, which opens the keyring beside the others",
    (CODE_INTERNAL, CODE_CONFLICT, CODE_NOT_PINNED, *_WRITE),
    root_field="root_hex",
)
TEST_ROOT: Final = Verb(
    "test_root",
    "POST",
    "/roots/{slot_id}/test",
    ("rotate",),
    RootTestRequest,
    RootAnswer,
    "Test whether a root key opens the keyring",
    (CODE_INTERNAL, CODE_NOT_FOUND, CODE_WRONG_SLOT, *_WRITE),
    repeatable=True,
    root_field="root_hex",
)
REMOVE_ROOT: Final = Verb(
    "remove_root",
    "POST",
    "/roots/{slot_id}/remove",
    ("rotate",),
    SlotRequest,
    RootAnswer,
    "Remove a root key: a fresh keyring key and audit key at once, and a KEK rotation that follows",
    (CODE_INTERNAL, CODE_NOT_FOUND, CODE_CONFLICT, CODE_LAST_ROOT, CODE_NOT_TESTED, *_WRITE),
)

ROOT_VERBS: Final = (LIST_ROOTS, ADD_ROOT, TEST_ROOT, REMOVE_ROOT)
