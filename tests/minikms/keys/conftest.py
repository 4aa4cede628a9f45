"""What tests of keys share."""

from collections.abc import Iterator

import pytest

from minikms.memory.arena import SecretArena
from tests.minikms.keys import keyrings


@pytest.fixture
def arena() -> Iterator[SecretArena]:
    with keyrings.arena() as made:
        yield made
