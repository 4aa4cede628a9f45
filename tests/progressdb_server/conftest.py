"""Runs the tests that ask for `both_engines` on the engine in memory and on PostgreSQL."""

from collections.abc import Iterator

import pytest

from tests.harness import postgres
from tests.harness.postgres import url_of
from tests.progressdb_server.store import opened_store


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """The URL of a PostgreSQL of this session."""
    with postgres.running() as (settings, _):
        yield url_of(settings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "both_engines" in metafunc.fixturenames:
        one = metafunc.definition.get_closest_marker("one_engine") is not None
        metafunc.parametrize("both_engines", ["memory"] if one else ["memory", "postgresql"], indirect=True)


@pytest.fixture
def both_engines(request: pytest.FixtureRequest) -> Iterator[None]:
    """What `opened` opens where a test names no engine."""
    if request.param == "memory":
        yield
        return
    opened_store.database.append(request.getfixturevalue("database"))
    try:
        yield
    finally:
        opened_store.database.clear()
        while opened_store.closing:
            opened_store.closing.pop()()
