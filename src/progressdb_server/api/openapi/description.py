"""The form of a description: what is said of an operation beside what its code says.

Owns: `Described` and its parts, and the schemas of what is checked alike everywhere. Invariant: bounds come from
`api.bounds`. It must never know an operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from progressdb_server.api.http import limits

Schema = dict[str, Any]

_NO_CONTROL: Final = r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"
ID: Final[Schema] = {"type": "string", "pattern": f"^{limits.ID_PATTERN.pattern}$"}
AUTHOR: Final[Schema] = {
    "type": "string",
    "maxLength": limits.AUTHOR_BYTES_MAX,
    "pattern": _NO_CONTROL,
    "description": f"At most {limits.AUTHOR_BYTES_MAX} bytes of UTF-8, no control characters.",
}
STORED_KEY: Final[Schema] = {"type": "string", "maxLength": limits.STORED_KEY_BYTES_MAX}


def text(bytes_max: int) -> Schema:
    return {"type": "string", "maxLength": bytes_max, "description": f"At most {bytes_max} bytes of UTF-8."}


def nullable(schema: Schema) -> Schema:
    """Null counts as absent."""
    return {**schema, "type": [schema["type"], "null"]}


def texts(*names: str) -> Schema:
    """An object with these fields, all of them text."""
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": list(names)}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def listed(name: str, of: Schema, **beside: Schema) -> Schema:
    """An object with a list, and what stands beside it."""
    properties = {**beside, name: {"type": "array", "items": of}}
    return {"type": "object", "properties": properties, "required": list(properties)}


Part = Literal["disk", "key service"]
NOTHING: Final[frozenset[Part]] = frozenset()
DISK: Final[frozenset[Part]] = frozenset({"disk"})
KEY_SERVICE: Final[frozenset[Part]] = frozenset({"key service"})
BOTH: Final = DISK | KEY_SERVICE


class Parameter(msgspec.Struct, frozen=True):
    """In a query or a header."""

    name: str
    schema: Schema
    what: str
    place: str = "query"
    required: bool = False


class Taken(msgspec.Struct, frozen=True):
    """A JSON body: the struct that the handler decodes, with what the handler checks beside its types; `beside`: of the
    object as a whole."""

    struct: type[msgspec.Struct]
    checks: dict[str, Schema] = {}
    required: tuple[str, ...] = ()
    beside: Schema = {}


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """`answer`: a schema of `content`; None: there is nothing to say. `answers`: other good ones, by status.
    `refusals`: sentences by status, beside those that follow from the table of routes. `needs`: what it can't be
    answered without."""

    tag: str
    summary: str
    answer: Schema | None = None
    content: str = "application/json"
    status: int = 200
    answers: Mapping[int, Schema | None] = {}
    body: Taken | None = None
    form: Schema | None = None
    parameters: tuple[Parameter, ...] = ()
    path_schemas: dict[str, Schema] = {}
    refusals: Mapping[int, tuple[str, ...]] = {}
    needs: frozenset[Part] = BOTH
