"""Rules for the repository itself. Each test is one rule, and a failure names the file and the line that breaks it."""

import ast
import collections
import re
from pathlib import Path

from tests.tidy.project_tree import PROJECT, documents, name, none, python_files, text_of, texts, tokens_of, tree_of

LINES_MAX = 700
TEST_NAME_CHARACTERS_MAX = 70
DECISION_WORDS_MAX = 250
LONG_WITH_A_REASON: dict[str, str] = {}
"""Path → why the file still is one idea."""
VAGUE_NAMES = {"utils", "util", "common", "helpers", "misc"}
PRIVATE_BY_NAME_ALONE = {"_asdict", "_exit", "_fields", "_make", "_obj", "_replace"}
"""Documented attributes of named tuples, `os` and `ctypes`."""
FOREIGN = tuple(
    # In two halves, so that this list does not break the rule.
    "".join(halves)
    for halves in (
        ("../", "shared"),
        ("/wo", "rk/"),
        ("/.lib", "rary"),
        ("pypi", ".org"),
        ("python", "hosted"),
        ("npm", "js.org"),
        ("deb.", "debian"),
        ("proxy.", "golang"),
    )
)


def test_every_module_has_a_docstring() -> None:
    unclear = python_files(having=r'\A(?!"""\w)')
    without = [name(path) for path in unclear if not ast.get_docstring(tree_of(path))]
    none(without)


def test_no_check_in_the_source_is_an_assert_statement() -> None:
    asserting = [
        f"{name(path)}:{node.lineno}"
        for path in python_files("src/", having=r"\bassert\b")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Assert)
    ]
    none(asserting)


def test_no_python_file_is_too_long() -> None:
    lengths = {name(path): len(text_of(path).splitlines()) for path in python_files()}
    long = {file for file, lines in lengths.items() if lines > LINES_MAX}
    none(f"{file}: {lengths[file]} lines" for file in long - LONG_WITH_A_REASON.keys())
    assert LONG_WITH_A_REASON.keys() - long == set(), "short enough now: remove it from the list"


def test_no_name_of_a_test_is_too_long() -> None:
    """A name is one claim. The docstring says the rest."""
    none(
        f"{name(path)}: {test}"
        for path in python_files("tests/")
        for test in re.findall(r"def (test_\w+)\(", text_of(path))
        if len(test) > TEST_NAME_CHARACTERS_MAX
    )


def test_no_module_has_a_vague_name() -> None:
    parts = {
        path: {part.lower() for part in path.relative_to(PROJECT).with_suffix("").parts} for path in python_files()
    }
    none(name(path) for path in parts if VAGUE_NAMES & parts[path])


def test_no_test_uses_a_private_attribute_of_another_object() -> None:
    """Not even as a text for `setattr`, or in code for another process."""
    used = []
    for path in python_files("tests/", having=r"(?<!self)(?<!cls)(?<!super\(\))\._[a-z]|[gs]etattr\("):
        for node in ast.walk(tree_of(path)):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls") | ast.Call(func=ast.Name(id="super"))):
                    continue
                case ast.Attribute(attr=attribute):
                    found = [f".{attribute}"]
                case ast.Call(
                    func=ast.Name(id="setattr" | "getattr") | ast.Attribute(attr="setattr"),
                    args=[_, ast.Constant(value=str(attribute)), *_],
                ):
                    found = [f".{attribute}"]
                case ast.Constant(value=str(text)):
                    found = re.findall(r"(?<=\w)(?<!self)\._[a-z]\w*", text)
                case _:
                    continue
            used += [
                f"{name(path)}:{node.lineno}: {one}"
                for one in found
                if re.match(r"\._[a-z]", one) and one.removeprefix(".") not in PRIVATE_BY_NAME_ALONE
            ]
    none(used)


def test_every_lint_and_type_exception_names_its_rule_and_its_reason() -> None:
    """`# noqa: CODE (reason)` or `# noqa: CODE - reason`; `# type: ignore[code]  # reason`."""
    unexplained = []
    for path in python_files(having=r"#\s*(noqa|type:\s*ignore)\b"):
        for line, _, comment in tokens_of(path).comments:
            noqa = re.search(r"#\s*noqa\b(?P<codes>:\s*[A-Z]+[0-9]+(?:\s*,\s*[A-Z]+[0-9]+)*)?(?P<reason>.*)", comment)
            ignore = re.search(r"#\s*type:\s*ignore\b(?P<codes>\[[a-z, -]+\])?(?P<reason>.*)", comment)
            for found in (noqa, ignore):
                if found and (not found["codes"] or len(re.findall(r"[A-Za-z]", found["reason"])) < 6):
                    unexplained.append(f"{name(path)}:{line}: {comment}")
    none(unexplained)


