"""Logs in several files, as an original and as a copy to alter. Tests of one file override these fixtures."""

import shutil
from pathlib import Path

import pytest

from tests.minikms.audit.logmaker import make_segments


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed log in several files, not to be altered."""
    directory = tmp_path_factory.mktemp("segments") / "log"
    make_segments(directory)
    return directory


@pytest.fixture
def altered(original: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(original, tmp_path / "altered"))
