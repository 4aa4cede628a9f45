"""The OpenAPI 3.1 document, generated from the table of operations.

Owns: how paths, roles, descriptions and structs become one document. Invariants: the document contains exactly the
operations of the table; the errors of the checks that every request passes (docs/spec/server-http.md) are added here,
and nowhere else. Pure: the same table gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec
import yaml

from progressdb_server.api.http import limits
from progressdb_server.api.http.access import Role, for_users, is_open
from progressdb_server.api.http.errors import (
    AUTHOR_CONTROL_CHARACTER,
    AUTHOR_TOO_LONG,
    FORBIDDEN,
    INTERNAL,
    INVALID_ENCODING,
    INVALID_JSON,
    INVALID_SIGNATURE,
    MISSING_SIGNATURE,
    OTHER_AUTHOR_IN_QUERY,
    RATE_LIMITED,
    REPEATED_PARAMETER,
    TOO_LARGE,
    UNAUTHORIZED,
)
from progressdb_server.api.openapi.description import Description, JsonBody, Parameter, Schema, ref
from progressdb_server.store.model import Message, Thread

CONTENT_TYPE: Final = "application/yaml"

_INFO: Final = """\
Threads and messages, encrypted at rest under one key a thread.

Every answer carries `X-Request-Id`: the caller's own, if it is 1 to 128 of `[A-Za-z0-9._:/+=-]`, otherwise a new one.
It goes through the logs of both processes and into the audit log of the key service.

Any path answers `OPTIONS` with 204 and without a key. Another method than those listed is 405 with `Allow`, another
path 404. A request that is not HTTP is 400 `malformed HTTP request`, a head of more than {head} bytes or {headers}
headers 431 `request head too large`; both close the connection.

