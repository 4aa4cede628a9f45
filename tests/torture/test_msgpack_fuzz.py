"""Batches in MessagePack survive their fuzzer: a slice in every run, three quarters of a minute in `make torture`."""

import random

import pytest

from tests.torture.fuzz_msgpack import fuzz_batches


def test_mutated_batches_for_a_moment() -> None:
    """The same cases in every run, so that a failure can be had again."""
    assert fuzz_batches(1.5, 1) > 0


@pytest.mark.torture
def test_mutated_batches_for_long() -> None:
    """Other cases in every run; a failure names its seed."""
    assert fuzz_batches(45.0, random.randrange(2**32)) > 1000
