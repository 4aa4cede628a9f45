"""The three ways to break the replica protocol that the model must notice, made in the program: each fails a test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.tidy.project_tree import PROJECT

TESTS_SECONDS_MAX = 120


class Mutant(NamedTuple):
    """`good`: text of a file, once or more, which becomes `bad`. `test`: a file of tests of the default run."""

    file: str
    good: str
    bad: str
    test: str


MUTANTS = {
    "the lease counts from the answer": Mutant(
        "minikms_replicator/tables.py", "_make((*row, asked_ns))", "_make((*row, now_ns))",
        "minikms_replicator/test_loops.py",
    ),
    "a commit does not ask for its term and member": Mutant(
        "minikms_replicator/tables.py",
        "term = $1 AND member = $2 AND number", "$1::bigint > 0 AND $2::text <> '' AND number",
        "minikms_replicator/test_tables.py",
    ),
    "a follower confirms what it has not verified": Mutant(
        "minikms/custody/following.py", "if entries != state.entries:", "if False:", "minikms/custody/test_following.py"
    ),
}  # fmt: skip


@pytest.mark.torture
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_protocol_fails_the_default_run(name: str, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    file = Path(shutil.copytree(PROJECT / "src", tmp_path / "src")) / mutant.file
    assert mutant.good in file.read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{mutant.test}"]
    for text, status in ((file.read_text(), 0), (file.read_text().replace(mutant.good, mutant.bad), 1)):
        file.write_text(text)
        environ = os.environ | {"PYTHONPATH": str(tmp_path / "src")}
        ended = subprocess.run(
            command, check=False, cwd=PROJECT, env=environ, capture_output=True, text=True, timeout=TESTS_SECONDS_MAX
        )
        assert ended.returncode == status, ended.stdout
