"""Prose names only what exists: modules, classes, functions, settings and files.

Checked are documents, docstrings and comments. A name counts when it stands in backquotes, or begins with one of the
project's packages.
"""

from __future__ import annotations

import ast
import fnmatch
import pkgutil
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.tidy.project_tree import (
    IDENTIFIER,
    PROJECT,
    name,
    none,
    project_files,
    prose,
    python_files,
    text_of,
    tokens_of,
    tree_of,
)

PACKAGES = (
    "minikms", "minikms_auditor", "minikms_daemon", "minikms_gateway", "minikms_replicator", "minikms_tokens",
    "minikms_unlock", "progressdb_server",
)  # fmt: skip
FILE_SUFFIXES = frozenset(
    {"backup", "conf", "env", "json", "key", "log", "new", "old", "service", "sock", "socket", "toml", "yaml"}
)
"""Last parts of dotted names that are files of an installation: `keyring.json`."""
OF_OTHERS = frozenset(
    {
        "Date",  # HTTP
        "LOCAL_PEERCRED",  # macOS
        "MCL_ONFAULT",  # mlockall(2)
        "PIP_INDEX_URL",
        "PR_SET_PDEATHSIG",  # prctl(2)
        "ReadOptions.set_iterate_lower_bound",  # rocksdict
        "perf",
        "set_iterate_lower_bound",  # rocksdict
        "sun_path",  # unix(7)
        "uv",
    }
)
"""Names of other programs and systems, which nothing here spells in code."""


@dataclass
class Scope:
    """A module or class: its members, each with the scope that it is, or None."""

    members: dict[str, Scope | None] = field(default_factory=dict)
    types: dict[str, list[str]] = field(default_factory=dict)
    """Of an annotated field, or an import: names of the classes or modules that it may be."""
    bases: list[str] = field(default_factory=list)
    star_imports: list[str] = field(default_factory=list)
    """Modules whose names this one has too."""


@dataclass
class Index:
    """Every module of the project by its dotted name, and every class by its name."""

    modules: dict[str, Scope] = field(default_factory=dict)
    ends: dict[str, list[Scope]] = field(default_factory=lambda: defaultdict(list))
    """Of the modules whose dotted name has these last parts."""
    classes: dict[str, list[Scope]] = field(default_factory=lambda: defaultdict(list))

    def add(self, parts: list[str], scope: Scope) -> None:
        self.modules[".".join(parts)] = scope
        for begin in range(len(parts)):
            self.ends[".".join(parts[begin:])].append(scope)

    def roots(self, parts: list[str]) -> Iterator[tuple[Scope, list[str]]]:
        """Modules and classes that the first parts may mean, each with the parts that remain."""
        for scope in self.classes.get(parts[0], []):
            yield scope, parts[1:]
        for count in range(len(parts), 0, -1):
            for scope in self.ends.get(".".join(parts[:count]), []):
                yield scope, parts[count:]

    def has(self, scope: Scope, parts: list[str], seen: frozenset[int] = frozenset()) -> bool:
        if not parts:
            return True
        if id(scope) in seen:
            return False
        seen |= {id(scope)}
        first, rest = parts[0], parts[1:]
        if first in scope.members:
            inner = scope.members[first]
            if not rest or (inner is not None and self.has(inner, rest)):
                return True
            return any(
                self.has(root, left + rest)
                for type_name in scope.types.get(first, [])
                for root, left in self.roots(type_name.split("."))
            )
        inherited = [base for text in scope.bases for base in self.classes.get(text, [])]
        inherited += [self.modules[module] for module in scope.star_imports if module in self.modules]
        return any(self.has(base, parts, seen) for base in inherited)

    def resolves(self, dotted: str) -> bool:
        parts = dotted.split(".")
        return any(self.has(scope, rest) for scope, rest in self.roots(parts))


@cache
def index() -> Index:
    made = Index()
    for path in python_files():
        inside = path.relative_to(PROJECT / "src") if name(path).startswith("src/") else path.relative_to(PROJECT)
        parts = [part for part in inside.with_suffix("").parts if part != "__init__"]
        made.add(parts, scope_of(tree_of(path).body, made, parts))
    for dotted in list(made.modules):
        parent, _, last = dotted.rpartition(".")
        if parent in made.modules:
            made.modules[parent].members.setdefault(last, made.modules[dotted])
    return made


