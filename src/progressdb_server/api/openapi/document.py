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

from progressdb_server.api.gate import limits
from progressdb_server.api.gate.access import PROBE_PATHS, for_users, is_open
from progressdb_server.api.gate.errors import (
    AUTHOR_CONTROL_CHARACTER,
    AUTHOR_TOO_LONG,
    BODIES_FULL,
    FORBIDDEN,
    HEAD_TOO_LARGE,
    INTERNAL,
    INVALID_ENCODING,
    INVALID_IDEMPOTENCY_KEY,
    INVALID_JSON,
    INVALID_SIGNATURE,
    MISSING_SIGNATURE,
    OTHER_AUTHOR_IN_BODY,
    OTHER_AUTHOR_IN_QUERY,
    RATE_LIMITED,
    REPEATED_PARAMETER,
    TOO_LARGE,
    UNAUTHORIZED,
)
from progressdb_server.api.gate.keys import Role
from progressdb_server.api.openapi.description import (
    CALLER,
    IDEMPOTENCY,
    PATH_SCHEMAS,
    JsonBody,
    Operation,
    Parameter,
    Schema,
    ref,
)
from progressdb_server.http.limits import HEAD_BYTES_MAX, HEADERS_COUNT_MAX, REQUEST_BYTES_MAX
from progressdb_server.kms.provider import SEALED
from progressdb_server.store.model import IdempotencyConflictError, Message, Thread

CONTENT_TYPE: Final = "application/yaml"

_INFO: Final = """\
Stores threads and messages. Bodies, titles and reactions are encrypted at rest. Each thread has its own key.

Each response has the header `X-Request-Id`. It holds the id that the caller sent, if that is 1 to 128 characters of
`[A-Za-z0-9._:/+=-]`, otherwise a new id. The logs of both processes and the audit log of the key service contain it.

Every path responds to `OPTIONS` with 204; this needs no key. The response to a method that is not listed here is 405
with the header `Allow`, and the response to an unknown path is 404. The response to a malformed HTTP request is 400
`malformed HTTP request`. The response to a request head of more than {head} bytes or {headers} headers is 431
`request head too large`. After these two errors the server closes the connection.

A list of more than {list_} bytes is streamed. If the stream fails, the client receives incomplete JSON.
"""
_TAGS: Final = {
    "threads": "Conversations. Only its author may read, change or delete a thread, and name its members.",
    "messages": "The messages of a thread, by its members. Every change appends a new version.",
    "reactions": "Reactions to a message. Each identity has at most one.",
    "users": "Signatures with which a front end acts for a user.",
    "operators": "Health, metrics, stored values, key rotations and backups.",
    "documentation": "This document. No key is needed.",
    "viewer": "Web pages for administrators. They log in with an admin key.",
}
_BODY_BOUND: Final = "At most {} bytes; a longer body is a 413."
REQUEST_ID: Final = Parameter(
    "X-Request-Id",
    {"type": "string", "pattern": r"^[A-Za-z0-9._:/+=-]{1,128}$"},
    "The id of the request. All logs contain it.",
    "header",
    required=True,
)
_RETRY_AFTER: Final = Parameter(
    "Retry-After",
    {"type": "integer", "minimum": 1},
    "Seconds to wait before the next request.",
    "header",
    required=True,
)
_LOCATION: Final = Parameter("Location", {"type": "string"}, "The address of the page.", "header", required=True)
_HEADERS: Final = {
    303: _LOCATION,
    308: _LOCATION,
    401: Parameter(
        "WWW-Authenticate", {"type": "string"}, "The authentication scheme to use.", "header", required=True
    ),
    429: _RETRY_AFTER,
    503: _RETRY_AFTER,
}
_STATUS_TEXTS: Final = {
    200: "Success.",
    202: "Accepted. The work continues in the background.",
    204: "Success. The response has no body.",
    303: "Redirect to another page.",
    304: "The list has not changed since the response whose `ETag` the request names. The response has no body.",
    308: "Permanent redirect.",
    400: "The request is malformed or exceeds a limit.",
    401: "The API key is missing or unknown, or the signature of the user id is missing or wrong.",
    403: "The caller is not allowed to do this.",
    404: "The resource does not exist.",
    409: "The request conflicts with an earlier request or with the state of the resource.",
    413: "The request body is too large or has too many values.",
    429: "Too many requests of this user with this key, or too many refused requests from this address.",
    431: "The head of the request is too large. The server closes the connection.",
    500: "A stored record can't be read, or the server failed. The server's log has an entry with the request id.",
    503: "The server can't serve the request now. Send it again after `Retry-After` seconds.",
}


