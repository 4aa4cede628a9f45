"""The rules of a history of the key service, on histories of a few calls, each with one thing wrong."""

from typing import Any

import pytest

from tests.cluster.kms_history import AWAY, BACK_S_MIN, SEALED_S_MAX, WRONG, Call, outages, violations

K = "k"


def call(kind: str, begin: float, member: str = "a", **about: Any) -> Call:
    return Call(kind, member, begin, begin + 0.5, **{"key": K, **about})


MADE, ENCRYPTED, DECRYPTED = call("create", 1), call("encrypt", 2), call("decrypt", 3)
RETIRED, DESTROYED = call("retire", 10), call("destroy", 11)
GONE = call("decrypt", 20, outcome="key_destroyed")


def only(history: list[Call]) -> str:
    """The one violation of the history."""
    [found] = violations(history)
    return found


@pytest.mark.parametrize(
    "history",
    [
        [MADE, ENCRYPTED, DECRYPTED, RETIRED, call("decrypt", 10.6), DESTROYED, GONE],
        [MADE, RETIRED, call("encrypt", 9.9), call("encrypt", 10.2, outcome="key_retired")],
        [MADE, DESTROYED, call("decrypt", 11.2), call("decrypt", 11.1, outcome="key_destroyed")],
        [MADE, DESTROYED._replace(outcome=AWAY), call("decrypt", 20), call("decrypt", 21, outcome="key_destroyed")],
        [MADE, DECRYPTED, call("decrypt", 3.4, "b"), call("decrypt", 3.8, "b")],
        [MADE, DECRYPTED, call("decrypt", 4, "b"), call("decrypt", 4.5 + BACK_S_MIN)],
        [MADE, call("decrypt", 2, "b", outcome=AWAY), DECRYPTED],
        [call("create", 1, outcome=AWAY), call("decrypt", 4, outcome="key_not_found")],
        [call("rotate", 1, version=2), call("kek", 1.4, version=1), call("kek", 2, version=2)],
        [call("seal", 1), call("unseal", 5), call("decrypt", 6), call("decrypt", 12, "b", outcome=AWAY)],
        [call("seal", 1), call("decrypt", SEALED_S_MAX, "b"), call("unseal", 9, "b"), call("decrypt", 10, "b")],
        [call("serves", 0, version=1), call("serves", 0, "b", version=2), call("serves", 0, version=3)],
    ],
)
def test_a_history_that_can_happen_breaks_no_rule(history: list[Call]) -> None:
    assert violations(history) == []


@pytest.mark.parametrize("kind", ["decrypt", "encrypt"])
def test_a_destroyed_key_is_used_no_more(kind: str) -> None:
    """Whoever answers, and also if nobody has an answer to the destruction but its effect was seen."""
    assert only([MADE, DESTROYED, call(kind, 20, "b")]) == f"k was destroyed at 11.500: {kind} by b at 20.000 was ok"
    unanswered = DESTROYED._replace(outcome=AWAY)
    assert "was destroyed at 20.500" in only([MADE, unanswered, GONE, call(kind, 21, "b")])


def test_a_retired_key_encrypts_no_more() -> None:
    assert "was retired at 10.500" in only([MADE, RETIRED, call("encrypt", 11, "b")])
    seen = call("encrypt", 12, outcome="key_retired")
    assert "was retired at 12.500" in only([MADE, RETIRED._replace(outcome=AWAY), seen, call("encrypt", 15)])


@pytest.mark.parametrize("code", ["key_not_found", "key_unreadable", "decryption_failed", "key_destroyed", WRONG])
def test_an_acknowledged_key_opens(code: str) -> None:
    assert "k was acknowledged at 1.500" in only([MADE, call("decrypt", 5, "b", outcome=code)])


def test_an_acknowledged_key_encrypts() -> None:
    assert "encrypt by b at 5.000 was key_retired" in only([MADE, call("encrypt", 5, "b", outcome="key_retired")])


