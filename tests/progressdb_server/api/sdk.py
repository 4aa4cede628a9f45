"""The public Python SDK, unmodified, in an environment of its own that is made on first use and kept."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import needs

REQUIREMENTS = ("progressdb==0.1.5", "requests")
INSTALL_S_MAX = 200.0
INSTALL_TRIES = 2
"""A registry that does not answer once fails no run of the tests."""
TEST_S_MAX = 900
"""For a test that may have to install, after another worker process has installed something else."""
PATIENCE = """
request-timeout = 60.0
suppress-health-check = ["too_slow"]
"""
"""For the configuration of Schemathesis, whose own limits are those of a machine that does nothing else."""
PROJECT = Path(__file__).resolve().parents[3]


class ApiError(Exception):
    """The SDK raised its own error of this name."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


def environment(name: str = "sdk-0.1.5", requirements: tuple[str, ...] = REQUIREMENTS) -> Path:
    """The interpreter of an environment with these packages, the SDK's unless told. Skips (fails under CI) where they
    can't be installed."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "progressdb-tests"
    cache.mkdir(parents=True, exist_ok=True)
    place = cache / f"{name}-{sys.implementation.cache_tag}"
    python, stamp = place / "bin" / "python", place / "installed"
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists():
            (pip,) = (PROJECT / "tools" / "bootstrap").glob("pip-*.whl")
            made = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)]
            quiet = ["install", "--quiet", "--no-input", "--disable-pip-version-check"]
            install = [str(python), str(pip / "pip"), *quiet, *requirements]
            if not any(_runs(made) and _runs(install) for _ in range(INSTALL_TRIES)):
                needs.packages(*requirements)
            stamp.touch()
    return python


def _runs(words: list[str]) -> bool:
    """Whether this program ends well, and in time."""
    try:
        return subprocess.run(words, stdin=subprocess.DEVNULL, timeout=INSTALL_S_MAX, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class Sdk:
    """`sdk(key).create_thread(...)`: the method of that name of a `ProgressDBClient` with that key."""

    def __init__(self, url: str) -> None:
        driver = Path(__file__).with_name("sdk_driver.py")
        self._url = url
        self._process = subprocess.Popen(
            [str(environment()), str(driver)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        self._process.communicate(timeout=60)

    def __call__(self, key: str) -> Client:
        return Client(self, key)

    def call(self, key: str, method: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked = {"url": self._url, "key": key, "method": method, "args": given, "named": named}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        outcome = json.loads(self._process.stdout.readline())
        if "status" in outcome:
            raise ApiError(outcome["status"], outcome["body"])
        return outcome["result"]


class Client:
    def __init__(self, sdk: Sdk, key: str) -> None:
        self._sdk = sdk
        self._key = key

    def __getattr__(self, method: str) -> Any:
        return lambda *given, **named: self._sdk.call(self._key, method, given, named)