class DescriptionError(Exception):
    """A description contradicts the code that it describes."""


def document(operations: Iterable[Operation], version: str) -> dict[str, Any]:
    """Makes the document. Raises DescriptionError if a description names a property that its struct does not have."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(documented_path(operation), {})[operation.method.lower()] = _operation(operation)
    paths = {path: dict(sorted(methods.items())) for path, methods in paths.items()}
    tags = {described["tags"][0] for methods in paths.values() for described in methods.values()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ProgressDB",
            "version": version,
            "description": _INFO.format(
                head=HEAD_BYTES_MAX, headers=HEADERS_COUNT_MAX, list_=limits.LIST_BUFFER_BYTES_MAX
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
    "bearer": {"type": "http", "scheme": "bearer", "description": "The API key as a bearer token."},
    "userSignature": {
        "type": "apiKey",
        "in": "header",
        "name": "X-User-Signature",
        "description": "HMAC-SHA-256 of the user id in `X-User-ID`, with a backend API key as the HMAC key, in "
        "lower-case hex. Requests with a front-end key must have it.",
    },
    "viewerSession": {"type": "apiKey", "in": "cookie", "name": "progressdb_viewer"},
}
_KEYED: Final[list[dict[str, list[str]]]] = [{"apiKey": []}, {"bearer": []}]
_SIGNED_OR_NOT: Final = [*_KEYED, {"apiKey": [], "userSignature": []}, {"bearer": [], "userSignature": []}]


def _schemas() -> dict[str, Any]:
    _, components = msgspec.json.schema_components([Message, Thread])
    for name, what in (
        ("Message", "One version of a message. In a list, `error` is the error code of a version that can't be read."),
        ("Thread", "A thread. In a list, `error` is the error code of a thread that can't be read."),
    ):
        components[name]["description"] = f"{what} Times are Unix nanoseconds. An empty field is left out."
    error = {
        "type": "object",
        "properties": {"error": {"type": "string", "description": "What was wrong, as a sentence."}},
        "required": ["error"],
        "additionalProperties": False,
    }
    return {**components, "Error": error}


def documented_path(operation: Operation) -> str:
    """The path as OpenAPI writes it."""
    return operation.path.replace(":path}", "}")


def _operation(operation: Operation) -> dict[str, Any]:
    path = documented_path(operation)
    described: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": _operation_id(operation.method, path),
        "description": f"Allowed callers: {_who(path, operation.roles)}.",
    }
    names = [part.strip("{}") for part in path.split("/") if part.startswith("{")]
    parameters = [_path_parameter(name, operation) for name in names]
    parameters += [_parameter(parameter) for parameter in _taken(operation)]
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {
            "description": _BODY_BOUND.format(REQUEST_BYTES_MAX),
            "required": True,
            "content": {"application/json": {"schema": _body_schema(operation.body)}},
        }
    if operation.form is not None:
        described["requestBody"] = {
            "description": _BODY_BOUND.format(limits.FORM_BYTES_MAX),
            "required": True,
            "content": {"application/x-www-form-urlencoded": {"schema": operation.form}},
        }
    described["responses"] = _responses(operation)
    if is_open(path):
        described["security"] = [{"viewerSession": []}, {}] if operation.tag == "viewer" else []
    elif not for_users(path):
        described["security"] = _KEYED
    return described


def _who(path: str, roles: frozenset[Role]) -> str:
    if is_open(path):
        return "everyone; no API key is needed"
    named = [role.value for role in Role if role in roles and role is not Role.UNAUTHENTICATED]
    if not for_users(path):
        named = [name for name in named if name != Role.FRONTEND]
        return f"{' and '.join(named)} keys"
    return "backend and admin keys, and front-end keys with a signed user"


def _operation_id(method: str, path: str) -> str:
    words = [method.lower(), *(part.strip("{}").replace(".", "_") for part in path.split("/") if part)]
    return "_".join(words) + ("_page" if path.endswith("/") else "")


def _path_parameter(name: str, operation: Operation) -> dict[str, Any]:
    schema = operation.path_schemas.get(name) or PATH_SCHEMAS.get(name, {"type": "string", "minLength": 1})
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _taken(operation: Operation) -> tuple[Parameter, ...]:
    return (*CALLER, *operation.parameters) if for_users(operation.path) else operation.parameters


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
    body_schema: Schema = {"type": "object", "properties": properties, **body.extra}
    if "additionalProperties" in schema:
        body_schema["additionalProperties"] = schema["additionalProperties"]
    return {**body_schema, "required": required} if required else body_schema


def _responses(operation: Operation) -> dict[str, Any]:
    responses = {str(operation.status): _response(operation, operation.status, operation.response)}
    for status, schema in operation.other_responses.items():
        responses[str(status)] = _response(operation, status, schema)
    for status, sentences in sorted(error_texts(operation).items()):
        responses[str(status)] = {
            "description": _STATUS_TEXTS[status],
            "headers": _response_headers(status),
            "content": {
                "application/json": {
                    "schema": ref("Error"),
                    "examples": {
                        _example_name(sentence): {"value": {"error": sentence}} for sentence in dict.fromkeys(sentences)
                    },
                },
                # Under the viewer's path every error is a page, but for those of a request that could not be read.
                **({"text/html": {"schema": {"type": "string"}}} if operation.tag == "viewer" else {}),
            },
        }
    return responses


def error_texts(operation: Operation) -> dict[int, tuple[str, ...]]:
    """The sentences of all errors by status: those of the operation, and those of the checks before it."""
    path = documented_path(operation)
    texts: dict[int, list[str]] = {
        status: list(sentences) for status, sentences in operation.errors.items() if sentences
    }

    def add(status: int, *sentences: str) -> None:
        texts.setdefault(status, []).extend(sentences)

    for error in operation.raises:
        if isinstance(error, str):
            add(400, error)
        else:
            add(error.status, error.text)
    add(400, "the header x-api-key is sent twice")
    add(403, FORBIDDEN)
    add(431, HEAD_TOO_LARGE)
    if path not in PROBE_PATHS:
        add(429, RATE_LIMITED)
    add(500, INTERNAL)
    if not is_open(path):
        add(401, UNAUTHORIZED, *((MISSING_SIGNATURE, INVALID_SIGNATURE) if for_users(path) else ()))
    if "disk" in operation.needs:
        add(503, "the store's disk is not available now")
    if "key service" in operation.needs:
        add(503, "the key service is not available now", SEALED)
    if IDEMPOTENCY in operation.parameters:
        add(400, INVALID_IDEMPOTENCY_KEY)
        add(409, IdempotencyConflictError.text)
    if operation.body is not None:
        if "author" in operation.body.struct.__struct_fields__:
            add(403, OTHER_AUTHOR_IN_BODY)
        if not any(sentence.startswith("invalid ") for sentence in texts[400]):
            add(400, INVALID_JSON)
        add(413, TOO_LARGE)
        add(503, BODIES_FULL)
    if operation.form is not None or any(parameter.location == "query" for parameter in _taken(operation)):
        add(400, REPEATED_PARAMETER, INVALID_ENCODING)
    if for_users(path) and any(parameter.name == "author" for parameter in _taken(operation)):
        add(400, AUTHOR_TOO_LONG, AUTHOR_CONTROL_CHARACTER)
        add(403, OTHER_AUTHOR_IN_QUERY)
    return {status: tuple(sentences) for status, sentences in texts.items()}


def _response(operation: Operation, status: int, schema: Schema | None) -> dict[str, Any]:
    response: dict[str, Any] = {
        "description": _STATUS_TEXTS[status],
        "headers": _response_headers(status, *operation.headers),
    }
    if schema is not None:
        response["content"] = {operation.content_type: {"schema": schema}}
    return response


def _response_headers(status: int, *more: Parameter) -> dict[str, Any]:
    if status == 431:  # refused before it is a request
        return {}
    headers = (REQUEST_ID, *((_HEADERS[status],) if status in _HEADERS else ()), *more)
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
