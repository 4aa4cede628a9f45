"""Who may do what: from a peer's uid to a principal and its roles.

Owns: the roles, the role of every verb, and the decision. Invariants: every verb has exactly one role, but
`reencrypt_batch`, which asks `decrypt` for the source and `encrypt` for the target; a uid that isn't allowed has no
principal at all; the kernel's overflow uid is never allowed. It must never read a request's body to decide who is
asking.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from minikms.errors import ForbiddenError, StartError

Role = Literal["create", "encrypt", "decrypt", "rotate", "destroy", "data_key", "audit", "monitor"]

ROLES: Final[frozenset[Role]] = frozenset(
    ("create", "encrypt", "decrypt", "rotate", "destroy", "data_key", "audit", "monitor")
)
ADMIN_ONLY: Final[frozenset[Role]] = frozenset(("rotate", "destroy", "audit"))
"""What `--admin-uids` keeps from the other allowed uids."""

UIDS_COUNT_MAX: Final = 64


class Principal(NamedTuple):
    """Who is asking. `actor` is how the audit log names it."""

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
                f"uid {overflow_uid} is the kernel's overflow uid: any user of another user namespace appears as it, "
                "so it can't be allowed"
            )
        others = ROLES - ADMIN_ONLY if admins else ROLES
        self._roles: dict[int, frozenset[Role]] = {uid: ROLES if uid in admins else others for uid in self.allowed}

    def principal(self, uid: int, pid: int) -> Principal | None:
        """None for a uid that isn't allowed."""
        roles = self._roles.get(uid)
        return None if roles is None else Principal(uid, pid, actor(uid), roles)


def actor(uid: int) -> str:
    return f"peer_uid:{uid}"


def parse_uids(text: str, *, source: str) -> frozenset[int]:
    """Comma-separated uids. Raises StartError naming `source` for anything else."""
    uids: set[int] = set()
    for part in text.split(","):
        digits = part.strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 10):
            raise StartError(f"{source} must be user ids separated by commas, such as 1000,1001")
        uids.add(int(digits))
    if len(uids) > UIDS_COUNT_MAX:
        raise StartError(f"{source} names more than {UIDS_COUNT_MAX} users")
    return frozenset(uids)
