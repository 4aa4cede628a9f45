"""The index of all keys has the same pages and counts as a plain dict."""

import io
import itertools
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms import api
from minikms.keys.dek import DekRecord, bytes_to_key_id, key_id_to_bytes
from minikms.keys.index import JUDGED_COUNT_MAX, KEY_BYTES, PURPOSES, KeyIndex, KeyPage
from tests.minikms_daemon.service.limiting import instructions

AT = "2026-11-24T15:00:00Z"


def record(
    number: int, thread: int = 0, state: str = "active", kek_version: int = 1, purpose: api.Purpose = "thread"
) -> DekRecord:
    return DekRecord(
        id=bytes_to_key_id(number.to_bytes(16, "big")),
        created_at=AT,
        wrapped=b"",
        thread_id=f"t{thread}",
        format=1,
        version=1,
        kek_version=kek_version,
        purpose=purpose,
        algorithm="XAES-256-GCM",
        state="retired" if state == "retired" else "active",
        retired_at=AT if state == "retired" else "",
    )


def all_pages(index: KeyIndex, limit: int, thread_id: str | None = None, state: str | None = None) -> list[str]:
    found: list[str] = []
    after = ""
    for _ in range(1000):
        page = index.page(after=after, limit=limit, thread_id=thread_id, state=state)
        assert len(page.key_ids) <= limit
        found += page.key_ids
        after = page.next_after
        if not after:
            return found
    raise AssertionError("the pages do not end")


def reloaded(index: KeyIndex) -> KeyIndex:
    columns = index.columns()
    file = io.BytesIO(b"".join(columns))
    assert len(file.getvalue()) == len(index) * KEY_BYTES + len(columns[-1])
    return KeyIndex.of_columns(file.read, len(index), len(columns[-1]), index.hash_key)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put new", "set kek", "remove"]),
        st.integers(0, 15),
        st.sampled_from(["active", "retired"]),
        st.integers(1, 3),
        st.sampled_from(PURPOSES),
    ),
    max_size=40,
)