def test_a_destruction_does_not_excuse_a_wrong_plaintext() -> None:
    assert "was wrong" in only([MADE, call("destroy", 2, outcome=AWAY), call("decrypt", 5, outcome=WRONG)])


def test_an_added_root_key_opens_and_a_removed_one_does_not() -> None:
    added = call("add_root", 1, key="s4")
    assert "s4 was acknowledged" in only([added, call("test_root", 5, "b", key="s4", outcome="not_found")])
    assert "s4 was destroyed" in only([added, call("remove_root", 5, key="s4"), call("test_root", 6, "b", key="s4")])


def test_two_members_do_not_answer_in_one_instant() -> None:
    """The answer of one between two of the other one. Calls that overlap prove nothing."""
    between = [MADE, call("decrypt", 2, "b"), DECRYPTED]
    assert only(between) == "b answered at 2.000, and a at 1.500 and 3.000"
    refused = [MADE, call("decrypt", 2, "b", key="other", outcome="key_not_found"), DECRYPTED]
    assert only(refused) == "b answered at 2.000, and a at 1.500 and 3.000"


def test_a_term_has_one_member() -> None:
    assert only([call("serves", 0, version=4), call("serves", 0, "b", version=4)]) == "b and a served in term 4"


def test_the_version_of_the_kek_never_goes_back() -> None:
    rotated = call("rotate", 1, version=3)
    assert "had version 3 at 1.500 and 2: kek by b" in only([rotated, call("kek", 5, "b", version=2)])
    assert "had version 3 at 5.500 and 2" in only([call("kek", 5, version=3), call("rotate", 9, version=2)])


def test_a_sealed_member_answers_nothing_until_its_unseal() -> None:
    sealed = call("seal", 1)
    assert "a was sealed at 1.500: decrypt by a at 3.000" in only([sealed, DECRYPTED])
    assert "was ok" in only([sealed, call("unseal", 2, "b"), DECRYPTED])
    assert "was key_destroyed" in only([sealed, call("unseal", 0), GONE])
    assert "decrypt by b at 8.000" in only([sealed, call("decrypt", 3, "b"), call("decrypt", 8, "b")])


@pytest.mark.parametrize(
    ("mutant", "found", "history"),
    [
        (  # it stood still between its commit and the grant, which another member took for the end of its lease
            "the lease measured from the answer",
            "a answered",
            [MADE, call("decrypt", 14, "b"), call("decrypt", 15, "a"), call("decrypt", 16, "b")],
        ),
        (  # it commits what it had begun in an earlier term, over what the next member has acknowledged
            "a commit without the condition on the term",
            "k was acknowledged",
            [call("create", 14, "b"), call("decrypt", 20), call("decrypt", 40, "c", outcome="key_not_found")],
        ),
        (
            "an answer before the commit",
            "k was acknowledged",
            [MADE, call("create", 1.6, key="k2", outcome=AWAY), call("decrypt", 20, "b", outcome="key_not_found")],
        ),
        (
            "asynchronous replication of the database",
            "k was retired",
            [MADE, call("retire", 2), call("encrypt", 30, "b")],
        ),
        (
            "a standby that does not verify what it gets",
            "k was destroyed",
            [MADE, RETIRED, DESTROYED, call("decrypt", 60, "b")],
        ),
    ],
)  # fmt: skip
def test_what_each_mutant_does_breaks_a_rule(mutant: str, found: str, history: list[Call]) -> None:
    assert found in only(history), mutant


def test_an_outage_is_the_longest_time_without_an_answer() -> None:
    faults = [Call(f"fault {name}", "", at, at + 5) for name, at in (("killed", 10), ("stopped", 60))]
    used = [call("decrypt", at) for at in (8, 10.5, 12.5, 30.5, 31.5, 61)]
    changed = [call("create", 11), call("create", 45), call("create", 59, outcome=AWAY), call("create", 64.5)]
    first, second = outages([*faults, *used, *changed])
    assert first == ("killed", 28.0, 34.0, 6)
    assert second == ("stopped", 3.5, 5.0, 2)
