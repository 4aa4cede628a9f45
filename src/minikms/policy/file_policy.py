"""Authorisation under a policy file: from a peer's uid, and the principal that a proxy names, to a principal.

Owns: which uids may connect, and the scopes of principals. Invariants: those of `minikms.policy.policy`; a proxy has no
role of its own; a user of this machine is never named by a proxy. It must never read more of a request than the name
that a proxy sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from minikms.api.errors import ForbiddenError
from minikms.policy.names import parse_name
from minikms.policy.policy import Policy, actor, overflow_text
from minikms.policy.principal import Principal
from minikms.policy.rules import PolicyFileError, Proxy, Rules, Scope

SCOPES_COUNT_MAX: Final = 4096
"""Scopes that are kept of principals that proxies named; the one that was used longest ago makes room for a new one."""


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
            raise PolicyFileError(overflow_text(self._overflow_uid))
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
