"""What was asked of the service and what it answered, and the rules that this obeys.

Owns: the record of an operation, and `violations`, a pure function over a history. An operation is what a client wants:
it is retried, at any server and under the same idempotency key, until a server answers for certain. A message is known
by a number that its body has. Times are seconds of one clock, the client's.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

RECOVERY_S_MAX: Final = 60.0
SWITCHOVER_S_MAX: Final = 30.0
FAULT: Final = "fault "
"""The kind of a fault begins so; its name follows."""
SWITCHOVER: Final = FAULT + "switchover"


class Operation(NamedTuple):
    kind: str
    """append, edit, delete, list, add, remove, rotate: of a backend. read, write: of a member itself. upgrade, and
    faults: of an operator."""
    thread: str
    begin: float
    end: float
    outcome: str
    """ok, refused, or unknown."""
    number: int = 0
    """Of the message."""
    version: int = 0
    """Of the body after an edit; 0 is the first one."""
    member: str = ""
    listed: tuple[tuple[int, int], ...] = ()
    """Numbers and versions, in the order of the list."""
    sure: bool = True
    """Whether no earlier attempt was left without an answer, which could take effect later."""
    note: str = ""
    """The last answer; of an upgrade, what was written after it."""


def violations(history: Sequence[Operation]) -> list[str]:
    """A sentence for each rule that the history breaks somewhere."""
    by_thread: dict[str, list[Operation]] = collections.defaultdict(list)
    for one in history:
        by_thread[one.thread].append(one)
    found = list(_refused(history))
    for one in by_thread.pop("", ()):
        if one.kind == "upgrade" and one.note:
            found.append(f"written after the upgrade of the tables: {one.note}")
    for thread, operations in by_thread.items():
        found += [f"{thread}: {sentence}" for rule in _RULES for sentence in rule(operations)]
    return list(dict.fromkeys(found))


def _refused(history: Iterable[Operation]) -> Iterator[str]:
    """Nothing refuses a backend, and each operation ends."""
    for one in history:
        if one.outcome != "ok" and one.kind not in ("read", "write"):
            yield f"{one.thread}: {one.kind} of {one.number or one.member} was {one.outcome}: {one.note}"


def _lists(operations: Iterable[Operation]) -> list[Operation]:
    return [one for one in operations if one.kind == "list" and one.outcome == "ok"]


def _appends(operations: Iterable[Operation]) -> dict[int, Operation]:
    return {one.number: one for one in operations if one.kind in ("append", "write")}


def _deletes(operations: Iterable[Operation]) -> dict[int, Operation]:
    return {one.number: one for one in operations if one.kind == "delete"}


def _kept(operations: list[Operation]) -> Iterator[str]:
    """What was acknowledged, or seen, is in each later list unless it was deleted. What was deleted is in none."""
    deletes = _deletes(operations)
    since = [(one.number, "acknowledged", one.end) for one in _appends(operations).values() if one.outcome == "ok"]
    seen: dict[int, float] = {}
    for listed in sorted(_lists(operations), key=lambda one: one.end):
        for number, _ in listed.listed:
            seen.setdefault(number, listed.end)
    since += [(number, "seen", at) for number, at in seen.items()]
    reported: set[int] = set()
    for listed in _lists(operations):
        there = {number for number, _ in listed.listed}
        for number, how, at in since:
            delete = deletes.get(number)
            if number in reported:
                continue
            if number in there:
                if delete and delete.outcome == "ok" and delete.end < listed.begin:
                    reported.add(number)
                    yield f"{number} was deleted at {delete.end:.2f} and is listed at {listed.begin:.2f}"
            elif at < listed.begin and not (delete and delete.begin < listed.end):
                reported.add(number)
                yield f"{number} was {how} at {at:.2f} and is not listed at {listed.begin:.2f}"


def _once(operations: list[Operation]) -> Iterator[str]:
    """A message is in a list once, and somebody wrote it."""
    begun = {number: one.begin for number, one in _appends(operations).items()}
    for listed in _lists(operations):
        numbers = [number for number, _ in listed.listed]
        for number, count in collections.Counter(numbers).items():
            if count > 1:
                yield f"{number} is listed {count} times at {listed.begin:.2f}"
            if begun.get(number, listed.end) >= listed.end:
                yield f"{number} is listed at {listed.begin:.2f}, before anybody wrote it"


def _ordered(operations: list[Operation]) -> Iterator[str]:
    """Lists have one order; a message that a later list adds follows all that an earlier one had; a message that was
    begun after another was acknowledged follows it."""
    appends = _appends(operations)
    lists = sorted(_lists(operations), key=lambda one: one.end)
    for listed in lists:
        latest = 0.0
        for number, _ in listed.listed:
            append = appends.get(number)
            if append is not None:
                if append.outcome == "ok" and append.end < latest:
                    yield f"{number} is listed at {listed.begin:.2f} after a message that was begun later"
                latest = max(latest, append.begin)
    for before, after in pairwise(lists):
        yield from _contradicts(before, after)
    ended = collections.deque(lists)
    last: Operation | None = None
    for listed in sorted(lists, key=lambda one: one.begin):
        while ended and ended[0].end < listed.begin:
            last = ended.popleft()
        if last is not None:
            yield from _contradicts(last, listed)


def _contradicts(before: Operation, after: Operation) -> Iterator[str]:
    first, second = [n for n, _ in before.listed], [n for n, _ in after.listed]
    both = set(first) & set(second)
    if [n for n in first if n in both] != [n for n in second if n in both]:
        yield f"the lists of {before.begin:.2f} and {after.begin:.2f} have different orders"
    if before.end < after.begin and both:
        tail = second[max(place for place, number in enumerate(second) if number in both) + 1 :]
        early = set(second) - set(first) - set(tail)
        if early:
            yield f"{min(early)} is listed at {after.begin:.2f} before what a reader saw at {before.begin:.2f}"


def _edited(operations: list[Operation]) -> Iterator[str]:
    """A list has the last body that was acknowledged, or a later one. An edit with an attempt that nobody answered
    may take effect at any time."""
    edits: dict[int, list[Operation]] = collections.defaultdict(list)
    for one in operations:
        if one.kind == "edit":
            edits[one.number].append(one)
    for listed in _lists(operations):
        for number, version in listed.listed:
            of = next((one for one in edits[number] if one.version == version), None)
            if version and (of is None or of.begin > listed.end):
                yield f"{number} has at {listed.begin:.2f} the body {version}, before anybody wrote it"
            elif of is None or (of.sure and of.outcome == "ok"):
                end = of.end if of else 0.0
                later = [one for one in edits[number] if one.begin > end and one.outcome == "ok"]
                newest = max((one.version for one in later if one.end < listed.begin), default=0)
                if newest > version:
                    yield f"{number} has at {listed.begin:.2f} the body {version}, after {newest} was acknowledged"


def _members(operations: list[Operation]) -> Iterator[str]:
    """A member reads and writes from when it was added, and does neither from when its removal was acknowledged."""
    added: dict[str, Operation] = {one.member: one for one in operations if one.kind == "add"}
    removed: dict[str, Operation] = {one.member: one for one in operations if one.kind == "remove"}
    for one in operations:
        if one.kind not in ("read", "write") or one.member not in added:
            continue
        add, remove = added[one.member], removed.get(one.member)
        if remove is None or one.end < remove.begin:
            if one.outcome == "refused" and add.outcome == "ok" and add.end < one.begin:
                yield f"{one.member} was added at {add.end:.2f} and may not {one.kind} at {one.begin:.2f}"
        elif one.outcome == "ok" and remove.outcome == "ok" and remove.end < one.begin and add.sure:
            yield f"{one.member} was removed at {remove.end:.2f} and may {one.kind} at {one.begin:.2f}"


_RULES: Final = (_kept, _once, _ordered, _edited, _members)


# --- recovery ---------------------------------------------------------------------------------------------------------
def recoveries(history: Sequence[Operation]) -> list[tuple[str, float, str]]:
    """Of each fault, until when operations that met it were delayed: seconds from its begin, and the kind of the
    slowest one. One meets the latest fault that had begun, so that faults begin when the service has recovered from
    the one before."""
    faults = sorted((one for one in history if one.kind.startswith(FAULT)), key=lambda one: one.begin)
    ends = [one.begin for one in faults[1:]] + [float("inf")]
    served = [one for one in history if one.thread]
    found = []
    for fault, end in zip(faults, ends, strict=False):
        waits = [
            (float("inf") if one.outcome == "unknown" else one.end - max(one.begin, fault.begin), one.kind)
            for one in served
            if one.end > fault.begin and one.begin < end
        ]
        found.append((fault.kind.removeprefix(FAULT), *max(waits, default=(0.0, "none"))))
    return found


def too_slow(history: Sequence[Operation]) -> list[str]:
    """A sentence for each fault after which the service was not back in time."""
    return [
        f"recovery from {name} took {seconds:.1f} s"
        for name, seconds, _ in recoveries(history)
        if seconds > (SWITCHOVER_S_MAX if FAULT + name == SWITCHOVER else RECOVERY_S_MAX)
    ]
