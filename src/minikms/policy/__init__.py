"""Authorisation: principals, their roles and scopes, the policy file, and limits.

Owns: the names of principals, the patterns and the format of a policy file, the decision which grant allows a request,
and how much of each limit is used. docs/spec/policy.md is the specification. Rules of the room:
1. Default deny: what no grant allows is refused, and so is a file that can't be read as a whole.
2. The caller is known from the credentials of its connection, and from the name that a proxy sends. Nothing else that a
   client sends says who is asking.
3. A decision is a function of the principal, the role and the thread of the key's record. It needs no disk.
4. A crash gives back nothing of an hourly limit.

Modules, each importing only earlier ones: `principal`, `policy` (who connects); and for a policy file, which a daemon
loads only if it has one, `names`, `patterns`, `rules` (the file), `file_policy` (who connects), `meters` (limits),
`explanation`, `lint`. The room must never audit, and never hold a key.
"""
