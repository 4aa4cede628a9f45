"""The policy file: its format, the grants and proxies that it holds, and the scope that they give a principal.

Owns: the parser of the file (docs/spec/policy.md), what a grant and a proxy are, and the decision which grant allows a
role in a thread. Invariants: what the file does not grant is denied; a member that is unknown, repeated or of another
type is refused, so that a mistyped limit is never ignored; everything is bounded by a named constant. An error names
the table and the member, and says what to write. The first grant in the order of the file that has the role and the
thread decides, also when its limits are used up. A scope never changes, so that a reload makes new ones. The thread
must be that of the key's record, never one that the request names. The parser must never read a file or a clock: it
gets bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar, get_args

from minikms.api import ROLES, Role
from minikms.api.errors import InvalidRequestError, StartError
from minikms.api.printable import clean
from minikms.policy.patterns import PrincipalPattern, ThreadPattern

VERSION: Final = 1
POLICY_BYTES_MAX: Final = 64 * 1024
PARSER_STEPS_MAX: Final = 2_000_000
"""For a key of n parts, which is in one line, the parser takes n^2 steps of 50 ns. Dots in names count too."""
GRANTS_COUNT_MAX: Final = 128
PROXIES_COUNT_MAX: Final = 16
PRINCIPAL_PATTERNS_COUNT_MAX: Final = 512
"""The patterns of principals in all grants and proxies together."""
THREAD_PATTERNS_COUNT_MAX: Final = 64
"""The patterns of threads in one grant."""

THREAD_ROLES: Final[frozenset[Role]] = frozenset(("create", "encrypt", "decrypt", "data_key", "destroy", "monitor"))
"""Roles whose verbs act on keys of threads. The others concern the service as a whole."""
PROXIED_ROLES: Final[frozenset[Role]] = frozenset(("create", "encrypt", "decrypt", "data_key", "monitor"))
"""All that a principal can have on whose behalf a proxy asks, whatever a grant says."""

LimitName = Literal["requests_per_second", "concurrent", "decrypts_per_hour", "reencrypts_per_hour"]
LIMITS_MAX: Final[dict[LimitName, int]] = {
    "requests_per_second": 1_000_000,
    "concurrent": 1_000_000,
    "decrypts_per_hour": 10**12,
    "reencrypts_per_hour": 10**12,
}
"""The largest value of each limit."""

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_GRANT: Final = ("name", "principals", "roles", "threads", "limits", "limits_total")
_PROXY: Final = ("name", "principals", "on_behalf_of", "limits_total")
_TOP: Final = ("version", "grant", "proxy")
_NAME_HEX_CHARS: Final = 32

T = TypeVar("T")


class PolicyFileError(StartError):
    """The policy file is refused. The text names the table and the member, and says what to write."""


@dataclass(frozen=True, slots=True)
class GrantLimits:
    """None: there is no such limit. `Verb.charged_as` says which verbs an hourly limit counts."""

    requests_per_second: int | None = None
    concurrent: int | None = None
    decrypts_per_hour: int | None = None
    reencrypts_per_hour: int | None = None


NO_LIMITS: Final = GrantLimits()
"""The only object of its value that a policy file makes."""


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """Some principals have some roles, in some threads. Two grants are equal only if they are the same object.

    identity: of its budgets, in any version of the file. label: how errors and reports name it. `limits` are those of
    each principal, `limits_total` those of all together.
    """

    identity: str
    label: str
    principals: tuple[PrincipalPattern, ...]
    roles: frozenset[Role]
    threads: tuple[ThreadPattern, ...]
    limits: GrantLimits
    limits_total: GrantLimits
    all_threads: bool = field(init=False)
    names: frozenset[str] = field(init=False)
    """The principals that it spells out."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "all_threads", any(pattern.is_all for pattern in self.threads))
        object.__setattr__(self, "names", frozenset(pattern.text for pattern in self.principals if pattern.is_name))

    def names_principal(self, name: str) -> bool:
        return name in self.names or any(not one.is_name and one.matches(name) for one in self.principals)

    def holds_thread(self, thread_id: str) -> bool:
        return self.all_threads or any(pattern.matches(thread_id) for pattern in self.threads)


@dataclass(frozen=True, slots=True, eq=False)
class Proxy:
    """Users that ask on behalf of principals, and have no role themselves."""

    identity: str
    label: str
    uids: frozenset[int]
    on_behalf_of: tuple[PrincipalPattern, ...]
    limits_total: GrantLimits

    def may_name(self, name: str) -> bool:
        return any(pattern.matches(name) for pattern in self.on_behalf_of)


