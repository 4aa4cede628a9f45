"""docs/architecture.md names every package and every top-level module, in one row each, and nothing else. A room
imports rooms in later rows only. No files and no rooms import each other in a circle.
"""

import ast
import re
from collections import Counter, defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.tidy.project_tree import PROJECT, text_of, tree_of

PAGE = PROJECT / "docs" / "architecture.md"
SOURCE = PROJECT / "src"
PROGRAMS = sorted(path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists())
NOT_ROOMS = {"__init__.py", "__main__.py"}


def rooms(program: Path) -> set[str]:
    """`api/routes/` for a package, `errors.py` for a top-level module."""
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


@cache
def modules() -> dict[str, Path]:
    """The files of src by the names that an import gives them."""
    paths = (path.relative_to(SOURCE) for path in SOURCE.rglob("*.py"))
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@cache
def imports() -> dict[Path, set[Path]]:
    """What each file imports of src, wherever the import stands: in a function or below TYPE_CHECKING too."""
    found: dict[Path, set[Path]] = {}
    for path in modules().values():
        names: set[str] = set()
        for node in ast.walk(tree_of(SOURCE / path)):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module and not node.level, f"{path}:{node.lineno}: a relative import"
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= inner if inner <= modules().keys() else inner | {node.module}
        found[path] = {modules()[name] for name in names & modules().keys()} - {path}
    return found


def room_of(path: Path) -> tuple[str, str]:
    """The program and the first cell of the row."""
    program, *inner = path.parts
    return program, inner[0] if len(inner) == 1 else "/".join((*inner[:-1], ""))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_room_imports_rooms_in_later_rows_only(program: str) -> None:
    order = list(rows(program))
    for path, used in imports().items():
        own, room = room_of(path)
        if own == program and room not in NOT_ROOMS:
            for other in used:
                its, name = room_of(other)
                upwards = its == program and name not in NOT_ROOMS and order.index(name) < order.index(room)
                assert not upwards, f"{path} imports {other}, whose room has an earlier row"


def test_no_files_and_no_rooms_import_each_other() -> None:
    between_rooms: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
    for path, used in imports().items():
        between_rooms[room_of(path)] |= {room_of(other) for other in used} - {room_of(path)}
    for graph in (imports(), between_rooms):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(" imports ".join(map(str, reversed(error.args[1]))))
