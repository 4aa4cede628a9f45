"""The project's files, as the tests of the project itself read them.

Owns: which files belong to the project, and the prose in them: documents, docstrings, comments. It imports nothing of
the project and judges nothing.
"""

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).resolve().parents[2]
IDENTIFIER = r"[A-Za-z_]\w*"
NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
}  # fmt: skip


@cache
def project_files() -> tuple[Path, ...]:
    """Every file that is committed, or would be. Without git (an unpacked archive): the tree, build products aside."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        left_out = re.compile(r"^site/|(^|/)(\.(?!ci/|git(ignore|attributes)$)|__pycache__/|demo-data/)")
        found = (str(path.relative_to(PROJECT)) for path in PROJECT.rglob("*"))
        listed = [file for file in found if not left_out.search(file)]
    return tuple(sorted(PROJECT / name for name in listed if name and (PROJECT / name).is_file()))


def python_files(*roots: str, having: str = "") -> list[Path]:
    """The Python files, or those whose path begins with one of `roots`, and whose text has what the expression `having`
    matches: to read the text takes far less than its tokens or its tree."""
    chosen = (path for path in project_files() if path.suffix == ".py" and (not roots or name(path).startswith(roots)))
    return [path for path in chosen if re.search(having, text_of(path))]


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


def statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Those of a block and of all blocks in it. Far fewer than the nodes of the tree."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            yield from statements(getattr(statement, block, ()))


class Prose(NamedTuple):
    """What stands at a line of a Python file."""

    line: int
    column: int
    text: str


@cache
def docstrings(path: Path) -> tuple[Prose, ...]:
    """The strings that stand alone: of modules, classes, functions, and below constants."""
    return tuple(
        Prose(statement.lineno, statement.col_offset, statement.value.value)
        for statement in statements(tree_of(path).body)
        if isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def code_lines(path: Path) -> int:
    """The number of lines without blanks, comments, docstrings and imports."""
    left_out = {
        line
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text_of(path)).readline)
        if token.type not in NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(lines - left_out)


class Tokens(NamedTuple):
    comments: tuple[Prose, ...]
    words: frozenset[str]
    """Every identifier, and every word of a string that is no docstring."""


@cache
def tokens_of(path: Path) -> Tokens:
    alone = {(docstring.line, docstring.column) for docstring in docstrings(path)}
    comments: list[Prose] = []
    words: set[str] = set()
    for token in tokenize.generate_tokens(io.StringIO(text_of(path)).readline):
        if token.type == tokenize.NAME:
            words.add(token.string)
        elif token.type == tokenize.COMMENT:
            comments.append(Prose(*token.start, token.string))
        elif token.type not in (tokenize.OP, tokenize.NEWLINE, tokenize.NL) and token.start not in alone:
            words.update(re.findall(IDENTIFIER, token.string))
    return Tokens(tuple(comments), frozenset(words))


def prose() -> Iterator[tuple[Path, int, str]]:
    """Every document, docstring and comment, with its first line."""
    for path in documents():
        yield path, 1, text_of(path)
    for path in python_files():
        for line, _, text in (*docstrings(path), *tokens_of(path).comments):
            yield path, line, text


def none(found: Iterable[str]) -> None:
    """Fails with every place found, one a line."""
    if places := sorted(set(found)):
        pytest.fail("\n".join(places), pytrace=False)
