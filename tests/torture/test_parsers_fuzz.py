"""Each parser of the key process survives its corpus and a fuzzer, which sees branches only in `make torture`."""

import importlib.util
import random
import time

import pytest

from tests.torture import fuzz_parsers
from tests.torture.mutation import mutated


@pytest.mark.parametrize("name", fuzz_parsers.PARSERS)
def test_a_parser_refuses_or_understands_its_corpus(name: str) -> None:
    kept = fuzz_parsers.corpus()[name]
    for data in kept:
        fuzz_parsers.check(name, data)
    assert len(fuzz_parsers.smallest(name, kept)) > len(kept) // 2, "another parser's corpus, or its branches are gone"


@pytest.mark.parametrize("name", fuzz_parsers.PARSERS)
def test_a_parser_refuses_or_understands_mutated_inputs_for_a_moment(name: str) -> None:
    rng, inputs = random.Random(1), [*fuzz_parsers.PARSERS[name].seeds, *fuzz_parsers.corpus()[name]]
    end = time.monotonic() + 0.1
    while time.monotonic() < end:
        fuzz_parsers.check(name, mutated(rng, rng.choice(inputs), [b"\0", b"\xff", b'"', b"\n"], inputs))


@pytest.mark.torture
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs Atheris: pip install atheris")
@pytest.mark.parametrize("name", fuzz_parsers.PARSERS)
def test_a_parser_refuses_or_understands_what_reaches_its_branches(name: str) -> None:
    assert fuzz_parsers.fuzz(name, 30)
