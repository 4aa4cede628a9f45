"""docs/architecture.md names every package and every top-level module, in one row each, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.tidy.project_tree import PROJECT, text_of

PAGE = PROJECT / "docs" / "architecture.md"
SOURCE = PROJECT / "src"
PROGRAMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists())
NOT_ROOMS = {"__init__.py", "__main__.py"}


def rooms(program: Path) -> set[str]:
    """`custody/backup/` for a package, `errors.py` for a top-level module."""
    packages = {f"{found.parent.relative_to(program)}/" for found in program.rglob("*/__init__.py")}
    return packages | {path.name for path in program.glob("*.py")} - NOT_ROOMS


def rows(program: str) -> Counter[str]:
    """The first cells of the table below the heading that names the program's directory."""
    section = re.search(rf"^#+ .*`src/{program}`.*?\n(.*?)(?=^#|\Z)", text_of(PAGE), flags=re.MULTILINE | re.DOTALL)
    assert section, f"no heading names `src/{program}`"
    return Counter(re.findall(r"^\| `([\w/.]+)` \|", section[1], flags=re.MULTILINE))


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_package_and_top_level_module_has_one_row(program: str) -> None:
    named, there = rows(program), rooms(SOURCE / program)
    assert sorted(there - named.keys()) == [], "without a row"
    assert sorted(named.keys() - there) == [], "rows of what does not exist"
    assert [room for room, count in named.items() if count > 1] == [], "rows that repeat"