@given(STEPS, st.integers(1, 5))
def test_the_index_matches_a_dict_of_the_same_records(
    steps: list[tuple[str, int, str, int, api.Purpose]], limit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minikms.keys.index.CHUNK_ROWS_MAX", 3)
        _matches_a_dict(steps, limit)


def _matches_a_dict(steps: list[tuple[str, int, str, int, api.Purpose]], limit: int) -> None:
    index, model = KeyIndex(), dict[str, DekRecord]()
    numbers = [0, *(2**124 - number for number in range(15))]  # ids with equal and with different first halves
    for step, at, state, kek_version, purpose in steps:
        number = numbers[at] if at % 2 else at
        one = record(number, thread=number % 3, state=state, kek_version=kek_version, purpose=purpose)
        if step == "remove":
            index.remove(one.id)
            model.pop(one.id, None)
        elif step == "put":
            index.put(one)
            model[one.id] = one
        elif step == "set kek":
            changed = [record(each) for each in (number, number + 1, number + 3, 0)]
            missing = index.set_kek([key_id_to_bytes(each.id) for each in changed], kek_version)
            assert missing == [key_id_to_bytes(each.id) for each in changed if each.id not in model]
            for each in changed:
                if each.id in model:
                    model[each.id] = msgspec.structs.replace(model[each.id], kek_version=kek_version)
        else:
            index.put(one, only_new=True)
            model.setdefault(one.id, one)
    index = reloaded(index)
    assert len(index) == len(model)
    assert +index.by_state == Counter(one.state for one in model.values())
    assert +index.by_kek == Counter(one.kek_version for one in model.values())
    for thread_id in (None, "t0", "t1", "t9"):
        for state_asked in (None, "active", "retired"):
            expected = sorted(
                one.id
                for one in model.values()
                if thread_id in (None, one.thread_id) and state_asked in (None, one.state)
            )
            assert all_pages(index, limit, thread_id, state_asked) == expected
    for number, asked in itertools.product(range(4), PURPOSES):
        active = {
            one.id
            for one in model.values()
            if (one.thread_id, one.purpose, one.state) == (f"t{number}", asked, "active")
        }
        assert list(index.active_of(f"t{number}", asked)) == sorted(active, reverse=True)


def test_a_filtered_page_is_bounded_and_has_a_next_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.keys.index.SCANNED_COUNT_MAX", 10)
    index = KeyIndex()
    for number in range(35):
        index.put(record(number, state="retired" if number == 34 else "active"))
    page = index.page(after="", limit=5, thread_id=None, state="retired")
    assert page.key_ids == []
    assert page.next_after == record(9).id
    assert all_pages(index, 5, None, "retired") == [record(34).id]


def test_the_keys_of_a_thread_cost_the_same_among_any_number() -> None:
    """In instructions of the interpreter: a page of a thread, and the search for its active keys."""
    index, costs = KeyIndex(), []
    for number in range(10_000):
        index.put(record(number, thread=number if number % 300 else 0, state="retired" if number > 900 else "active"))
        if number in (999, 9_999):
            more = record(900).id if number > 999 else ""
            assert asked(index) == (([record(600).id, record(900).id], more), record(900).id, [])
            costs.append(instructions(lambda: asked(index)))
    assert costs[1] < costs[0] * 1.1, "binary searches only"


def asked(index: KeyIndex) -> tuple[KeyPage, str, list[str]]:
    page = index.page(after=record(300).id, limit=2, thread_id="t0", state=None)
    return page, next(index.active_of("t0", "thread")), list(index.active_of("nobody", "thread"))


def test_a_page_continues_after_a_key_that_was_removed() -> None:
    index = KeyIndex()
    for number in range(6):
        index.put(record(number))
    page = index.page(after="", limit=3, thread_id=None, state=None)
    index.remove(page.next_after)
    rest = index.page(after=page.next_after, limit=10, thread_id=None, state=None)
    assert rest.key_ids == [record(number).id for number in (3, 4, 5)]
    assert rest.next_after == ""


def test_an_empty_index_has_one_empty_page() -> None:
    assert KeyIndex().page(after="", limit=10, thread_id=None, state=None) == ([], "")


@given(STEPS, st.integers(1, 5))
def test_the_index_knows_the_thread_of_each_key(
    steps: list[tuple[str, int, str, int, api.Purpose]], limit: int
) -> None:
    """Once it keeps them: for a look-up, and for a listing of the keys of some threads."""
    index, model = KeyIndex(), dict[str, DekRecord]()
    index.keep_threads()
    assert index.thread_near(record(0).id) == ("", False)
    for step, number, state, kek_version, purpose in steps:
        one = record(number, thread=number % 3, state=state, kek_version=kek_version, purpose=purpose)
        if step == "remove":
            index.remove(one.id)
            model.pop(one.id, None)
        else:
            index.put(one, only_new=step == "put new")
            model[one.id] = one
    index = reloaded(index) if model else index
    for number in range(16):
        thread, known = index.thread_near(record(number).id)
        assert known == (record(number).id in model)
        assert not known or thread == f"t{number % 3}"
        assert bool(thread) == bool(model), "for an unknown key, the thread of its neighbour"
    visible = sorted(one.id for one in model.values() if one.thread_id != "t1")
    found: list[str] = []
    after = ""
    while True:
        page = index.page(after=after, limit=limit, thread_id=None, state=None, visible=lambda thread: thread != "t1")
        found += page.key_ids
        after = page.next_after
        if not after:
            break
    assert found == visible


def test_a_page_compares_a_bounded_number_of_keys_with_a_policy() -> None:
    index = KeyIndex()
    index.keep_threads()
    for number in range(JUDGED_COUNT_MAX + 1):
        index.put(record(number))
    asked: list[str] = []

    def is_visible(thread_id: str) -> bool:
        asked.append(thread_id)
        return False

    page = index.page(after="", limit=10, thread_id=None, state=None, visible=is_visible)
    assert len(asked) == JUDGED_COUNT_MAX
    assert (page.key_ids, page.next_after) == ([], record(JUDGED_COUNT_MAX - 1).id)
