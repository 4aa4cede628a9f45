"""The test of timing finds a planted leak, and none where secrets are compared."""

import random
from pathlib import Path

import pytest

from tests.torture import timing
from tests.torture.timing import LEAK_T, Target


def samples(rng: random.Random, longer_ns: int) -> tuple[list[int], list[bool]]:
    """Times as a busy machine gives them: one in twenty is ten times too long, whatever its class is."""
    special = [rng.random() < 0.5 for _ in range(20_000)]
    return [
        round(rng.gauss(1000 + kind * longer_ns, 50) * (10 if rng.random() < 0.05 else 1)) for kind in special
    ], special


def test_two_classes_of_one_distribution_are_no_leak() -> None:
    assert timing.largest_t(*samples(random.Random(1), 0)).t < LEAK_T / 2


def test_a_leak_of_one_in_a_hundred_is_found_beside_slow_outliers() -> None:
    finding = timing.largest_t(*samples(random.Random(1), 10))
    assert finding.t > LEAK_T
    assert 8 < finding.difference_ns < 12


def test_equal_times_do_not_favour_a_class() -> None:
    """A clock that counts in steps gives few different times, and a bound never divides those that are equal."""
    times, special = samples(random.Random(1), 0)
    assert timing.largest_t([time // 200 for time in times], special).t < LEAK_T / 2


@pytest.mark.parametrize("target", timing.PLANTED, ids=lambda target: target.name)
def test_a_planted_leak_is_found(target: Target) -> None:
    """Their statistic is some hundreds for so few calls."""
    assert timing.measured(target, 3000, random.Random(1)).t > 2 * LEAK_T


@pytest.mark.torture
async def test_no_time_tells_a_secret_where_secrets_are_compared(tmp_path: Path) -> None:
    findings = await timing.findings(100_000, tmp_path / "d", random.randrange(2**32))
    known = {target.name for target in timing.VARIABLE}
    assert {name: found for name, found in findings.items() if found.t > LEAK_T and name not in known} == {}


@pytest.mark.torture
@pytest.mark.parametrize("target", timing.VARIABLE, ids=lambda target: target.name)
def test_a_secret_of_zeros_changes_the_time_of_a_root_key_by_little(target: Target) -> None:
    """Each reads or writes a root key or a share once, with a person or a file beside it."""
    finding = timing.measured(target, 30_000, random.Random())
    assert finding.t < LEAK_T or finding.difference_ns < finding.mean_ns / 10
