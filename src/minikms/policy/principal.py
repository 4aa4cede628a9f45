"""Principals: authenticated callers and their roles.

`minikms_daemon.service` gets one with every request. Invariants: a principal on whose behalf a proxy asks has no other
role than those of `minikms.policy.rules.PROXIED_ROLES`. It must never decide about a thread: that is `Scope.decide`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from minikms.api import Role, Verb
from minikms.api.errors import ForbiddenError

if TYPE_CHECKING:
    from minikms.policy.meters import Charge
    from minikms.policy.rules import Scope


class Principal(msgspec.Struct, frozen=True):
    """An authenticated caller.

    actor: its name in the audit log. scope: what it may do under a policy file; None: its roles hold in every thread,
    without limits. via: the actor of the proxy that asks on its behalf; empty if it asks itself. entered: what its
    request has taken of its limits already; None: nothing yet.
    """

    uid: int
    pid: int
    actor: str
    roles: frozenset[Role]
    scope: Scope | None = None
    via: str = ""
    entered: Charge | None = None

    def require(self, role: Role) -> None:
        """Checks that the principal has `role`. Raises ForbiddenError."""
        if role not in self.roles:
            who = f"principal {self.actor}" if self.via else f"uid {self.uid}"
            raise ForbiddenError(
                f"{who} does not have the role {role}; the operator of the key service can give it with --admin-uids, "
                "or in a grant of the policy file"
            )


def require(who: Principal, verb: Verb[Any, Any]) -> None:
    """Checks that the principal may use the verb at all. Raises ForbiddenError."""
    if who.via and not verb.proxied:
        raise ForbiddenError("a proxy can't ask for this on behalf of another; an operator of the key service can")
    for role in verb.roles:
        who.require(role)
