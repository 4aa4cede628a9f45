"""One daemon for all tests of the adapters in a process, and clients of it.

Where a framework is not installed, its tests are left out, and `test_frameworks.py` says why.
"""

import importlib.util
from collections.abc import Iterator

import pytest

from minikms import Client
from tests.harness.live_daemon import LiveDaemon

NEEDS = {
    "test_blind_index.py": ("aiosqlite", "sqlalchemy"),
    "test_django.py": ("django",),
    "langgraph": ("langchain_core", "langgraph", "langgraph_sdk", "ormsgpack", "psycopg"),
    "test_openai_agents.py": ("agents", "openai"),
    "test_pydantic_ai.py": ("pydantic", "pydantic_ai"),
    "test_sql_guard.py": ("sqlalchemy",),
    "test_sqlalchemy.py": ("alembic", "sqlalchemy"),
}
"""What each module or directory imports that `make venv` does not install."""

collect_ignore = [name for name, needed in NEEDS.items() if any(importlib.util.find_spec(it) is None for it in needed)]


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveDaemon]:
    with LiveDaemon(tmp_path_factory.mktemp("adapters")) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def kms(daemon: LiveDaemon) -> Iterator[Client]:
    with daemon.client() as client:
        yield client
