"""Which test functions notice a change of one operator: `python -m tools.mutants PLACE… --tests PATH…`.

Owns: the changes (comparisons, and/or, not, plus/minus), a run of the tests for each, and the table. A place is a file,
a directory, or one line as FILE:LINE. The tests import a copy of src with the changed file; the project is not touched.
"""

import argparse
import ast
import collections
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
TEST_S_MAX = 60
OPPOSITES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add,
}  # fmt: skip


class Mutant(NamedTuple):
    file: Path
    line: int
    name: str
    text: str
    """The changed file."""


def mutants(file: Path) -> Iterator[Mutant]:
    """Each change of one operator in a file."""
    tree = ast.parse(file.read_text("utf-8"))
    for node in ast.walk(tree):
        changes: list[tuple[str, object, str]] = []
        match node:
            case ast.Compare(ops=ops):
                for index, op in enumerate(ops):
                    changed = [*ops[:index], OPPOSITES[type(op)](), *ops[index + 1 :]]
                    changes.append(("ops", changed, f"{type(op).__name__} → {type(changed[index]).__name__}"))
            case ast.BoolOp(op=op) | ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPPOSITES:
                opposite = OPPOSITES[type(op)]
                changes.append(("op", opposite(), f"{type(op).__name__} → {opposite.__name__}"))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                changes.append(("operand", ast.UnaryOp(ast.Not(), operand), "no Not"))
        for field, changed_value, name in changes:
            before = getattr(node, field)
            setattr(node, field, changed_value)
            yield Mutant(file, getattr(node, "lineno", 0), name, ast.unparse(ast.fix_missing_locations(tree)))
            setattr(node, field, before)


def killers(mutant: Mutant, copy: Path, tests: list[str]) -> set[str]:
    """The functions that fail with the change; one name in parentheses if no test ran to its end."""
    file, failed = copy / mutant.file.relative_to(PROJECT / "src"), copy / "failed"
    good = file.read_text("utf-8")
    failed.unlink(missing_ok=True)
    file.write_text(mutant.text, "utf-8")
    try:
        command = [sys.executable, "-m", "pytest", f"--timeout={TEST_S_MAX}", f"--failed-to={failed}", *tests]
        environ = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=PROJECT, env=environ, capture_output=True, check=False)  # noqa: S603 - pytest
    finally:
        file.write_text(good, "utf-8")
    if failed.exists():
        return {line.partition("[")[0].rpartition("/")[2] for line in failed.read_text().splitlines()}
    return {f"(pytest ended with {done.returncode})"} if done.returncode else set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="+")
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=200, help="the most mutants to run, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chosen: list[Mutant] = []
    for place in asked.places:
        path, _, line = place.partition(":")
        files = sorted((PROJECT / path).rglob("*.py")) or [PROJECT / path]
        chosen += [made for file in files for made in mutants(file) if line in ("", str(made.line))]
    if len(chosen) > asked.count:
        chosen = random.Random(asked.seed).sample(chosen, asked.count)  # noqa: S311 - a choice that can be repeated
    kills = collections.defaultdict[str, list[str]](list)
    survivors = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(PROJECT / "src", Path(place) / "src"))
        for made in sorted(chosen, key=lambda made: (made.file, made.line)):
            name = f"{made.file.relative_to(PROJECT)}:{made.line} {made.name}"
            functions = killers(made, copy, asked.tests)
            survivors += not functions
            print(
                f"{len(functions):4} {name}: {' '.join(sorted(functions))}" if functions else f"SURVIVES {name}",
                flush=True,
            )
            for function in functions:
                kills[function].append(name if len(functions) == 1 else "")
    print(f"\n{len(chosen)} mutants, {survivors} survive. Functions with their kills, and those that only they kill:")
    for function, names in sorted(kills.items(), key=lambda pair: -len(pair[1])):
        print(f"{len(names):4} {sum(map(bool, names)):4} {function}")


if __name__ == "__main__":
    main()
