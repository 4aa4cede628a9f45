"""The API's documentation as the server gives it out: `/openapi.yaml`, and `/docs/` for people.

Owns: the two answers and the page's style; both are made once, when first asked for. Invariants: the page is made on
the server from the document and loads nothing but its own style, from this server; its policy forbids the browser
anything else. It must never need a key: nothing in it is a secret.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any, Final

from progressdb_server.api.http.request import Call
from progressdb_server.api.http.response import Answer
from progressdb_server.api.openapi import document as openapi
from progressdb_server.api.openapi.described import DESCRIBED
from progressdb_server.api.openapi.described_backup import BACKUP_DESCRIBED
from progressdb_server.api.openapi.described_jobs import JOBS_DESCRIBED
from progressdb_server.api.openapi.described_viewer import VIEWER_DESCRIBED
from progressdb_server.api.routes import pages
from progressdb_server.api.routes.table import Operation, Resource

ALL_DESCRIBED: Final = {**DESCRIBED, **JOBS_DESCRIBED, **BACKUP_DESCRIBED, **VIEWER_DESCRIBED}


def with_documentation(resources: tuple[Resource, ...]) -> tuple[Resource, ...]:
    """The table of routes and, beside it, the routes that describe the whole of it."""
    documentation = Documentation()
    own = (
        Resource("/openapi.yaml", {"GET": Operation(documentation.document)}),
        Resource("/docs", {"GET": Operation(documentation.to_page)}),
        Resource("/docs/", {"GET": Operation(documentation.page)}),
        Resource("/docs/style.css", {"GET": Operation(documentation.style)}),
    )
    documentation.resources = (*resources, *own)
    return documentation.resources


class Documentation:
    def __init__(self) -> None:
        self.resources: tuple[Resource, ...] = ()

    async def document(self, call: Call) -> Answer:
        """OpenAPI 3.1 as YAML (RFC 9512)."""
        return Answer(200, _yaml(self.resources), (b"content-type", openapi.CONTENT_TYPE.encode("ascii")))

    async def page(self, call: Call) -> Answer:
        return pages.answer(_page(self.resources))

    async def to_page(self, call: Call) -> Answer:
        return Answer(308, content_type=None, headers=((b"location", b"/docs/"), (b"content-length", b"0")))

    async def style(self, call: Call) -> Answer:
        return pages.asset("style.css")


@cache
def _document(resources: tuple[Resource, ...]) -> dict[str, Any]:
    """Raises UndescribedError."""
    return openapi.document(resources, ALL_DESCRIBED, metadata.version("progressdb-minikms"))


@cache
def _yaml(resources: tuple[Resource, ...]) -> bytes:
    return openapi.as_yaml(_document(resources))


@cache
def _page(resources: tuple[Resource, ...]) -> str:
    document = _document(resources)
    by_tag: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            by_tag[operation["tags"][0]].append({"method": method.upper(), "path": path, **operation})
    return pages.rendered("docs.html", document=document, by_tag=by_tag, shape=shape)


_BOUNDS: Final = {"maxLength": "at most {} bytes", "minimum": "{} or more", "maxProperties": "at most {} entries"}


def shape(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if schema.get("type") == "array":
        return f"list of {shape(schema['items'])}"
    if "enum" in schema:
        return " or ".join(str(value) for value in schema["enum"])
    kinds = schema.get("type", "any JSON")
    words = [" or ".join(kinds) if isinstance(kinds, list) else str(kinds)]
    words += [text.format(schema[name]) for name, text in _BOUNDS.items() if name in schema]
    return ", ".join(words)
