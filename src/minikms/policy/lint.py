"""What in a valid policy file looks like a mistake.

Owns: the warnings of `minikms policy check`. It must never refuse a file, and the daemon must never ask it.
"""

from __future__ import annotations

from collections.abc import Iterator

from minikms.api import Role
from minikms.policy.patterns import PrincipalPattern
from minikms.policy.rules import NO_LIMITS, PROXIED_ROLES, THREAD_ROLES, Grant, Proxy, Rules


def warnings(rules: Rules) -> list[str]:
    """Warnings of statements in a valid file that nobody is likely to mean."""
    problems = [] if rules.grants else ["the file has no grant, so it allows nothing"]
    for number, grant in enumerate(rules.grants):
        problems += _of_grant(grant, rules)
        if all(_is_covered(grant, pattern, rules.grants[:number]) for pattern in grant.principals):
            problems.append(f"{grant.label} never decides: grants before it allow all of it, and their limits count")
    for proxy in rules.proxies:
        problems += _of_proxy(proxy, rules)
    return problems


def _of_grant(grant: Grant, rules: Rules) -> Iterator[str]:
    asked_for = {pattern.authority for proxy in rules.proxies for pattern in proxy.on_behalf_of}
    for pattern in grant.principals:
        if pattern.scheme != "uid" and pattern.authority not in asked_for:
            yield f"{grant.label}, principals: no proxy may ask on behalf of {pattern.text}, so it has no effect"
        if pattern.text in (f"{pattern.authority}**", f"{pattern.authority}*") and not pattern.is_name:
            yield f"{grant.label}, principals: {pattern.text} names everybody of {pattern.authority}"
    without = grant.roles - PROXIED_ROLES
    if without and all(pattern.scheme != "uid" for pattern in grant.principals):
        yield f"{grant.label}, roles: {', '.join(sorted(without))} has no effect, since a proxy can't pass it on"
    limits = (grant.limits, grant.limits_total)
    hourly = any(one.decrypts_per_hour or one.reencrypts_per_hour for one in limits)
    if hourly and "decrypt" not in grant.roles:
        yield f"{grant.label}: an hourly limit has no effect without the role decrypt"
    if hourly and grant.identity.startswith("grant#"):
        yield f"{grant.label} has an hourly limit and no name: a change of its principals or threads begins a new hour"
    if "decrypt" in grant.roles and grant.all_threads and not any(one.decrypts_per_hour for one in limits):
        yield f"{grant.label} lets a principal decrypt all threads without decrypts_per_hour"


def _of_proxy(proxy: Proxy, rules: Rules) -> Iterator[str]:
    granted = {pattern.authority for grant in rules.grants for pattern in grant.principals}
    for pattern in proxy.on_behalf_of:
        if pattern.authority not in granted:
            yield f"{proxy.label}, on_behalf_of: no grant names anybody that {pattern.text} matches"
    if proxy.limits_total is NO_LIMITS:
        yield f"{proxy.label} has no limits_total: a proxy that is taken over has those of all its principals together"
    elif proxy.identity.startswith("proxy#"):
        yield f"{proxy.label} has limits and no name: a change of its principals or on_behalf_of begins a new hour"


def _is_covered(grant: Grant, pattern: PrincipalPattern, before: tuple[Grant, ...]) -> bool:
    """Whether grants before this one allow all that it gives the principals of the pattern."""
    roles = grant.roles if pattern.scheme == "uid" else grant.roles & PROXIED_ROLES
    naming = [one for one in before if any(other.covers(pattern) for other in one.principals)]
    return all(any(role in one.roles and _covers_threads(one, grant, role) for one in naming) for role in roles)


def _covers_threads(one: Grant, grant: Grant, role: Role) -> bool:
    return role not in THREAD_ROLES or all(
        any(wider.covers(pattern) for wider in one.threads) for pattern in grant.threads
    )
