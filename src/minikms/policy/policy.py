"""Authorisation: from a peer's uid, and the principal that a proxy names, to a principal with its roles.

Owns: which uids may connect, the roles of a uid without a policy file, and the principals under one. `minikms.api` says
which roles a verb needs. Invariants: a uid that is not allowed has no principal; the kernel's overflow uid is never
allowed; a proxy has no role of its own; a user of this machine is never named by a proxy. Apart from the name that a
proxy sends, the policy must never read a request to decide who is asking.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from minikms.api import Role
from minikms.api.errors import ForbiddenError, StartError
from minikms.policy.names import parse_name
from minikms.policy.principal import Principal
from minikms.policy.rules import ROLES, PolicyFileError, Proxy, Rules, Scope

ADMIN_ONLY: Final[frozenset[Role]] = frozenset(("rotate", "destroy", "audit", "unseal"))
"""With `--admin-uids`, only those uids have these roles."""
FILE_ONLY: Final[frozenset[Role]] = frozenset(("ship", "replicate"))
"""Only a policy file grants these roles."""

UIDS_COUNT_MAX: Final = 64
SCOPES_COUNT_MAX: Final = 4096
"""Scopes that are kept of principals that proxies named; the one that was used longest ago makes room for a new one."""


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
            raise StartError(_overflow(overflow_uid))
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


class FilePolicy(Policy):
    """The uids and the principals of a policy file.

    allowed_uids: if given, no other uid connects, whatever the file says. service_uid: the user of the key service.
    """

    rules: Rules

    def __init__(
        self,
        rules: Rules,
        allowed_uids: Iterable[int] | None = None,
        *,
        service_uid: int | None = None,
        overflow_uid: int | None = None,
    ) -> None:
        super().__init__(())
        self._only = None if allowed_uids is None else frozenset(allowed_uids)
        self._service_uid = service_uid
        self._overflow_uid = overflow_uid
        self.replace(rules)

    def replace(self, rules: Rules) -> None:
        """From here on these rules hold. The scopes of principals that were made before have an older generation.

        Raises PolicyFileError; then nothing has changed.
        """
        if self._overflow_uid in rules.granted_uids | rules.proxy_uids:
            raise PolicyFileError(_overflow(self._overflow_uid))
        if self._service_uid in rules.proxy_uids:
            raise PolicyFileError(
                f"uid:{self._service_uid} is the user of this key service and can't be a proxy; run the proxy as a "
                "user of its own"
            )
        generation = self.generation + 1
        local: dict[int, Scope] = {}
        for uid in rules.granted_uids:
            name = f"uid:{uid}"
            grants = [grant for grant in rules.grants if grant.names_principal(name)]
            local[uid] = Scope(name, grants, proxy=None, generation=generation)
        proxies: dict[int, tuple[Proxy, ...]] = {}
        for uid in rules.proxy_uids:
            local[uid] = Scope(f"uid:{uid}", (), proxy=None, generation=generation)
            proxies[uid] = tuple(proxy for proxy in rules.proxies if uid in proxy.uids)
        self.allowed = frozenset(local) if self._only is None else self._only & frozenset(local)
        self._local, self._proxies = local, proxies
        self._proxied: dict[tuple[int, str], Scope] = {}
        self.rules, self.generation = rules, generation

    def is_proxy(self, uid: int) -> bool:
        return uid in self._proxies

    def principal(self, uid: int, pid: int, on_behalf_of: str | None = None) -> Principal | None:
        """The principal that asks. A proxy that names nobody has no role.

        None: the uid may not connect. Raises PrincipalNameError, and ForbiddenError where the uid may not ask on behalf
        of this principal; their texts do not quote the name.
        """
        if uid not in self.allowed:
            return None
        proxies = self._proxies.get(uid)
        if on_behalf_of is None:
            scope = self._local[uid]
            return Principal(uid, pid, actor(uid), scope.roles, scope)
        if proxies is None:
            raise ForbiddenError("this uid is no proxy, so it may not ask on behalf of a principal")
        known = self._proxied
        if (uid, on_behalf_of) in known:
            scope = known.pop((uid, on_behalf_of))
        else:
            scope = self._scope(uid, proxies, on_behalf_of)
        known[uid, on_behalf_of] = scope  # the last one is the one that was used last
        return Principal(uid, pid, on_behalf_of, scope.roles, scope, actor(uid))

    def _scope(self, uid: int, proxies: tuple[Proxy, ...], text: str) -> Scope:
        """The scope of a principal that a proxy names. The first proxy table that allows it bears its limits."""
        name = parse_name(text)
        proxy = next((proxy for proxy in proxies if proxy.may_name(text)), None)
        if name.scheme == "uid" or proxy is None:
            raise ForbiddenError("this proxy may not ask on behalf of this principal; see on_behalf_of in the policy")
        grants = [grant for grant in self.rules.grants if grant.names_principal(text)]
        scope = Scope(text, grants, proxy=proxy, generation=self.generation)
        if len(self._proxied) >= SCOPES_COUNT_MAX:
            del self._proxied[next(iter(self._proxied))]
        return scope


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


def _overflow(uid: int | None) -> str:
    return (
        f"uid {uid} is the kernel's overflow uid and can't be allowed: every user of another user namespace appears "
        "under it"
    )
