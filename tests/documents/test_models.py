"""The model of `models`, checked by TLC: the protocol keeps its invariants, and each mutant of it violates one."""

import re
from pathlib import Path

import pytest

from tests.harness.model_checker import MODELS, TLC_S_MAX, violated

INVARIANTS = ("OneServes", "Durable", "Kept", "StaysDestroyed")
SHORT = {"LostMax": "0", "ChangesMax": "1"}


def violated_by(place: Path, **constants: str) -> str:
    """The invariant that a run with these constants has violated; empty if it went through all states."""
    config = (MODELS / "Replica.cfg").read_text()
    assert f"INVARIANTS {' '.join(INVARIANTS)}\n" in config
    for name, value in constants.items():
        config, count = re.subn(rf"^  {name} = .*", f"  {name} = {value}", config, flags=re.MULTILINE)
        assert count == 1
    (place / "Replica.cfg").write_text(config)
    return violated(place, "Replica")


def test_no_order_of_events_breaks_an_invariant_within_a_small_bound(tmp_path: Path) -> None:
    assert violated_by(tmp_path, TimeMax="3", **SHORT) == ""


def test_a_lease_from_the_time_of_the_answer_is_found(tmp_path: Path) -> None:
    assert violated_by(tmp_path, MutantAnswer="TRUE", **SHORT) == "OneServes"


@pytest.mark.torture
@pytest.mark.parametrize(
    ("constants", "invariant"),
    [
        ({"MutantTerm": "TRUE", "LostMax": "2", "TimeMax": "0", "ChangesMax": "1"}, "Durable"),
        ({"MutantUnverified": "TRUE", **SHORT}, "Kept"),
        ({"MutantWait": "TRUE", **SHORT}, "OneServes"),
        ({"StopMax": "1", **SHORT}, "OneServes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_each_other_mutant_violates_its_invariant(tmp_path: Path, constants: dict[str, str], invariant: str) -> None:
    assert violated_by(tmp_path, **constants) == invariant


@pytest.mark.torture
@pytest.mark.timeout(TLC_S_MAX + 60)
def test_no_order_of_events_breaks_an_invariant_with_two_changes(tmp_path: Path) -> None:
    assert violated_by(tmp_path, LostMax="0") == ""
