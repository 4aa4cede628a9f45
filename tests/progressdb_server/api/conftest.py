"""What tests of the API share."""

from collections.abc import Iterator

import pytest

from tests.progressdb_server.api.real_server import RealServer, real_server
from tests.progressdb_server.api.tested_store import close_all_in_memory

OF_0_1 = "test_sdk"
"""A module that holds clients of 0.1 to the contract of 0.1, in which anyone who knows a thread may post into it."""


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """One server for the tests of a module. Some modules have another one in its place."""
    as_in_0_1 = request.module.__name__.rpartition(".")[2] == OF_0_1
    environment = {"PROGRESSDB_THREADS": "open"} if as_in_0_1 else {}
    with real_server(tmp_path_factory.mktemp("server"), environment=environment) as started:
        yield started


@pytest.fixture(scope="module", autouse=True)
def stores_in_memory() -> Iterator[None]:
    yield
    close_all_in_memory()
