"""The frameworks' own tests, with encrypted savers and sessions in the place of theirs (`upstream_plugin.py`).

Fetches the source distributions of the installed versions, which have the tests, through pip.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import needs
from tests.harness.live_daemon import LiveDaemon

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]

PLUGINS = ("pytest-asyncio", "pytest-mock", "redis", "syrupy")
PIP_S_MAX = 300.0
RUN_S_MAX = 1200.0
SESSIONS = ("memory/test_session.py", "memory/test_session_limit.py", "test_soft_cancel.py", "test_max_turns.py")
SAVERS = (
    "test_time_travel.py",
    "test_time_travel_async.py",
    "test_subgraph_persistence.py",
    "test_subgraph_persistence_async.py",
    "test_delta_channel_parallel_order.py",
    "test_delta_channel_migration.py",
    "test_delta_channel_exit_mode.py",
    "test_delta_channel_fork.py",
)
NEEDS_BLOCKING_CLIENT = {
    "test_delta_channel_parallel_order.py::test_sync_get_state_on_async_saver_matches_live_order[sqlite_aio]"
}
"""It calls a blocking method of an asynchronous saver, whose key service has an `AsyncClient` here."""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--no-input", "--disable-pip-version-check"]
    if subprocess.run(command, capture_output=True, timeout=PIP_S_MAX, check=False).returncode:
        pytest.skip("needs a package index")


def upstream(directory: Path, distribution: str, *arguments: str) -> tuple[set[str], int]:
    """Runs tests of the installed version of `distribution`. The names of those that failed, and how many passed.

    One after the other: they name their threads alike, and some destroy the key of a thread.
    """
    for name in ("agents", "langgraph"):
        needs.library(name)
    version = importlib.metadata.version(distribution)
    pip("install", "--no-deps", "--target", str(directory / "plugins"), *PLUGINS)
    pip("download", "--no-deps", "--no-binary", distribution, "-d", str(directory), f"{distribution}=={version}")
    [archive] = directory.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(directory, filter="data")
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "upstream_plugin"]
    path = os.pathsep.join((str(directory / "plugins"), str(Path(__file__).parent)))
    with LiveDaemon(directory) as daemon:
        environment = os.environ | {"PYTHONPATH": path, "UPSTREAM_KMS": str(daemon.socket), "NO_DOCKER": "true"}
        ran = subprocess.run(
            [*command, *arguments],
            cwd=str(archive).removesuffix(".tar.gz"),
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=RUN_S_MAX,
            check=False,
        )
        assert list(daemon.data_dir.glob("kms-deks/*.json")), "no record was encrypted"
    print(ran.stdout[-2000:])
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None
    assert " error" not in ran.stdout.splitlines()[-1]
    return set(re.findall(r"^FAILED tests/(\S+)", ran.stdout, re.MULTILINE)), int(passed[1])


def test_sessions_pass_the_tests_of_the_agents_sdk(tmp_path: Path) -> None:
    """Left out are those about private attributes of the SDK's session."""
    failed, passed = upstream(tmp_path, "openai-agents", *(f"tests/{name}" for name in SESSIONS))
    assert failed == set()
    assert passed > 50


def test_savers_pass_the_tests_of_langgraph(tmp_path: Path) -> None:
    """Those about histories, forks, subgraphs and delta channels, with SQLite."""
    chosen = ("-o", "addopts=", "-k", "sqlite and not aes", *(f"tests/{name}" for name in SAVERS))
    failed, passed = upstream(tmp_path, "langgraph", *chosen)
    assert failed == NEEDS_BLOCKING_CLIENT
    assert passed > 250
