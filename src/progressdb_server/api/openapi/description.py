"""The types in which a route describes its operations, and the schemas that several routes use.

Owns: `Operation` and its parts. It holds what no code says; what follows from the table of operations (roles, errors of
the checks before routing) is added by `api.openapi.document`. Invariant: bounds come from `api.gate.limits`. The module
must never name an operation.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec

from progressdb_server.api.gate import limits
from progressdb_server.api.gate.keys import ANYONE, Role
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import AnyResponse
from progressdb_server.store.model import StatusError

Schema = dict[str, Any]

_NO_CONTROL: Final = r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*$"
TEXT: Final[Schema] = {"type": "string"}
INTEGER: Final[Schema] = {"type": "integer"}
SWITCH: Final[Schema] = {"type": "string", "enum": ["true", "false", "1", "0"]}
ID: Final[Schema] = {"type": "string", "pattern": f"^{limits.ID_PATTERN.pattern}$"}
AUTHOR: Final[Schema] = {
    "type": "string",
    "maxLength": limits.AUTHOR_BYTES_MAX,
    "pattern": _NO_CONTROL,
    "description": f"At most {limits.AUTHOR_BYTES_MAX} bytes of UTF-8, no control characters. An empty one counts as "
    "none.",
}
STORED_KEY: Final[Schema] = {"type": "string", "maxLength": limits.STORED_KEY_BYTES_MAX}


def text(bytes_max: int) -> Schema:
    return {"type": "string", "maxLength": bytes_max, "description": f"At most {bytes_max} bytes of UTF-8."}


def nullable(schema: Schema) -> Schema:
    """The schema, or null, which counts as absent."""
    return {**schema, "type": [schema["type"], "null"]}


def object_of(**properties: Schema) -> Schema:
    """An object in which all these properties are required."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def texts(*names: str) -> Schema:
    """An object with these properties, all of them text."""
    return object_of(**dict.fromkeys(names, TEXT))


def list_of(name: str, items: Schema, **other: Schema) -> Schema:
    """An object with the `other` properties and a list."""
    return object_of(**other, **{name: {"type": "array", "items": items}})


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


Dependency = Literal["disk", "key service"]
NOTHING: Final[frozenset[Dependency]] = frozenset()
DISK: Final[frozenset[Dependency]] = frozenset({"disk"})
KEY_SERVICE: Final[frozenset[Dependency]] = frozenset({"key service"})
BOTH: Final = DISK | KEY_SERVICE


class Parameter(msgspec.Struct, frozen=True):
    name: str
    schema: Schema
    description: str
    location: Literal["query", "header"] = "query"
    required: bool = False


class JsonBody(msgspec.Struct, frozen=True):
    struct: type[msgspec.Struct]
    """What the handler decodes."""
    checks: dict[str, Schema] = {}
    """The schema with what the handler checks beyond the type, for each such property. It replaces that of the struct.
    """
    required: tuple[str, ...] = ()
    """Properties that the struct does not require and the handler does."""
    extra: Schema = {}
    """Keywords for the object as a whole."""


Handler = Callable[[ApiRequest], Awaitable[AnyResponse]]
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


async def _no_handler(request: ApiRequest) -> AnyResponse:
    raise NotImplementedError


class Operation(msgspec.Struct, frozen=True):
    """One method on one path: its handler, who may call it, what it takes and returns. It decorates the handler, whose
    docstring begins with a summary for the users of the API."""

    method: str
    path: str
    """The path, as a template of Starlette: `/admin/keys/{key:path}`."""
    handler: Handler = _no_handler
    roles: frozenset[Role] = ANYONE
    response: Schema | None = None
    """Schema of the successful response; None if it has no body."""
    content_type: str = "application/json"
    status: int = 200
    other_responses: Mapping[int, Schema | None] = {}
    """The other responses that are not errors, by status."""
    headers: tuple[Parameter, ...] = ()
    """The headers of the responses that are not errors, beside those of every response."""
    body: JsonBody | None = None
    form: Schema | None = None
    parameters: tuple[Parameter, ...] = ()
    """Beside CALLER, which every path for users takes."""
    path_schemas: dict[str, Schema] = {}
    """The schema of each path parameter that is not in PATH_SCHEMAS. Any other may be any text but the empty one."""
    errors: Mapping[int, tuple[str, ...]] = {}
    """The sentences that the operation itself sends, by status. Each is one that the code sends; tests provoke it."""
    raises: tuple[type[StatusError] | str, ...] = ()
    """Errors of other rooms, with their status and sentence; a sentence alone is one that the operation sends with the
    status 400."""
    needs: frozenset[Dependency] = BOTH
    """What the operation cannot respond without."""

    def __call__(self, handler: Decorated) -> Decorated:
        vars(handler).setdefault("operations", []).append(self)
        return handler

    @property
    def summary(self) -> str:
        """The first paragraph of the handler's docstring, in one line."""
        return " ".join((self.handler.__doc__ or "").partition("\n\n")[0].split()).removesuffix(".")

    @property
    def tag(self) -> str:
        return next(tag for tag, paths in _TAGS if paths.match(self.path))


def operations_of(*handlers: object) -> tuple[Operation, ...]:
    """The operations of decorated functions, and of the decorated methods of other objects, in the order of their
    definition."""
    operations: list[Operation] = []
    for owner in handlers:
        functions = {"": owner} if callable(owner) else dict(vars(type(owner)))
        for name, function in functions.items():  # never an attribute of the object itself, which could be computed
            for operation in getattr(function, "operations", ()):
                handler = getattr(owner, name) if name else owner
                operations.append(msgspec.structs.replace(operation, handler=handler))
    return tuple(operations)


_TAGS: Final = tuple(
    (tag, re.compile(pattern))
    for tag, pattern in (
        ("viewer", "/viewer"),
        ("documentation", "/($|docs|openapi)"),
        ("users", "/v1/_sign"),
        ("reactions", "/v1/.*/reactions"),
        ("messages", "/v1/.*messages"),
        ("threads", "/v1/threads"),
        ("operators", "/"),
    )
)
"""The tag for the first pattern that the beginning of a path matches."""
PATH_SCHEMAS: Final = {"thread": ID, "message": ID}

# --- what several route modules take ----------------------------------------------------------------------------
CALLER: Final = (
    Parameter("X-User-ID", AUTHOR, "The user for whom the call acts.", "header"),
    Parameter("author", AUTHOR, "The author for whom the call acts."),
)
IDEMPOTENCY: Final = Parameter(
    "Idempotency-Key",
    {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "Within 24 hours, a repeated request with the same API key, author and `Idempotency-Key` gets the first response "
    "again and changes nothing.",
    "header",
)
