"""The project's files, as the tests of the project itself read them.

Owns: which files belong to the project, and the prose in them: documents, docstrings, comments. It imports nothing of
the project and judges nothing.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is committed, or would be. Without git (an unpacked archive): the tree, build products aside."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        left_out = re.compile(r"(^|/)(\.(?!ci/|git(ignore|attributes)$)|__pycache__/|demo-data/)")
        found = (str(path.relative_to(PROJECT)) for path in PROJECT.rglob("*"))
        listed = [file for file in found if not left_out.search(file)]
    return tuple(sorted(PROJECT / name for name in listed if name and (PROJECT / name).is_file()))


def python_files(*roots: str) -> list[Path]:
    """The Python files, or those whose path begins with one of `roots`."""
    return [path for path in project_files() if path.suffix == ".py" and (not roots or name(path).startswith(roots))]


def name(path: Path) -> str:
    """The path from the project's root, as failures show it."""
    return str(path.relative_to(PROJECT))


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def texts() -> Iterator[tuple[Path, str]]:
    """Every file that is text."""
    for path in project_files():
        try:
            yield path, text_of(path)
        except UnicodeDecodeError:
            continue


def documents() -> list[Path]:
    """The Markdown pages."""
    return [path for path in project_files() if path.suffix == ".md"]


def comments(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and comments of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(text_of(path)).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of the strings that stand alone: of modules, classes, functions, and below constants."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def prose() -> Iterator[tuple[Path, int, str]]:
    """Every document, docstring and comment, with its first line."""
    for path in documents():
        yield path, 1, text_of(path)
    for path in python_files():
        for line, text in (*docstrings(path), *comments(path)):
            yield path, line, text


def none(found: Iterable[str]) -> None:
    """Fails with every place found, one a line."""
    if places := sorted(set(found)):
        pytest.fail("\n".join(places), pytrace=False)
