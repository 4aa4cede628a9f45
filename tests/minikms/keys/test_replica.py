"""The state of a replicated directory: its sum does not depend on an order, and no part of it can be changed."""

from __future__ import annotations

import itertools

import pytest

from minikms.api.errors import DecryptionError
from minikms.crypto import labels
from minikms.keys import replica
from minikms.keys.replica import STATE_BYTES, EntrySum, SignedState, read_state
from minikms.memory.arena import SecretArena, fill_random
from tests.minikms.keys import keyrings

FILES = (("k_a", b"one"), ("k_b", b"two"), ("k_b", b"three"))


def test_the_sum_of_the_same_files_is_the_same_in_each_order(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    terms = [replica.entry(unlocked, *file) for file in FILES]
    assert len(set(terms)) == len(terms)
    sums = set()
    for order in itertools.permutations(terms):
        total = EntrySum()
        for term in order:
            total = total.changed(added=1, new=term)
        sums.add(total)
    assert len(sums) == 1
    (total,) = sums
    gone = total.changed(added=-1, old=terms[0])
    assert gone == EntrySum().changed(added=2, new=terms[1] + terms[2]) != total


def test_another_keyring_has_other_terms(arena: SecretArena) -> None:
    one, other = keyrings.fresh(arena), keyrings.fresh(arena)
    assert replica.entry(one, *FILES[0]) != replica.entry(other, *FILES[0])


def test_a_state_is_read_back_and_no_bit_of_it_can_be_changed(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    state = SignedState(3, 2**40, unlocked.body.epoch, EntrySum(7, 2**256 - 1))
    signed = state.signed(unlocked, unlocked.body.key_version)
    assert signed[:STATE_BYTES] == b"".join(map(labels.number, (3, 2**40, unlocked.body.epoch, 7))) + b"\xff" * 32
    assert read_state(unlocked, signed) == state
    for at in range(len(signed)):
        with pytest.raises(DecryptionError):
            read_state(unlocked, signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :])
    for wrong in (b"", signed[:-1], signed + b"\0"):
        with pytest.raises(DecryptionError):
            read_state(unlocked, wrong)


def test_a_state_under_a_fresh_keyring_key_opens_with_it_alone(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    resealed = unlocked.make_resealed(fill_random, without=())
    signed = SignedState(1, 1, 2, EntrySum()).signed(unlocked, resealed.key_version)
    with pytest.raises(DecryptionError):
        read_state(unlocked, signed)
