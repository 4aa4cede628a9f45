"""Authorisation without a policy file: from a peer's uid to a principal with its roles.

Owns: which uids may connect, and the roles of each. `minikms.api` says which roles a verb needs. Invariants: a uid that
is not allowed has no principal; the kernel's overflow uid is never allowed. It must never read a request to decide who
is asking.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from minikms.api import ROLES, Role, Verb
from minikms.api.errors import ForbiddenError, StartError, UnauthorizedError
from minikms.policy.principal import Principal, require

if TYPE_CHECKING:
    from minikms.policy.rules import Rules

ADMIN_ONLY: Final[frozenset[Role]] = frozenset(("rotate", "destroy", "audit", "unseal"))
"""With `--admin-uids`, only those uids have these roles."""
FILE_ONLY: Final[frozenset[Role]] = frozenset(("ship", "replicate"))
"""Only a policy file grants these roles."""

UIDS_COUNT_MAX: Final = 64


class Policy:
    """The allowed uids, without a policy file. Without `admin_uids` each has every role but those of `FILE_ONLY`; with
    them, only those rotate, destroy, audit and unseal.

    generation: rises with every change of the rules. rules: the content of the policy file.
    """

    generation: int = 0
    rules: Rules | None = None

    def __init__(
        self, allowed_uids: Iterable[int], admin_uids: Iterable[int] = (), *, overflow_uid: int | None = None
    ) -> None:
        admins = frozenset(admin_uids)
        self.allowed = frozenset(allowed_uids) | admins
        if overflow_uid is not None and overflow_uid in self.allowed:
            raise StartError(overflow_text(overflow_uid))
        every = ROLES - FILE_ONLY
        others = every - ADMIN_ONLY if admins else every
        self._roles: dict[int, frozenset[Role]] = {uid: every if uid in admins else others for uid in self.allowed}

    def is_proxy(self, uid: int) -> bool:
        """Whether the uid asks on behalf of others."""
        return False

    def principal(self, uid: int, pid: int, on_behalf_of: str | None = None) -> Principal | None:
        """None for a uid that is not allowed. Raises ForbiddenError for one that names another principal."""
        roles = self._roles.get(uid)
        if roles is None:
            return None
        if on_behalf_of is not None:
            raise ForbiddenError("this key service has no policy file, so nobody may ask on behalf of a principal")
        return Principal(uid, pid, actor(uid), roles)


def renewed(who: Principal, policy: Policy, verb: Verb[Any, Any]) -> Principal:
    """The principal under the policy in force, after a wait. Raises UnauthorizedError, ForbiddenError."""
    if who.scope is None or who.scope.generation == policy.generation:
        return who
    now = policy.principal(who.uid, who.pid, who.actor if who.via else None)
    if now is None:
        raise UnauthorizedError(f"the policy has changed: uid {who.uid} may no longer use the key service")
    require(now, verb)
    return now


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


def overflow_text(uid: int | None) -> str:
    """The refusal of a configuration that allows the overflow uid."""
    return (
        f"uid {uid} is the kernel's overflow uid and can't be allowed: every user of another user namespace appears "
        "under it"
    )