def test_plain_words_are_used() -> None:
    """No words that have to be decoded: write who does what to whom. Identifiers count too."""
    dialect = re.compile(
        r"\b(told of|is told|are told|strangers?|homeless|buri(?:ed|es)|bury|thereof"
        r"|what is (?:told|due|left|there) is)\b",
        re.IGNORECASE,
    )
    none(
        f"{name(path)}:{number}: {found[0]}"
        for path, text in texts()
        if name(path).startswith(("src/", "tests/", "docs/")) and path != Path(__file__)
        for number, line in enumerate(text.splitlines(), start=1)
        if (found := dialect.search(line.replace("_", " ")))
    )


def test_no_comment_postpones_work() -> None:
    marks = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b")
    left = [
        f"{name(path)}:{line}: {text}"
        for path in python_files(having=marks.pattern)
        for line, _, text in tokens_of(path).comments
        if marks.search(text)
    ]
    none(left)


def test_no_file_names_this_machine_or_a_package_registry() -> None:
    """pip's own configuration names the registry."""
    mentions = [
        f"{name(path)}: {foreign}"
        for path, text in texts()
        for foreign in FOREIGN
        if foreign in text and path.name != "LICENSE"
    ]
    none(mentions)


def test_links_between_documents_resolve() -> None:
    broken = []
    for path, text in texts():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            file, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            linked = (path.parent / file).resolve() if file else path
            if not linked.exists():
                broken.append(f"{name(path)} → {target}")
            elif anchor and linked.suffix == ".md" and anchor not in anchors(linked.read_text("utf-8")):
                broken.append(f"{name(path)} → {target}: no such heading")
    none(broken)


def test_no_code_span_of_a_document_breaks() -> None:
    """On a terminal the two lines of a command would run as two commands."""
    none(
        f"{name(path)}: {span[2]}"
        for path in documents()
        for paragraph in re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL).split("\n\n")
        for span in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", paragraph, flags=re.DOTALL)
        if "\n" in span[2]
    )


def anchors(markdown: str) -> set[str]:
    """The anchors of a page's headings, as the usual renderers make them."""
    headings = re.findall(r"^#+\s+(.*)$", markdown, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_paths_that_documents_and_docstrings_name_exist() -> None:
    """In documents, paths of the project stand in backquotes; a page of docs/ is named with its suffix anywhere."""
    named = [
        (path, mentioned)
        for path, text in texts()
        for mentioned in re.findall(
            r"`((?:src|tests|docs|bench|tools)/[\w./-]+)`", text if path.suffix == ".md" else ""
        )
        + re.findall(r"\bdocs/[\w/-]+\.md\b", text)
    ]
    none(f"{name(path)}: {mentioned}" for path, mentioned in named if not (PROJECT / mentioned).exists())


def test_tests_that_documents_name_exist() -> None:
    tests = {test for path in python_files("tests/") for test in re.findall(r"def (test_\w+)\(", text_of(path))}
    none(
        f"{name(path)}: {mentioned}"
        for path, text in texts()
        if path.suffix == ".md"
        for mentioned in re.findall(r"`(test_\w+)`", text)
        if mentioned not in tests
    )


def test_every_make_command_in_the_documents_is_a_target() -> None:
    makefile = (PROJECT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = {
        (name(path), command)
        for path, text in texts()
        if path.suffix == ".md"
        for command in re.findall(r"(?:`|^|\s&& )make ([a-z]+)", text, flags=re.MULTILINE)
    }
    none(f"{file}: make {command}" for file, command in named if command not in targets)
    assert {command for file, command in named if file == "README.md"} >= {"run", "test"}


def test_ci_installs_every_program_that_a_test_needs() -> None:
    """Except the tests of `make torture`, which it does not run."""
    script = (PROJECT / ".ci" / "run").read_text("utf-8")
    needed = {
        program
        for path in python_files("tests/")
        if "torture" not in path.parts
        for program in re.findall(r"\bneeds\.program\(\"([\w.-]+)\"\)", text_of(path))
    }
    none(f"{program}: not in .ci/run" for program in needed if f"[{program}]=" not in script)


def test_the_licence_is_there_and_is_the_one_that_the_package_names() -> None:
    licence = (PROJECT / "LICENSE").read_text("utf-8")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert 'license = "Apache-2.0"' in (PROJECT / "pyproject.toml").read_text("utf-8")


def test_decisions_are_numbered_once_each() -> None:
    numbers = collections.Counter(path.name[:4] for path in (PROJECT / "docs" / "decisions").glob("*.md"))
    none(number for number, count in numbers.items() if count > 1 or not number.isdigit())


def test_a_decision_has_at_most_250_words_beside_its_tables() -> None:
    counts = {
        path.name: sum(len(line.split()) for line in text_of(path).splitlines() if not line.startswith("|"))
        for path in (PROJECT / "docs" / "decisions").glob("*.md")
    }
    none(f"{name}: {count} words" for name, count in counts.items() if count > DECISION_WORDS_MAX)
