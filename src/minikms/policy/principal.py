"""Principals: authenticated callers, their roles, and the scope that a policy file gives them.

Owns: the decision which grant allows a role in a thread. `minikms.service` asks it for every request and for every item
of a batch. Invariants: a scope never changes, so that a reload makes new ones; the first grant in the order of the file
that has the role and the thread decides, also when its limits are used up. A principal on whose behalf a proxy asks has
no other role than those of `minikms.policy.rules.PROXIED_ROLES`. The thread must be that of the key's record, never one
that the request names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from minikms.api import Role
from minikms.errors import ForbiddenError
from minikms.policy.rules import PROXIED_ROLES, Grant, Proxy

if TYPE_CHECKING:  # meters are charged to principals
    from minikms.policy.meters import Charge


class Scope:
    """What one principal may do under the rules of one generation.

    name: of the principal. proxy: the one that asks on its behalf; None: it asks itself.
    """

    __slots__ = ("_by_role", "_grants", "generation", "name", "proxy", "roles")

    def __init__(self, name: str, grants: Iterable[Grant], *, proxy: Proxy | None, generation: int) -> None:
        """`grants`: those that name the principal, in the order of the file."""
        self.name = name
        self.proxy = proxy
        self.generation = generation
        self._grants: Final = tuple(grants)
        by_role: dict[Role, tuple[Grant, ...]] = {}
        for grant in self._grants:
            for role in grant.roles if proxy is None else grant.roles & PROXIED_ROLES:
                by_role[role] = (*by_role.get(role, ()), grant)
        self._by_role: Final = by_role
        self.roles: Final = frozenset(by_role)

    def __repr__(self) -> str:
        return f"<Scope {self.name} {sorted(self.roles)}>"

    def decide(self, role: Role, thread_id: str | None) -> Grant | None:
        """The grant that allows `role` in the thread; None: it is denied. No thread: the first grant with the role.

        Its limits are charged, and no other grant is asked when they are used up.
        """
        for grant in self._by_role.get(role, ()):
            if thread_id is None or grant.holds_thread(thread_id):
                return grant
        return None

    def everywhere(self, role: Role) -> Grant | None:
        """The grant that decides `role` whatever the thread is; None: that depends on the thread."""
        grants = self._by_role.get(role, ())
        return grants[0] if grants and grants[0].all_threads else None

    def anywhere(self, role: Role) -> Grant | None:
        """The first grant with `role` in all threads: it decides about a key whose thread is unknown."""
        return next((grant for grant in self._by_role.get(role, ()) if grant.all_threads), None)

    def grants_of(self, roles: Iterable[Role]) -> tuple[Grant, ...]:
        """The grants that may have to bear a request which needs these roles: those with the first of them that any
        grant has; all grants of the principal if none has one.
        """
        return next((found for role in roles if (found := self._by_role.get(role))), self._grants)

    def sees(self, thread_id: str) -> bool:
        """Whether the principal may know of the keys of the thread: GET /keys lists them."""
        return self.decide("monitor", thread_id) is not None


class Principal(NamedTuple):
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
        """Raises ForbiddenError unless the principal has `role`."""
        if role not in self.roles:
            who = "uid" if self.scope is None else "principal"
            raise ForbiddenError(f"this {who} does not have the role {role}; ask whoever runs the key service")