def scope_of(body: list[ast.stmt], made: Index, module: list[str]) -> Scope:
    scope = Scope()
    for statement in statements(body):
        match statement:
            case ast.ClassDef():
                inner = scope_of(statement.body, made, module)
                inner.bases = [ast.unparse(base).split("[")[0].rpartition(".")[2] for base in statement.bases]
                for node in ast.walk(statement):
                    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                        inner.members.setdefault(node.attr, None)
                scope.members[statement.name] = inner
                made.classes[statement.name].append(inner)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                scope.members[statement.name] = None
            case ast.AnnAssign(target=ast.Name(id=target)):
                scope.members[target] = None
                scope.types[target] = re.findall(IDENTIFIER, ast.unparse(statement.annotation))
            case ast.Assign():
                for node in (inner for target in statement.targets for inner in ast.walk(target)):
                    if isinstance(node, ast.Name):
                        scope.members[node.id] = None
            case ast.stmt() if isinstance(named := getattr(statement, "name", None), ast.Name):
                scope.members[named.id] = None  # ast.TypeAlias, which Python 3.11 does not have
            case ast.Import() | ast.ImportFrom():
                source = f"{statement.module}." if isinstance(statement, ast.ImportFrom) else ""
                for alias in statement.names:
                    if alias.name == "*":
                        scope.star_imports.append(source.rstrip("."))
                        continue
                    bound = alias.asname or alias.name.partition(".")[0]
                    scope.members[bound] = None
                    scope.types[bound] = [source + alias.name]
    return scope


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a module or class, also inside `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            yield from statements(statement.body)
            yield from statements(getattr(statement, "orelse", []))


@cache
def words_of_code() -> frozenset[str]:
    """Every identifier in code, and every word of its strings and of the other files that programs read."""
    words: set[str] = set()
    for path in project_files():
        if path.suffix == ".py":
            words |= tokens_of(path).words
        elif path.suffix in {".toml", ".yaml", ".yml", ".html", ".js", ".service", ".socket"}:
            words.update(re.findall(IDENTIFIER, text_of(path)))
    return frozenset(words)


@cache
def exists(dotted: str) -> bool:
    parts = dotted.split(".")
    if dotted in OF_OTHERS or index().resolves(dotted) or index().resolves(f"Config.{dotted}"):
        return True
    if parts[-1] in FILE_SUFFIXES:
        return True
    if any(True for _ in index().roots(parts[:1])):
        return False
    try:
        pkgutil.resolve_name(dotted)
    except AttributeError:
        return False
    except ImportError:
        return parts[-1] in words_of_code()  # the first part is a variable: the code must at least use the attribute
    return True


def spellings(quoted: str) -> set[str]:
    """A parameter is in capitals in a usage line; a counter is exported with `_total`; a variable has a prefix; a
    constant of the system may have an underscore in front.
    """
    prefix = "PROGRESSDB_"
    return {
        quoted,
        quoted.lower(),
        quoted.removesuffix("_total"),
        quoted.removeprefix(prefix),
        prefix + quoted,
        f"_{quoted}",
    }


def backquoted(text: str) -> Iterator[tuple[int, str]]:
    """What stands between backquotes, with the number of lines above it."""
    for found in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", text):
        yield text.count("\n", 0, found.start()), found[1]


def places(path: Path, line: int, above: int) -> str:
    return f"{name(path)}:{line + above}"


def test_each_dotted_name_resolves() -> None:
    """`room.Class.method`, `Class.field`, `module.name`, and what begins with a package wherever it stands."""
    missing = []
    for path, line, text in prose():
        named = [
            (above, found[1])
            for above, quoted in backquoted(text)
            if (found := re.fullmatch(rf"({IDENTIFIER}(?:\.{IDENTIFIER})+)(\(.*\))?", quoted))
            and not quoted.endswith((".py", ".md"))
        ]
        for found in re.finditer(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.{IDENTIFIER})+(?![\w/-])", text):
            named.append((text.count("\n", 0, found.start()), found[0]))
        missing += [f"{places(path, line, above)}: {dotted}" for above, dotted in named if not exists(dotted)]
    none(missing)


def test_each_single_name_is_one_of_the_code() -> None:
    known = OF_OTHERS | sys.stdlib_module_names | words_of_code()
    missing = [
        f"{places(path, line, above)}: {quoted}"
        for path, line, text in prose()
        for above, quoted in backquoted(text)
        if re.fullmatch(rf"{IDENTIFIER}(\(\))?", quoted) and not spellings(quoted.removesuffix("()")) & known
    ]
    none(missing)


def test_each_python_file_and_page_that_is_named_exists() -> None:
    """By the end of its path: `store/writer.py`, `writer.py`; `*` stands for any characters."""
    paths = [f"/{name(path)}" for path in project_files()]
    missing = [
        f"{places(path, line, above)}: {file}"
        for path, line, text in prose()
        for above, quoted in backquoted(text)
        for file in re.findall(r"(?<![\w./*-])[\w./*-]+\.(?:py|md)\b", quoted)
        if not fnmatch.filter(paths, f"*/{file}")
    ]
    none(missing)


def test_a_name_that_does_not_exist_is_found() -> None:
    assert exists("minikms_daemon.service") and exists("minikms.Client") and exists("Config.server.address")
    assert exists("server.address"), "a setting of the configuration"
    assert exists("os.fdatasync") and exists("keyring.json")
    for dead in ("minikms.services", "minikms_daemon.missing", "store.missing", "Config.server.missing", "os.missing"):
        assert not exists(dead), dead
