"""What a policy means for one request: the decision, its reason, and what would change it.

Owns: the texts for people about a decision. Invariant: a decision is made by
`minikms.policy.file_policy.FilePolicy.principal` and `minikms.policy.rules.Scope.decide`, as for a request; the texts
follow from it. It must never decide by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final, Literal

from minikms import api
from minikms.api import Role
from minikms.api.errors import ForbiddenError, InvalidRequestError
from minikms.policy.file_policy import FilePolicy
from minikms.policy.names import Name, parse_name
from minikms.policy.rules import PROXIED_ROLES, THREAD_ROLES, Grant, GrantLimits, Rules, Scope

CHANGES_COUNT_MAX: Final = 4


@dataclass(frozen=True)
class Explanation:
    """A decision. `code`: of the refusal; empty if it is allowed. `via`: the proxy that asks. `grant` and `proxy`: the
    tables of the file that decided. `limits`: what the request is charged to.
    """

    decision: Literal["allowed", "denied"]
    code: str
    principal: str
    role: Role
    thread: str
    via: str
    grant: str
    proxy: str
    why: str
    what_would_change: tuple[str, ...]
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Question:
    policy: FilePolicy
    name: Name
    role: Role
    thread: str | None
    via: int | None

    @property
    def where(self) -> str:
        return f" in the thread {self.thread}" if self.thread is not None else ""

    def denied(self, code: str, why: str, changes: Iterator[str], proxy: str = "") -> Explanation:
        answers = tuple(change for change, _ in zip(changes, range(CHANGES_COUNT_MAX), strict=False))
        return self._answer("denied", code, why, answers, proxy=proxy)

    def allowed(self, scope: Scope, grant: Grant, why: str, change: str) -> Explanation:
        proxy = scope.proxy
        limits = [*_limits(grant.limits, f"{grant.label}, each principal")]
        limits += _limits(grant.limits_total, f"{grant.label}, all principals")
        if proxy is not None:
            limits += _limits(proxy.limits_total, f"{proxy.label}, all principals")
        label = "" if proxy is None else proxy.label
        return self._answer("allowed", "", why, (change,), grant=grant.label, proxy=label, limits=tuple(limits))

    def _answer(
        self,
        decision: Literal["allowed", "denied"],
        code: str,
        why: str,
        changes: tuple[str, ...],
        *,
        grant: str = "",
        proxy: str = "",
        limits: tuple[str, ...] = (),
    ) -> Explanation:
        via = "" if self.via is None else f"uid:{self.via}"
        thread = self.thread or ""
        return Explanation(decision, code, self.name.text, self.role, thread, via, grant, proxy, why, changes, limits)


def explain(policy: FilePolicy, principal: str, role: Role, thread: str | None, via: str | None) -> Explanation:
    """The decision about a request of a principal, by itself or through the proxy `via`, such as uid:992.

    Without `via`, another principal than a uid asks through the first proxy in the file that may name it. Raises
    InvalidRequestError for what is no name or no thread.
    """
    name = parse_name(principal)
    if thread is not None and api.THREAD_ID_PATTERN.fullmatch(thread) is None:
        raise InvalidRequestError("a thread is 1 to 128 characters of A-Z, a-z, 0-9, '.', '_' and '-'")
    if thread is not None and role not in THREAD_ROLES:
        raise InvalidRequestError(f"the role {role} does not concern threads: leave the thread out")
    proxy_uid = None if via is None else parse_name(via).uid
    if via is not None and proxy_uid is None:
        raise InvalidRequestError("a proxy is named by its uid, such as uid:992")
    rules = policy.rules
    if proxy_uid is None and name.uid is None:
        proxy_uid = _first_proxy(policy, principal)
    question = _Question(policy, name, role, thread, proxy_uid)
    uid = name.uid if proxy_uid is None else proxy_uid
    if uid is None:
        why = f"no proxy may ask on behalf of {principal}, and only a user of this machine asks by itself"
        return question.denied(api.CODE_FORBIDDEN, why, _more_proxies(rules, name))
    try:
        who = policy.principal(uid, 0, None if proxy_uid is None else principal)
    except ForbiddenError as error:
        without_advice = str(error).partition(";")[0]
        return question.denied(api.CODE_FORBIDDEN, without_advice, _more_proxies(rules, name, uid))
    if who is None:
        return question.denied(api.CODE_UNAUTHORIZED, f"uid:{uid} may not connect", _connecting(question, uid))
    scope = who.scope or Scope(principal, (), proxy=None, generation=0)
    return _explain_role(question, scope, is_proxy=proxy_uid is None and policy.is_proxy(uid))


def _first_proxy(policy: FilePolicy, principal: str) -> int | None:
    """The first proxy that may name the principal and may connect; if none may connect, the first that may name it."""
    uids = [uid for proxy in policy.rules.proxies if proxy.may_name(principal) for uid in sorted(proxy.uids)]
    return next((uid for uid in uids if uid in policy.allowed), next(iter(uids), None))


def _explain_role(question: _Question, scope: Scope, *, is_proxy: bool) -> Explanation:
    role, name = question.role, question.name.text
    proxy = "" if scope.proxy is None else scope.proxy.label
    if is_proxy:
        why = f"{name} is a proxy, which has no role of its own: it has to name a principal"
        return question.denied(api.CODE_FORBIDDEN, why, iter(()))
    if role not in scope.roles:
        if scope.proxy is not None and role not in PROXIED_ROLES:
            why = f"nobody has the role {role} through a proxy, whatever a grant says"
            return question.denied(api.CODE_FORBIDDEN, why, iter(()), proxy)
        why = f"no grant gives {name} the role {role}"
        return question.denied(api.CODE_FORBIDDEN, why, _more_grants(question), proxy)
    grant = scope.decide(role, question.thread)
    if grant is None:
        why = f"no grant gives {name} the role {role}{question.where}"
        if role == "create":
            code, why = api.CODE_FORBIDDEN, f"{why}: a new key is forbidden, and keys look unknown"
        else:
            code, why = api.CODE_KEY_NOT_FOUND, f"{why}, so its keys look unknown (key_not_found)"
        return question.denied(code, why, _more_grants(question), proxy)
    where = question.where
    if question.thread is None and role in THREAD_ROLES:
        where = f" in the threads {', '.join(pattern.text for pattern in grant.threads) or '(none)'}"
    why = f"{grant.label} is the first that gives {name} the role {role}{where}"
    others = [one for one in question.policy.rules.grants if one is not grant]
    next_one = Scope(
        name, [one for one in others if one.names_principal(name)], proxy=scope.proxy, generation=0
    ).decide(role, question.thread)
    then = "it would be denied" if next_one is None else f"{next_one.label} would decide"
    return question.allowed(scope, grant, why, f"without {grant.label}, {then}")


def _more_proxies(rules: Rules, name: Name, uid: int | None = None) -> Iterator[str]:
    """What would let a proxy, or the one with this uid, name the principal."""
    if name.scheme == "uid":
        yield "let the user connect by itself: no proxy may name a user of this machine"
        return
    for proxy in rules.proxies:
        if (uid is None or uid in proxy.uids) and not proxy.may_name(name.text):
            yield f'add "{name.text}", or a pattern of it, to on_behalf_of of {proxy.label}'
    if uid is not None and uid not in rules.proxy_uids:
        yield f'add a table [[proxy]] with principals = ["uid:{uid}"] and on_behalf_of = ["{name.text}"]'


def _connecting(question: _Question, uid: int) -> Iterator[str]:
    """What would let the uid connect."""
    rules = question.policy.rules
    if uid in rules.granted_uids | rules.proxy_uids:
        yield f"add {uid} to ALLOWED_UIDS, which leaves it out"
    elif question.via is not None:
        yield from _more_proxies(rules, question.name, uid)
    else:
        yield from _more_grants(question)


def _more_grants(question: _Question) -> Iterator[str]:
    """What would give the principal the role in the thread, the smallest changes first."""
    name, role, thread = question.name.text, question.role, question.thread
    for grant in question.policy.rules.grants:
        named = grant.names_principal(name)
        has_role = role in grant.roles
        in_thread = thread is None or grant.holds_thread(thread)
        if named + has_role + in_thread != 2:
            continue
        if not named:
            yield f'add "{name}" to principals of {grant.label}'
        elif not has_role:
            yield f'add "{role}" to roles of {grant.label}'
        else:
            yield f'add "{thread}", or a pattern of it, to threads of {grant.label}'
    threads = f', threads = ["{thread or "*"}"]' if role in THREAD_ROLES else ""
    yield f'add a table [[grant]] with principals = ["{name}"], roles = ["{role}"]{threads}'


def _limits(limits: GrantLimits, whose: str) -> Iterator[str]:
    limit_texts = ", ".join(f"{name} = {value}" for name, value in asdict(limits).items() if value is not None)
    if limit_texts:
        yield f"{whose}: {limit_texts}"
