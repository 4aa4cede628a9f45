"""Shares of addresses: which ones count as one, and who loses a place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.platform.addresses import Places, address_group


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8:0:0:ffff::2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("", "", True),
        ("no address", "another", False),
    ],
)
def test_one_ipv6_host_s_addresses_share_a_bound(one: str, other: str, same: bool) -> None:
    assert (address_group(one) == address_group(other)) is same


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=60), st.integers(1, 8))
def test_a_place_is_lost_only_to_a_group_that_has_no_more_of_them(steps: list[tuple[str, bool]], most: int) -> None:
    """Its oldest one. No place is counted twice, and none is lost before all are taken."""
    places: Places[int] = Places(most)
    held: list[tuple[str, int]] = []
    for number, (group, leaves) in enumerate(steps):
        counts = {each: sum(each == other for other, _ in held) for each, _ in held}
        lost = places.take(group, number)
        if lost is None:
            assert len(held) < most
        else:
            loser = next(each for each, holder in held if holder == lost)
            assert len(held) == most and counts[loser] == max(counts.values()) >= counts.get(group, 0)
            assert lost == min(holder for each, holder in held if each == loser)
            held.remove((loser, lost))
        held.append((group, number))
        if leaves:
            places.leave(*held.pop(0))
        places.leave("a", -1)
        assert len(places) == len(held)