@dataclass(frozen=True, slots=True, eq=False)
class Rules:
    """The content of a policy file. `grants` and `proxies` are in its order, which decides. `sha256`: of the file."""

    grants: tuple[Grant, ...]
    proxies: tuple[Proxy, ...]
    sha256: str

    @property
    def granted_uids(self) -> frozenset[int]:
        return frozenset(
            pattern.uid for grant in self.grants for pattern in grant.principals if pattern.uid is not None
        )

    @property
    def proxy_uids(self) -> frozenset[int]:
        return frozenset(uid for proxy in self.proxies for uid in proxy.uids)


class Scope:
    """The rights of one principal under the rules of one generation.

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
        return next((grants for role in roles if (grants := self._by_role.get(role))), self._grants)


def parse_policy(data: bytes) -> Rules:
    """The rules in the content of a policy file. Raises PolicyFileError."""
    table = _decoded(data)
    _only_known("the file", table, _TOP)
    version = table.get("version")
    if type(version) is not int or version != VERSION:
        raise PolicyFileError(f"the file needs the line: version = {VERSION}")
    grants = [
        _grant(_label("grant", number, one), one)
        for number, one in enumerate(_tables(table, "grant", GRANTS_COUNT_MAX), 1)
    ]
    proxies = [
        _proxy(_label("proxy", number, one), one)
        for number, one in enumerate(_tables(table, "proxy", PROXIES_COUNT_MAX), 1)
    ]
    rules = Rules(tuple(grants), tuple(proxies), hashlib.sha256(data).hexdigest())
    _check_whole(rules)
    return rules


def _decoded(data: bytes) -> Mapping[str, object]:
    if len(data) > POLICY_BYTES_MAX:
        raise PolicyFileError(f"the file has more than {POLICY_BYTES_MAX} bytes; merge grants with patterns")
    if sum(line.count(b".") ** 2 for line in data.split(b"\n")) > PARSER_STEPS_MAX:
        raise PolicyFileError("the file has lines with too many dots; write each list in several lines")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise PolicyFileError("the file is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise PolicyFileError(f"the file is not TOML: {clean(str(error))}") from None
    except (RecursionError, ValueError):
        # Tables in tables, dates that don't exist, and numbers of thousands of digits.
        raise PolicyFileError(
            "the file is not TOML of the form that the page `Principals and policy` describes"
        ) from None


def _tables(table: Mapping[str, object], member: str, count_max: int) -> list[Mapping[str, object]]:
    tables = table.get(member, [])
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise PolicyFileError(f"the file: begin each {member} with the line [[{member}]]")
    if len(tables) > count_max:
        raise PolicyFileError(f"the file has more than {count_max} tables [[{member}]]; merge some with patterns")
    return tables


def _label(kind: str, number: int, table: Mapping[str, object]) -> str:
    name = table.get("name")
    if name is None:
        return f"{kind} {number}"
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise PolicyFileError(f"{kind} {number}: name has 1 to 64 characters of A-Z, a-z, 0-9, '.', '_' and '-'")
    return f"{kind} {number} ({name})"


def _grant(label: str, table: Mapping[str, object]) -> Grant:
    _only_known(label, table, _GRANT)
    principals = _patterns(label, table, "principals", PrincipalPattern, PRINCIPAL_PATTERNS_COUNT_MAX)
    roles = _roles(label, table)
    threads: tuple[ThreadPattern, ...] = ()
    if roles & THREAD_ROLES:
        if "threads" not in table:
            needing = ", ".join(sorted(roles & THREAD_ROLES))
            raise PolicyFileError(
                f'{label}: threads is missing, which {needing} needs. For all threads write: threads = ["*"]'
            )
        # Without a thread, `monitor` reads the status and lists no key.
        may_be_empty = roles & THREAD_ROLES == {"monitor"}
        threads = _patterns(
            label, table, "threads", ThreadPattern, THREAD_PATTERNS_COUNT_MAX, may_be_empty=may_be_empty
        )
    elif "threads" in table:
        raise PolicyFileError(f"{label}: remove threads: its roles do not concern threads")
    return Grant(
        identity=_identity("grant", table, principals, threads),
        label=label,
        principals=principals,
        roles=roles,
        threads=threads,
        limits=_limits(label, table, "limits"),
        limits_total=_limits(label, table, "limits_total"),
    )


def _proxy(label: str, table: Mapping[str, object]) -> Proxy:
    _only_known(label, table, _PROXY)
    principals = _patterns(label, table, "principals", PrincipalPattern, PRINCIPAL_PATTERNS_COUNT_MAX)
    uids = frozenset(pattern.uid for pattern in principals if pattern.uid is not None)
    if len({pattern.text for pattern in principals}) != len(uids):
        raise PolicyFileError(f"{label}, principals: a proxy is a user of this machine; write its uid, such as uid:992")
    on_behalf_of = _patterns(label, table, "on_behalf_of", PrincipalPattern, PRINCIPAL_PATTERNS_COUNT_MAX)
    if any(pattern.scheme == "uid" for pattern in on_behalf_of):
        raise PolicyFileError(f"{label}, on_behalf_of: remove uid: patterns; nobody acts for a user of this machine")
    return Proxy(
        identity=_identity("proxy", table, principals, on_behalf_of),
        label=label,
        uids=uids,
        on_behalf_of=on_behalf_of,
        limits_total=_limits(label, table, "limits_total"),
    )


def _identity(
    kind: str,
    table: Mapping[str, object],
    principals: tuple[PrincipalPattern, ...],
    others: tuple[ThreadPattern | PrincipalPattern, ...],
) -> str:
    """The name, else a hash of what the table concerns. The order in the file does not matter."""
    name = table.get("name")
    if name is not None:
        return f"{kind}:{name}"
    content = [sorted({one.text for one in principals}), sorted({one.text for one in others})]
    digest = hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()
    return f"{kind}#{digest[:_NAME_HEX_CHARS]}"


def _roles(label: str, table: Mapping[str, object]) -> frozenset[Role]:
    roles: set[Role] = set()
    for text in _texts(label, table, "roles", len(ROLES)):
        role = next((role for role in ROLES if role == text), None)
        if role is None:
            raise PolicyFileError(f"{label}, roles: {_quoted(text)} is none; the roles are {', '.join(get_args(Role))}")
        roles.add(role)
    return frozenset(roles)


def _patterns(
    label: str,
    table: Mapping[str, object],
    member: str,
    parse: Callable[[str], T],
    count_max: int,
    *,
    may_be_empty: bool = False,
) -> tuple[T, ...]:
    patterns: list[T] = []
    for text in _texts(label, table, member, count_max, may_be_empty=may_be_empty):
        try:
            patterns.append(parse(text))
        except InvalidRequestError as error:
            raise PolicyFileError(f"{label}, {member}, {_quoted(text)}: {error}") from None
    return tuple(patterns)


def _texts(
    label: str, table: Mapping[str, object], member: str, count_max: int, *, may_be_empty: bool = False
) -> list[str]:
    texts = table.get(member)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise PolicyFileError(f'{label}: {member} is a list of texts, such as {member} = ["…"]')
    if not texts and not may_be_empty:
        raise PolicyFileError(f"{label}: {member} is empty; name at least one, or remove the table")
    if len(texts) > count_max:
        raise PolicyFileError(f"{label}: {member} has more than {count_max} entries; use patterns, or another table")
    return texts


def _limits(label: str, table: Mapping[str, object], member: str) -> GrantLimits:
    table_values = table.get(member, {})
    if not isinstance(table_values, dict):
        raise PolicyFileError(f"{label}: {member} is a table, such as {member} = {{ decrypts_per_hour = 500000 }}")
    _only_known(f"{label}, {member}", table_values, LIMITS_MAX)
    values: dict[str, int] = {}
    for name, largest in LIMITS_MAX.items():
        value = table_values.get(name)
        if value is None:
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise PolicyFileError(f"{label}, {member}: {name} is a whole number from 1 to {largest}")
        values[name] = value
    return GrantLimits(**values) if values else NO_LIMITS


def _only_known(place: str, table: Mapping[str, object], known: Collection[str]) -> None:
    for member in table:
        if member not in known:
            raise PolicyFileError(f"{place}: there is no member {_quoted(member)}; write one of {', '.join(known)}")


def _check_whole(rules: Rules) -> None:
    """What no table shows by itself."""
    count = sum(len(grant.principals) for grant in rules.grants)
    count += sum(len(proxy.uids) + len(proxy.on_behalf_of) for proxy in rules.proxies)
    if count > PRINCIPAL_PATTERNS_COUNT_MAX:
        raise PolicyFileError(
            f"the file has more than {PRINCIPAL_PATTERNS_COUNT_MAX} principals and patterns of principals in all; use "
            "patterns"
        )
    for uid in sorted(rules.granted_uids & rules.proxy_uids):
        raise PolicyFileError(
            f"uid:{uid} is a proxy and is named in a grant. A proxy has no role of its own: remove it from one of them"
        )
    seen: dict[str, str] = {}
    tables: tuple[Grant | Proxy, ...] = (*rules.grants, *rules.proxies)
    for one in tables:
        if one.identity in seen:
            raise PolicyFileError(
                f"{one.label} has the budgets of {seen[one.identity]}: both have the same name, or both have no name "
                "and concern the same. Give each a name of its own"
            )
        seen[one.identity] = one.label


def _quoted(text: str) -> str:
    return f'"{clean(text[:80])}"'
