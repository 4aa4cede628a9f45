"""A PostgreSQL for the tests of a worker process."""

from collections.abc import Iterator

import pytest

from tests import needs
from tests.harness import postgres
from tests.harness.postgres import url_of


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    needs.library("asyncpg")
    with postgres.running() as (settings, _):
        yield url_of(settings)
