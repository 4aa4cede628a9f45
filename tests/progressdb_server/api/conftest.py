"""What tests of the API share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.progressdb_server.api.real_server import RealServer, real_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """One server for the tests of a module. Some modules have another one in its place."""
    with real_server(tmp_path_factory.mktemp("server")) as started:
        yield started