Lists of more than {list_} bytes are streamed; one that breaks off is never a complete JSON text.
"""
_TAGS: Final = {
    "threads": "Conversations. Only the author of a thread sees or changes it.",
    "messages": "What is said in a thread; every change is a new version.",
    "reactions": "One reaction an identity to a message.",
    "users": "Signatures by which front ends act for a user.",
    "operators": "Health, counts, raw values, background work.",
    "documentation": "This document. Needs no key.",
    "viewer": "Pages for people: log in with an admin key.",
}
REQUEST_ID: Final = Parameter(
    "X-Request-Id",
    {"type": "string", "pattern": r"^[A-Za-z0-9._:/+=-]{1,128}$"},
    "The id of the request, in every log.",
    "header",
    required=True,
)
_RETRY_AFTER: Final = Parameter("Retry-After", {"type": "integer", "minimum": 1}, "Seconds.", "header", required=True)
_LOCATION: Final = Parameter("Location", {"type": "string"}, "Where to.", "header", required=True)
_HEADERS: Final = {
    303: _LOCATION,
    308: _LOCATION,
    401: Parameter("WWW-Authenticate", {"type": "string"}, "How to authenticate.", "header", required=True),
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
_STATUS_TEXTS: Final = {
    200: "Done.",
    202: "Begun.",
    204: "Done; nothing to say.",
    303: "See another page.",
    308: "The page is there.",
    400: "The request is malformed or out of bounds.",
    401: "No key, an unknown key, or a user that is not signed rightly.",
    403: "The caller may not do this.",
    404: "There is no such thing.",
    409: "It contradicts an earlier request, or the state of what it names.",
    413: "The body is too large.",
    429: "Too many requests from this key or address.",
    500: "A stored record can't be read, or the server failed; the log says more under the request's id.",
    503: "The disk or the key service can't take it now; the same request may be sent again.",
}


class DescriptionError(Exception):
    """A description contradicts the code that it describes."""


def document(operations: Iterable[Description], version: str) -> dict[str, Any]:
    """Raises DescriptionError if a description names a property that its struct does not have."""
    paths: dict[str, dict[str, Any]] = {}
    for description in operations:
        paths.setdefault(documented_path(description), {})[description.method.lower()] = _operation(description)
    paths = {path: dict(sorted(methods.items())) for path, methods in paths.items()}
    tags = {operation["tags"][0] for methods in paths.values() for operation in methods.values()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ProgressDB",
            "version": version,
            "description": _INFO.format(
                head=limits.HEAD_BYTES_MAX, headers=limits.HEADERS_COUNT_MAX, list_=limits.LIST_BUFFER_BYTES_MAX
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [{"name": name, "description": text} for name, text in _TAGS.items() if name in tags],
        "security": _SIGNED_OR_NOT,
        "paths": paths,
        "components": {"schemas": _schemas(), "securitySchemes": _SECURITY},
    }


_SECURITY: Final[dict[str, Any]] = {
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer", "description": "The same key as a bearer token."},
    "userSignature": {
        "type": "apiKey",
        "in": "header",
        "name": "X-User-Signature",
        "description": "Lower-case hex HMAC-SHA-256(backend API key, user id) of the id in `X-User-ID`. Front-end keys "
        "always need it.",
    },
    "viewerSession": {"type": "apiKey", "in": "cookie", "name": "progressdb_viewer"},
}
_KEYED: Final[list[dict[str, list[str]]]] = [{"apiKey": []}, {"bearer": []}]
_SIGNED_OR_NOT: Final = [*_KEYED, {"apiKey": [], "userSignature": []}, {"bearer": [], "userSignature": []}]


def _schemas() -> dict[str, Any]:
    _, components = msgspec.json.schema_components([Message, Thread])
    for name, what in (
        ("Message", "One version of a message."),
        ("Thread", "A thread. In a list, `error` is the code of a thread that can't be read."),
    ):
        components[name]["description"] = f"{what} Times are Unix nanoseconds; a field that is empty is absent."
    error = {
        "type": "object",
        "properties": {"error": {"type": "string", "description": "A sentence."}},
        "required": ["error"],
        "additionalProperties": False,
    }
    return {**components, "Error": error}


def documented_path(description: Description) -> str:
    """The path as OpenAPI writes it."""
    return description.path.replace(":path}", "}")


def _operation(description: Description) -> dict[str, Any]:
    path = documented_path(description)
    made: dict[str, Any] = {
        "tags": [description.tag],
        "summary": description.summary,
        "operationId": _operation_id(description.method, path),
        "description": f"Who may call it: {_who(path, description.roles)}.",
    }
    parameters = [_path_parameter(name, description) for name in _names_in(path)]
    parameters += [_parameter(parameter) for parameter in description.parameters]
    if parameters:
        made["parameters"] = parameters
    if description.body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _body_schema(description.body)}},
        }
    if description.form is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/x-www-form-urlencoded": {"schema": description.form}},
        }
    made["responses"] = _responses(description)
    if is_open(path):
        made["security"] = [{"viewerSession": []}, {}] if description.tag == "viewer" else []
    elif not for_users(path):
        made["security"] = _KEYED
    return made


def _who(path: str, roles: frozenset[Role]) -> str:
    if is_open(path):
        return "everybody, without a key"
    named = [role.value for role in Role if role in roles and role is not Role.UNAUTHENTICATED]
    if not for_users(path):
        named = [name for name in named if name != Role.FRONTEND]
        return f"keys of {' and '.join(named)}"
    return "backend and admin keys; front-end keys for a signed user"


def _operation_id(method: str, path: str) -> str:
    words = [method.lower(), *(part.strip("{}").replace(".", "_") for part in path.split("/") if part)]
    return "_".join(words) + ("_page" if path.endswith("/") else "")


def _names_in(path: str) -> list[str]:
    return [part.strip("{}") for part in path.split("/") if part.startswith("{")]


def _path_parameter(name: str, description: Description) -> dict[str, Any]:
    schema = description.path_schemas.get(name, {"type": "string", "minLength": 1})
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.location,
        "required": parameter.required,
        "description": parameter.description,
        "schema": parameter.schema,
    }


def _body_schema(body: JsonBody) -> Schema:
    """The schema of the struct, with what the handler checks beyond it."""
    (_,), components = msgspec.json.schema_components([body.struct])
    schema: Schema = dict(components[body.struct.__name__])
    properties = {**schema["properties"], **body.checks}
    if not set(body.checks) <= set(schema["properties"]):
        raise DescriptionError(f"{body.struct.__name__} has no field {sorted(body.checks)}")
    required = [*schema.get("required", ()), *body.required]
    made: Schema = {"type": "object", "properties": properties, **body.extra}
    if "additionalProperties" in schema:
        made["additionalProperties"] = schema["additionalProperties"]
    return {**made, "required": required} if required else made


def _responses(description: Description) -> dict[str, Any]:
    made = {str(description.status): _response(description, description.status, description.response)}
    for status, schema in description.other_responses.items():
        made[str(status)] = _response(description, status, schema)
    for status, sentences in sorted(error_texts(description).items()):
        made[str(status)] = {
            "description": _STATUS_TEXTS[status],
            "headers": _response_headers(status),
            "content": {
                "application/json": {
                    "schema": ref("Error"),
                    "examples": {
                        _example_name(sentence): {"value": {"error": sentence}} for sentence in dict.fromkeys(sentences)
                    },
                },
                # Errors of the checks before routing are JSON everywhere. The viewer's own errors are pages.
                **({"text/html": {"schema": {"type": "string"}}} if description.tag == "viewer" else {}),
            },
        }
    return made


def error_texts(description: Description) -> dict[int, tuple[str, ...]]:
    """The sentences of all errors by status: those of the operation, and those of the checks before it."""
    path = documented_path(description)
    found: dict[int, list[str]] = {
        status: list(sentences) for status, sentences in description.errors.items() if sentences
    }

    def add(status: int, *sentences: str) -> None:
        found.setdefault(status, []).extend(sentences)

    add(400, "the header x-api-key is sent twice")
    add(403, FORBIDDEN)
    add(429, RATE_LIMITED)
    add(500, INTERNAL)
    if not is_open(path):
        add(401, UNAUTHORIZED, *((MISSING_SIGNATURE, INVALID_SIGNATURE) if for_users(path) else ()))
    if "disk" in description.needs:
        add(503, "the store's disk is not available now")
    if "key service" in description.needs:
        add(503, "the key service is not available now")
    if description.body is not None:
        if not any(sentence.startswith("invalid ") for sentence in found[400]):
            add(400, INVALID_JSON)
        add(413, TOO_LARGE)
    if description.form is not None or any(parameter.location == "query" for parameter in description.parameters):
        add(400, REPEATED_PARAMETER, INVALID_ENCODING)
    if for_users(path) and any(parameter.name == "author" for parameter in description.parameters):
        add(400, AUTHOR_TOO_LONG, AUTHOR_CONTROL_CHARACTER)
        add(403, OTHER_AUTHOR_IN_QUERY)
    return {status: tuple(sentences) for status, sentences in found.items()}


def _response(description: Description, status: int, schema: Schema | None) -> dict[str, Any]:
    made: dict[str, Any] = {"description": _STATUS_TEXTS[status], "headers": _response_headers(status)}
    if schema is not None:
        made["content"] = {description.content_type: {"schema": schema}}
    return made


def _response_headers(status: int) -> dict[str, Any]:
    headers = (REQUEST_ID, _HEADERS[status]) if status in _HEADERS else (REQUEST_ID,)
    return {
        header.name: {"description": header.description, "required": header.required, "schema": header.schema}
        for header in headers
    }


def _example_name(sentence: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in sentence).strip("_")[:60]


class _Dumper(yaml.SafeDumper):
    """Writes no anchors: every part stands where it belongs, for readers and for simple parsers."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def as_yaml(document: dict[str, Any]) -> bytes:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, encoding="utf-8")
