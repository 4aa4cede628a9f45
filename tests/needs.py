"""What a test needs of the machine: a program, root, a Python library.

Owns the one rule for a missing need: on a developer's machine the test skips and names what is missing; under `CI=true`
it fails, for `.ci/run` installs every need, and a test that silently never runs there protects nothing.
Call these first in a test or a fixture; never decide on a need anywhere else.
"""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

_DEBIAN_PACKAGES = {
    "gcore": "gdb",
    "gdb": "gdb",
    "go": "golang-go",
    "h2load": "nghttp2-client",
    "chromium": "chromium",
    "make": "make",
    "promtool": "prometheus",
    "setpriv": "util-linux",
    "strace": "strace",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
}
"""Where Debian keeps a program whose package has another name, or whose name is worth telling."""


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"needs {what}, which .ci/run must provide", pytrace=False)
    pytest.skip(f"needs {what}")


def program(name: str) -> str:
    """The full path of the program `name` found on PATH."""
    path = shutil.which(name)
    if path is None:
        _missing(f"the program {name} (Debian package {_DEBIAN_PACKAGES.get(name, name)})")
    return path


def root() -> None:
    """Go on only as root (effective uid 0)."""
    if os.geteuid() != 0:
        _missing("root")


def library(name: str) -> ModuleType:
    """The importable Python module `name`, imported."""
    try:
        return importlib.import_module(name)
    except ImportError:
        _missing(f"the Python library {name}")


def packages(*requirements: str) -> NoReturn:
    """Python packages for an environment of a test's own, which could not be installed."""
    _missing(f"the Python packages {' '.join(requirements)}")
