"""The rules of a history, on histories of a few operations, each with one thing wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.cluster.history import Operation, recoveries, too_slow, violations
from tests.cluster.mutants import MUTANTS, variant

T = "t"


def op(kind: str, begin: float, end: float, **about: Any) -> Operation:
    return Operation(kind, T, begin, end, about.pop("outcome", "ok"), **about)


def listed(begin: float, *numbers: int) -> Operation:
    return op("list", begin, begin + 0.5, listed=tuple((number, 0) for number in numbers))


ONE, TWO = op("append", 1, 2, number=1), op("append", 3, 4, number=2)
UNKNOWN = op("append", 1, 200, number=1, outcome="unknown")
MEMBER = op("add", 1, 2, member="bob")
GONE = op("remove", 5, 6, member="bob")


def only(history: list[Operation]) -> str:
    """The one violation of the history."""
    [found] = violations(history)
    return found


@pytest.mark.parametrize(
    "history",
    [
        [ONE, TWO, listed(1.5, 1), listed(5, 1, 2)],
        [ONE, TWO, listed(1.5), listed(3.5, 1), listed(3.6, 1, 2)],
        [ONE, op("delete", 5, 7, number=1), listed(5.5), listed(6, 1), listed(8)],
        [op("append", 1, 9, number=1), op("append", 2, 9, number=2), listed(10, 2, 1)],
        [ONE, op("edit", 3, 4, number=1, version=1), op("list", 5, 6, listed=((1, 1),))],
        [MEMBER, op("read", 3, 4, member="bob"), GONE, op("read", 7, 8, member="bob", outcome="refused")],
        [MEMBER, GONE, op("write", 5.5, 7, member="bob", number=1)],
    ],
)
def test_a_history_that_can_happen_breaks_no_rule(history: list[Operation]) -> None:
    assert violations(history) == []


def test_an_acknowledged_message_that_is_not_listed_is_lost() -> None:
    assert only([ONE, TWO, listed(5, 2)]) == "t: 1 was acknowledged at 2.00 and is not listed at 5.00"


def test_a_message_that_a_reader_saw_stays() -> None:
    unanswered = op("append", 1, 9, number=1)
    assert "seen at 2.50 and is not listed" in only([unanswered, listed(2, 1), listed(3), listed(9, 1)])


def test_an_acknowledged_message_is_lost_even_if_it_was_seen_before() -> None:
    assert "acknowledged at 4.00" in only([op("append", 1, 4, number=1), listed(2, 1), listed(5)])


def test_a_message_is_listed_once_and_was_written_by_somebody() -> None:
    assert only([ONE, listed(5, 1, 1)]) == "t: 1 is listed 2 times at 5.00"
    assert "before anybody wrote it" in only([listed(5, 7)])


def test_a_deleted_message_stays_deleted() -> None:
    assert only([ONE, op("delete", 3, 4, number=1), listed(5, 1)]) == "t: 1 was deleted at 4.00 and is listed at 5.00"


def test_lists_have_one_order() -> None:
    both = [op("append", 1, 9, number=1), op("append", 1, 9, number=2)]
    assert any("different orders" in one for one in violations([*both, listed(2, 1, 2), listed(3, 2, 1)]))


def test_a_message_follows_those_that_were_acknowledged_before_it() -> None:
    assert "after a message that was begun later" in only([ONE, TWO, listed(5, 2, 1)])


def test_a_new_message_follows_what_a_reader_has_seen() -> None:
    late = op("append", 1, 9, number=2)
    assert "before what a reader saw at 3.00" in only([ONE, late, listed(3, 1), listed(5, 2, 1)])


def test_a_body_is_the_last_acknowledged_one_or_a_later_one() -> None:
    edits = [op("edit", 3, 4, number=1, version=1), op("edit", 5, 6, number=1, version=2)]
    old = op("list", 7, 8, listed=((1, 1),))
    assert "the body 1, after 2 was acknowledged" in only([ONE, *edits, old])
    unsure = [edits[0]._replace(sure=False), edits[1]]
    assert violations([ONE, *unsure, old]) == []
    assert "the body 3, before anybody wrote it" in only([ONE, *edits, op("list", 7, 8, listed=((1, 3),))])


@pytest.mark.parametrize("kind", ["read", "write"])
def test_a_removed_member_does_nothing(kind: str) -> None:
    assert f"may {kind} at 7.00" in only([MEMBER, GONE, op(kind, 7, 8, member="bob", number=1)])
    assert violations([MEMBER._replace(sure=False), GONE, op(kind, 7, 8, member="bob", number=1)]) == []


def test_an_added_member_is_not_refused() -> None:
    assert "may not read at 3.00" in only([MEMBER, op("read", 3, 4, member="bob", outcome="refused")])


def test_nothing_refuses_a_backend_and_each_operation_ends() -> None:
    assert only([ONE._replace(outcome="refused", note="404")]) == "t: append of 1 was refused: 404"
    assert only([UNKNOWN]) == "t: append of 1 was unknown: "


def test_nothing_is_written_after_an_upgrade_of_the_tables() -> None:
    upgrade = Operation("upgrade", "", 1, 2, "ok")
    assert violations([upgrade]) == []
    assert "written after the upgrade" in only([upgrade._replace(note='["thread:t"]')])


def test_recovery_lasts_until_the_last_operation_that_met_the_fault() -> None:
    faults = [
        Operation(f"fault {name}", "", begin, begin + 10, "ok") for name, begin in (("switchover", 10), ("x", 90))
    ]
    served = [op("append", 5, 12, number=1), op("append", 30, 45, number=2), op("append", 95, 100, number=3)]
    assert recoveries([*served, *faults]) == [("switchover", 15, "append"), ("x", 5, "append")]
    assert too_slow([*served, *faults]) == []
    slow = op("append", 11, 50, number=4)
    assert too_slow([*served, slow, *faults]) == ["recovery from switchover took 39.0 s"]
    assert too_slow([UNKNOWN._replace(end=300), *faults[1:]]) == ["recovery from x took inf s"]


@pytest.mark.parametrize("name", MUTANTS)
def test_each_mutant_still_finds_the_text_that_it_changes(name: str, tmp_path: Path) -> None:
    variant(name, tmp_path / "src")
