"""The Markdown page of an OpenAPI document.

Owns: how operations and schemas are written. The page has all of the document that a person who calls the API needs;
a program reads the document itself, to which the page links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import yaml

_BOUNDS: Final = {
    "minimum": "{} or more", "maximum": "at most {}", "maxLength": "at most {} bytes", "pattern": "`{}`",
    "maxItems": "at most {} items", "maxProperties": "at most {} entries", "contentEncoding": "{}",
}  # fmt: skip

_BASE64: Final = "^(?:[A-Za-z0-9+/]{4})*"
"""How the pattern of every base64 text begins."""


def page(document: bytes, name: str) -> str:
    api = yaml.safe_load(document)
    return "\n".join(
        (
            f"# HTTP API of {api['info']['title']}\n\n{api['info']['description']}\n",
            f"The same for programs: [{name}.yaml]({name}.yaml).\n",
            *_operations(api),
            "## Schemas\n",
            *_schemas(api["components"]["schemas"]),
        )
    )


def _operations(api: dict[str, Any]) -> Iterator[str]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield f"## {method.upper()} `{path}`\n\n{operation['summary']}.\n\n{operation.get('description', '')}\n"
            parameters = operation.get("parameters", ())
            yield _table(
                ("Parameter", "In", "Value"),
                ((_named(each, each.get("required")), each["in"], _value(each)) for each in parameters),
            )
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                schema = content.get("schema", {})
                yield f"Request, `{kind}`: {_shape(schema)}\n"
                yield _fields(schema)
            yield _table(
                ("Status", "Description", "Content"),
                (
                    (status, answer["description"], _contents(answer))
                    for status, answer in operation["responses"].items()
                ),
            )


def _schemas(schemas: dict[str, Any]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield f"### {name}\n\n{schema.get('description', '')}\n"
        yield _fields(schema)


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    fields = schema.get("properties", {}).items()
    return _table(("Field", "Value"), ((_named({"name": name}, name in required), _value(of)) for name, of in fields))


def _named(parameter: dict[str, Any], required: object) -> str:
    return f"`{parameter['name']}`" + ("" if required else ", optional")


def _value(described: dict[str, Any]) -> str:
    return f"{_shape(described.get('schema', described))}. {described.get('description', '')}".removesuffix(". ")


def _contents(answer: dict[str, Any]) -> str:
    shapes = (f"`{kind}` {_shape(each.get('schema', {}))}" for kind, each in answer.get("content", {}).items())
    return "; ".join(shapes)


def _shape(schema: dict[str, Any]) -> str:
    """A short text for a schema."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_shape, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kinds = schema.get("type", "any JSON")
    words = [" or ".join(kinds) if isinstance(kinds, list) else str(kinds)]
    if "items" in schema:
        words = [f"list of {_shape(schema['items'])}"]
    if schema.get("pattern", "").startswith(_BASE64):
        return "base64"
    return ", ".join(words + [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema])


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) for row in rows]
    whole = (" | ".join(head), " | ".join("-" * len(head)), *lines)
    return "".join(f"| {line} |\n" for line in whole) if lines else ""
