"""Who may do what: from a peer's uid to a principal and its roles.

Owns: which roles an allowed uid has, and the check of a role. `minikms.api` says which roles a verb needs. Invariants:
a uid that is not allowed has no principal; the kernel's overflow uid is never allowed. The policy must never read a
request to decide who is asking.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple, get_args

from minikms.api import Role
from minikms.errors import ForbiddenError, StartError

ROLES: Final[frozenset[Role]] = frozenset(get_args(Role))
ADMIN_ONLY: Final[frozenset[Role]] = frozenset(("rotate", "destroy", "audit"))
"""With `--admin-uids`, only those uids have these roles."""

UIDS_COUNT_MAX: Final = 64


class Principal(NamedTuple):
    """An authenticated caller. `actor` is its name in the audit log."""

    uid: int
    pid: int
    actor: str
    roles: frozenset[Role]

    def require(self, role: Role) -> None:
        """Raises ForbiddenError unless the principal has `role`."""
        if role not in self.roles:
            raise ForbiddenError(f"this uid does not have the role {role}; ask whoever runs the key service")


class Policy:
    """The allowed uids. Without `admin_uids` each has every role; with them, only those rotate, destroy and audit."""

    def __init__(
        self, allowed_uids: Iterable[int], admin_uids: Iterable[int] = (), *, overflow_uid: int | None = None
    ) -> None:
        admins = frozenset(admin_uids)
        self.allowed = frozenset(allowed_uids) | admins
        if overflow_uid is not None and overflow_uid in self.allowed:
            raise StartError(
                f"uid {overflow_uid} is the kernel's overflow uid and can't be allowed: every user of another user "
                "namespace appears under it"
            )
        others = ROLES - ADMIN_ONLY if admins else ROLES
        self._roles: dict[int, frozenset[Role]] = {uid: ROLES if uid in admins else others for uid in self.allowed}

    def principal(self, uid: int, pid: int) -> Principal | None:
        """None for a uid that is not allowed."""
        roles = self._roles.get(uid)
        return None if roles is None else Principal(uid, pid, actor(uid), roles)


def actor(uid: int) -> str:
    """The name of a uid in the audit log."""
    return f"peer_uid:{uid}"


def parse_uids(text: str, *, source: str) -> frozenset[int]:
    """Comma-separated uids. Raises StartError for anything else; its text names `source`."""
    uids: set[int] = set()
    for part in text.split(","):
        digits = part.strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
            raise StartError(f"{source} must be user ids separated by commas, such as 1000,1001")
        uids.add(int(digits))
    if len(uids) > UIDS_COUNT_MAX:
        raise StartError(f"{source} names more than {UIDS_COUNT_MAX} users; name fewer")
    return frozenset(uids)
