"""The HTTP engine survives its fuzzer: a slice in every run, more than a minute in `make torture`."""

import random
from collections.abc import Callable

import pytest

from tests.torture import fuzz_http


@pytest.mark.parametrize("campaign", fuzz_http.CAMPAIGNS, ids=lambda campaign: campaign.__name__)
def test_mutated_requests_for_a_moment(campaign: Callable[[float, int], int]) -> None:
    """The same cases in every run, so that a failure can be had again."""
    assert campaign(1.5, 1) > 0


@pytest.mark.torture
@pytest.mark.parametrize("campaign", fuzz_http.CAMPAIGNS, ids=lambda campaign: campaign.__name__)
def test_mutated_requests_for_long(campaign: Callable[[float, int], int]) -> None:
    """Other cases in every run; a failure names its seed."""
    assert campaign(45.0, random.randrange(2**32)) > 1000
