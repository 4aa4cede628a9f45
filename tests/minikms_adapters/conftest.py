"""One daemon for all tests of the adapters in a process, and clients of it.

Where a framework is not installed, the tests of all of them are left out, and `test_frameworks.py` says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from minikms import Client
from tests.harness.live_daemon import LiveDaemon

FRAMEWORKS = ("agents", "alembic", "langgraph", "psycopg", "sqlalchemy")

if any(importlib.util.find_spec(name) is None for name in FRAMEWORKS):
    collect_ignore = ["langgraph", "test_openai_agents.py", "test_pages.py", "test_sqlalchemy.py"]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveDaemon]:
    with LiveDaemon(tmp_path_factory.mktemp("adapters")) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def kms(daemon: LiveDaemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client
