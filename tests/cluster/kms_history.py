"""What was asked of a key service on several hosts and what it answered, and the rules that this obeys.

Owns: the record of a call, and `violations`, a pure function over a history. A call asks one member once. Times are
seconds of CLOCK_BOOTTIME of the machine on which all clients run. A member answers at an instant between begin and end
of the call, so that only calls which do not overlap say anything about each other.
"""

import bisect
import collections
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

OK: Final = "ok"
AWAY: Final = "away"
"""No answer, or one that says nothing about a key: `standby`, `sealed`, a change whose outcome is not known."""
WRONG: Final = "wrong"
"""Another plaintext than the encrypted one."""
FAULT: Final = "fault "
"""The kind of a fault begins so; its name follows."""
BACK_S_MIN: Final = 4.0
"""A member that another one has replaced serves later than this again. Without a release it is a whole lease; clients
promote less often."""
SEALED_S_MAX: Final = 5.0
"""After an acknowledged seal, until the other members have sealed themselves."""
MAKES: Final = ("create", "add_root")
OPENS: Final = ("decrypt", "test_root")
ENDS: Final = ("destroy", "remove_root")
USES: Final = (*MAKES, *OPENS, *ENDS, "encrypt", "retire", "rotate")
"""What only the member that serves answers, other than with AWAY."""


class Call(NamedTuple):
    """`outcome`: OK, AWAY, WRONG, or the code of a refusal. `key`: of a key, or the slot of a root key."""

    kind: str
    """One of USES, or: kek, a read of the version; seal, unseal, faults: of an operator; serves: of an audit log."""
    member: str
    """Whose socket was asked."""
    begin: float
    end: float
    outcome: str = OK
    key: str = ""
    version: int = 0
    """Of the KEK; of `serves`, the term."""


def violations(history: Sequence[Call]) -> list[str]:
    """A sentence for each rule that the history breaks somewhere."""
    return list(dict.fromkeys(sentence for rule in _RULES for sentence in rule(history)))


def _answers(history: Sequence[Call]) -> Iterator[Call]:
    return (one for one in history if one.kind in USES and one.outcome != AWAY)


def _alone(history: Sequence[Call]) -> Iterator[str]:
    """No member answers between two answers of another one, unless these are far apart."""
    by_member: dict[str, list[Call]] = collections.defaultdict(list)
    for one in _answers(history):
        by_member[one.member].append(one)
    ends = {member: sorted(one.end for one in calls) for member, calls in by_member.items()}
    begins = {member: sorted(one.begin for one in calls) for member, calls in by_member.items()}
    for member, calls in by_member.items():
        for other in by_member.keys() - {member}:
            for one in calls:
                before = bisect.bisect_left(ends[other], one.begin) - 1
                after = bisect.bisect_right(begins[other], one.end)
                if before < 0 or after == len(begins[other]):
                    continue
                if begins[other][after] - ends[other][before] < BACK_S_MIN:
                    between = f"{ends[other][before]:.3f} and {begins[other][after]:.3f}"
                    yield f"{member} answered at {one.begin:.3f}, and {other} at {between}"
                    break


def _terms(history: Sequence[Call]) -> Iterator[str]:
    """A term has one member."""
    served: dict[int, str] = {}
    for one in history:
        if one.kind == "serves" and served.setdefault(one.version, one.member) != one.member:
            yield f"{one.member} and {served[one.version]} served in term {one.version}"


def _gone(history: Sequence[Call], ends: Sequence[str], code: str) -> Mapping[str, float]:
    """When it was known of each key: it was answered by what ends its use, or as the refusal of a use."""
    found: dict[str, float] = {}
    for one in history:
        if (one.kind in ends and one.outcome == OK) or (one.outcome == code and one.kind in USES):
            found[one.key] = min(one.end, found.get(one.key, one.end))
    return found


def _ended(history: Sequence[Call]) -> Iterator[str]:
    """A key is used no more once a destruction was answered, and encrypts no more once a retirement was."""
    destroyed = _gone(history, ENDS, "key_destroyed")
    retired = _gone(history, ("retire",), "key_retired")
    for one in history:
        if one.outcome != OK:
            continue
        if one.kind in (*OPENS, "encrypt") and destroyed.get(one.key, one.end) < one.begin:
            yield f"{one.key} was destroyed at {destroyed[one.key]:.3f}: {_of(one)}"
        if one.kind == "encrypt" and retired.get(one.key, one.end) < one.begin:
            yield f"{one.key} was retired at {retired[one.key]:.3f}: {_of(one)}"


