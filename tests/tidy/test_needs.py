"""The rule for a missing need, and the report of what was skipped."""

import ast
import os
import resource
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import needs
from tests.minikms_adapters.conftest import NEEDS
from tests.tidy.project_tree import PROJECT, name, none, python_files, tree_of

NO_PROGRAM = "no-such-program"
ADAPTERS = PROJECT / "tests" / "minikms_adapters"
ELSEWHERE = ("tests/progressdb_server/api/sdk_driver.py", "tests/torture/upstream_plugin.py")
"""They run in environments of their own, whose packages the tests that start them ask for."""


def imports_of_make_venv() -> set[str]:
    """The modules that an environment of `make venv` can import, the project's own and those of the tests included."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    requirements = [
        Requirement(text)
        for texts in (
            project["project"]["dependencies"],
            extras["daemon"],
            extras["server"],
            project["dependency-groups"]["dev"],
        )
        for text in texts
    ]
    installed = {canonicalize_name(project["project"]["name"])}
    while requirements:
        required = requirements.pop()
        distributed = canonicalize_name(required.name)
        if distributed in installed:
            continue
        installed.add(distributed)
        further = [Requirement(text) for text in distribution(distributed).requires or ()]
        requirements += [it for it in further if it.marker is None or it.marker.evaluate({"extra": ""})]
    modules = packages_distributions().items()
    named = {module for module, found in modules if installed.intersection(map(canonicalize_name, found))}
    own = {*project["tool"]["importlinter"]["root_packages"], "bench", "tests", "tools"}
    return named | sys.stdlib_module_names | own


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The line and the first name of each import that is executed, in functions too."""
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def allowed_beside(path: Path) -> tuple[str, ...]:
    """The names without which pytest leaves the module out."""
    return NEEDS.get(path.relative_to(ADAPTERS).parts[0], ()) if path.is_relative_to(ADAPTERS) else ()


def test_a_package_that_make_venv_lacks_is_imported_through_needs() -> None:
    """Otherwise the tests of whoever ran `make test` alone fail in place of being skipped."""
    there = imports_of_make_venv()
    none(
        f'{name(path)}:{line}: {module} is not installed by `make venv`: use needs.library("{module}")'
        for path in python_files("tests")
        for line, module in imported(tree_of(path))
        if name(path) not in ELSEWHERE and module not in there and module not in allowed_beside(path)
    )


def test_a_missing_program_skips_and_fails_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="needs the program no-such-program"):
        needs.program(NO_PROGRAM)
    monkeypatch.setenv("CI", "true")
    for uid in (0, 1000):
        monkeypatch.setattr(os, "geteuid", lambda uid=uid: uid)
        with pytest.raises(pytest.fail.Exception, match="must provide"):
            needs.program(NO_PROGRAM)


def test_what_only_root_can_do_skips_for_an_ordinary_user_under_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        needs.root()


def test_descriptors_are_given_for_a_while() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with needs.descriptors(before[0] + 1 if before[0] < before[1] else before[0]):
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= before[0]
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[0]


def test_the_report_counts_reasons_and_names_one_command() -> None:
    reasons = ["Skipped: needs the program gcore"] * 2 + ["Skipped: needs root", "Skipped: needs the program zstd"]
    assert needs.report(reasons) == [
        "skipped    2: needs the program gcore",
        "skipped    1: needs root",
        "skipped    1: needs the program zstd",
        "to run them too: apt-get install gdb zstd",
    ]
    assert needs.report([]) == []
