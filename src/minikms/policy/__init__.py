"""Authorisation: principals, their roles and scopes, the policy file, and limits.

Owns: the names of principals, the patterns and the format of a policy file, the decision which grant allows a request,
and how much of each limit is used. docs/spec/policy.md is the specification. Rules of the room:
1. Default deny: what no grant allows is refused, and so is a file that can't be read as a whole.
2. The caller is known from the credentials of its connection, and from the name that a proxy sends. Nothing else that a
   client sends says who is asking.
3. A decision is a function of the principal, the role and the thread of the key's record. It needs no disk.
4. A crash gives back nothing of an hourly limit.

Modules, each importing only earlier ones: `names`, `patterns`, `rules` (the file), `principal` (the decision), `policy`
(who connects), `meters` (limits), `explanation`, `lint`. Without a policy file, `Policy` alone decides, by uid. The
room must never audit, and never hold a key.
"""

from minikms.policy.meters import Charge, Cost, Meters, Taken
from minikms.policy.names import PRINCIPAL_CHARS_MAX, PrincipalNameError, parse_name
from minikms.policy.policy import ADMIN_ONLY, FILE_ONLY, UIDS_COUNT_MAX, FilePolicy, Policy, actor, parse_uids
from minikms.policy.principal import Principal
from minikms.policy.rules import (
    POLICY_BYTES_MAX,
    PROXIED_ROLES,
    ROLES,
    THREAD_ROLES,
    Grant,
    PolicyFileError,
    Proxy,
    Rules,
    Scope,
    parse_policy,
)

__all__ = [
    "ADMIN_ONLY",
    "FILE_ONLY",
    "POLICY_BYTES_MAX",
    "PRINCIPAL_CHARS_MAX",
    "PROXIED_ROLES",
    "ROLES",
    "THREAD_ROLES",
    "UIDS_COUNT_MAX",
    "Charge",
    "Cost",
    "FilePolicy",
    "Grant",
    "Meters",
    "Policy",
    "PolicyFileError",
    "Principal",
    "PrincipalNameError",
    "Proxy",
    "Rules",
    "Scope",
    "Taken",
    "actor",
    "parse_name",
    "parse_policy",
    "parse_uids",
]