def _kept(history: Sequence[Call]) -> Iterator[str]:
    """What was made and acknowledged opens, unless somebody began to destroy it; and it encrypts, unless somebody
    began to retire it."""
    made = {one.key: one.end for one in history if one.kind in MAKES and one.outcome == OK}
    closing: dict[str, float] = {}
    retiring: dict[str, float] = {}
    for one in history:
        for kinds, begun in ((ENDS, closing), ((*ENDS, "retire"), retiring)):
            if one.kind in kinds:
                begun[one.key] = min(one.begin, begun.get(one.key, one.begin))
    for one in history:
        if one.kind in (*OPENS, "encrypt") and one.outcome not in (OK, AWAY):
            begun = retiring if one.kind == "encrypt" else closing
            may_be_gone = begun.get(one.key, one.end) < one.end and one.outcome != WRONG
            if made.get(one.key, one.begin) < one.begin and not may_be_gone:
                yield f"{one.key} was acknowledged at {made[one.key]:.3f}: {_of(one)}"


def _newest(history: Sequence[Call]) -> Iterator[str]:
    """The version of the KEK never goes back."""
    versions = [one for one in history if one.version and one.outcome == OK and one.kind in ("rotate", "kek")]
    ended = collections.deque(sorted(versions, key=lambda one: one.end))
    newest: Call | None = None
    for one in sorted(versions, key=lambda one: one.begin):
        while ended and ended[0].end < one.begin:
            earlier = ended.popleft()
            newest = earlier if newest is None or earlier.version > newest.version else newest
        if newest is not None and newest.version > one.version:
            yield f"the KEK had version {newest.version} at {newest.end:.3f} and {one.version}: {_of(one)}"


def _sealed(history: Sequence[Call]) -> Iterator[str]:
    """A member answers nothing after an acknowledged seal, others some seconds later, until they are unsealed."""
    seals = [one for one in history if one.kind == "seal" and one.outcome == OK]
    unseals = [one for one in history if one.kind == "unseal"]
    answers = list(_answers(history)) if seals else []
    for seal in seals:
        for one in answers:
            since = seal.end + (0 if one.member == seal.member else SEALED_S_MAX)
            if one.begin > since and not any(
                each.member == one.member and each.end > seal.begin and each.begin < one.end for each in unseals
            ):
                yield f"{seal.member} was sealed at {seal.end:.3f}: {_of(one)}"
                break


def _of(one: Call) -> str:
    return f"{one.kind} by {one.member} at {one.begin:.3f} was {one.outcome}"


_RULES: Final = (_alone, _terms, _ended, _kept, _newest, _sealed)


# --- how long nobody answered ---------------------------------------------------------------------------------------
class Outage(NamedTuple):
    fault: str
    used_s: float
    """The longest time without an acknowledged encryption or decryption."""
    changed_s: float
    """The longest time without an acknowledged new key."""
    calls: int
    """That were acknowledged."""


def outages(history: Sequence[Call]) -> list[Outage]:
    """Of each fault, from its begin until the next one's."""
    faults = sorted((one for one in history if one.kind.startswith(FAULT)), key=lambda one: one.begin)
    last = max((one.end for one in history), default=0.0)
    found = []
    for fault, end in zip(faults, [*(one.begin for one in faults[1:]), last], strict=False):
        served = [one for one in history if one.outcome == OK and one.kind in USES and fault.begin < one.end <= end]
        used = [one.end for one in served if one.kind in ("encrypt", "decrypt")]
        changed = [one.end for one in served if one.kind == "create"]
        used_s, changed_s = (_gap([fault.begin, *sorted(ends), end]) for ends in (used, changed))
        found.append(Outage(fault.kind.removeprefix(FAULT), used_s, changed_s, len(served)))
    return found


def _gap(instants: Sequence[float]) -> float:
    return max(after - before for before, after in pairwise(instants))
