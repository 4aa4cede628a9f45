"""What a document of an API promises, as pairs that a test can walk, and whether an answer keeps to it.

Owns: reading OpenAPI: the pairs of operation and status, and what is said of each. It knows no API.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

_LOADER: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C takes a tenth of the time."""


class Pair(NamedTuple):
    """`operation` is its method and path."""

    operation: str
    status: int


def read(text: str | bytes) -> Any:
    """What a YAML document says. Both loaders are safe ones."""
    return yaml.load(text, _LOADER)


def pairs(document: Mapping[str, Any]) -> Iterator[Pair]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status in operation["responses"]:
                yield Pair(f"{method.upper()} {path}", int(status))


def check(document: Mapping[str, Any], operation: str, status: int, headers: Mapping[str, str], body: bytes) -> None:
    """That this answer is a described one: its status, type, headers, and the shape of a refusal."""
    method, path = operation.split(" ", 1)
    responses = document["paths"][path][method.lower()]["responses"]
    assert str(status) in responses, (operation, status, body[:500])
    said = responses[str(status)]
    types = said.get("content", {})
    given = headers.get("content-type", "").partition(";")[0]
    assert given in types if types else not body, (operation, status, given, list(types))
    for name, header in said.get("headers", {}).items():
        assert not header["required"] or name.lower() in headers, (operation, status, name)
    if status >= 400 and given == "application/json":
        told = json.loads(body)
        assert told["error"] and set(told) <= {"error", "code"}, (operation, status, told)
