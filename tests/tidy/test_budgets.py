"""Numbers of the source that may only fall. `make budgets` lowers those in budgets.toml to what is there.

Owns: how each number is counted. Code lines are those without blanks, comments, docstrings and imports.
"""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.tidy.project_tree import code_lines, docstrings, name, none, python_files, tree_of

FILE = Path(__file__).with_name("budgets.toml")
HEADER = "# Highest numbers, counted by test_budgets.py. `make budgets` lowers them; to raise one needs a reason.\n"
OPENINGS = ("Of", "As", "By", "That", "Those", "See", "Also", "Raises")
NAMES = ("asked", "found", "given", "gone", "kept", "made", "shown")

Numbers = dict[str, dict[str, int]]
"""Sections of budgets.toml."""


@cache
def counted() -> Numbers:
    """Today's numbers: code lines by room, docstrings by first word, and places where a value is given a name."""
    rooms, openings = Counter[str](), Counter(dict.fromkeys(OPENINGS, 0))
    names = Counter(dict.fromkeys(NAMES, 0))
    for path in python_files("src/"):
        rooms["/".join(name(path.parent).split("/")[1:3])] += code_lines(path)
        openings.update(
            word for text in docstrings(path) if (word := re.split(r"\W", text.text, maxsplit=1)[0]) in OPENINGS
        )
        for node in ast.walk(tree_of(path)):
            match node:
                case ast.Name(id=value, ctx=ast.Store()) | ast.arg(arg=value) if value in NAMES:
                    names[value] += 1
    return {
        "code lines": dict(rooms),
        "docstrings that begin with": dict(openings),
        "values with the name": dict(names),
    }


def budgets() -> Numbers:
    numbers: Numbers = tomllib.loads(FILE.read_text())
    return numbers


def exceeded(section: str) -> list[str]:
    """What is over its budget; nothing may be there without one."""
    own: Mapping[str, int] = budgets()[section]
    return [
        f"{section} {what}: {count}, at most {own.get(what, 0)}"
        for what, count in counted()[section].items()
        if count > own.get(what, 0)
    ]


def test_no_room_has_more_code_than_its_budget() -> None:
    none(exceeded("code lines"))


def test_no_more_docstrings_need_the_name_beside_them() -> None:
    none(exceeded("docstrings that begin with"))


def test_no_more_values_are_named_by_how_they_came() -> None:
    none(exceeded("values with the name"))


def test_no_class_name_but_config_is_defined_twice() -> None:
    nodes = (node for path in python_files("src/") for node in ast.walk(tree_of(path)))
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    none(sorted(value for value, count in classes.items() if count > 1 and value != "Config"))


def main() -> None:
    """Lowers each number to what is there."""
    own = budgets()
    lines = [HEADER]
    for section, numbers in counted().items():
        lines.append(f'\n["{section}"]\n')
        for what, count in sorted(numbers.items()):
            lines.append(f'"{what}" = {min(count, own[section].get(what, count))}\n')
    FILE.write_text("".join(lines))


if __name__ == "__main__":
    main()
