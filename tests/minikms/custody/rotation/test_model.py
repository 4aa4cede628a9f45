"""Random sequences of everything, with restarts and kills, match the model."""

import os
from pathlib import Path

import pytest

from tests.minikms.custody.rotation.key_model import Run


@pytest.mark.parametrize("seed", [1, 2])
def test_a_short_random_history_of_keys_matches_the_model(tmp_path: Path, seed: int) -> None:
    Run(tmp_path, seed).go(40)


SEED = int(os.environ.get("MODEL_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
"""Another one each time; `MODEL_SEED=n` repeats a run, `MODEL_RUNS=n` makes more of them."""


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(SEED, SEED + int(os.environ.get("MODEL_RUNS", "20"))))
def test_a_long_random_history_of_keys_matches_the_model(tmp_path: Path, seed: int) -> None:
    Run(tmp_path, seed).go(150)
