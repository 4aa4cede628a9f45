"""The API's documentation: `/openapi.yaml`, and `/docs/` for people.

Owns: both responses and the page's style. The document and the page are made on the first request for them. Invariants:
the page is made on the server and loads only its own style, from this server; its policy forbids the browser anything
else. Neither needs a key: nothing in them is a secret.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import Any, Final

from progressdb_server.api.http.request import Request
from progressdb_server.api.http.response import Response, redirect
from progressdb_server.api.openapi import document as openapi
from progressdb_server.api.openapi.description import NOTHING, TEXT, Description
from progressdb_server.api.routes import pages
from progressdb_server.api.routes.table import Operation, Resource


def with_documentation(resources: tuple[Resource, ...]) -> tuple[Resource, ...]:
    """The table, and the operations that document all of it, including themselves."""
    documentation = Documentation()
    own = (
        Resource(
            "/openapi.yaml",
            {
                "GET": Operation(
                    documentation.document,
                    Description(
                        tag="documentation",
                        summary="This document",
                        response={"type": "object"},
                        content_type=openapi.CONTENT_TYPE,
                        needs=NOTHING,
                    ),
                )
            },
        ),
        Resource(
            "/docs",
            {
                "GET": Operation(
                    documentation.to_page,
                    Description(tag="documentation", summary="To /docs/", status=308, needs=NOTHING),
                )
            },
        ),
        Resource(
            "/docs/",
            {
                "GET": Operation(
                    documentation.page,
                    Description(
                        tag="documentation",
                        summary="This document as a page",
                        response=TEXT,
                        content_type="text/html",
                        needs=NOTHING,
                    ),
                )
            },
        ),
        Resource(
            "/docs/style.css",
            {
                "GET": Operation(
                    documentation.style,
                    Description(
                        tag="documentation",
                        summary="The page's style",
                        response=TEXT,
                        content_type="text/css",
                        needs=NOTHING,
                    ),
                )
            },
        ),
    )
    documentation.resources = (*resources, *own)
    return documentation.resources


class Documentation:
    def __init__(self) -> None:
        self.resources: tuple[Resource, ...] = ()

    async def document(self, request: Request) -> Response:
        """OpenAPI 3.1 as YAML (RFC 9512)."""
        return Response(200, _yaml(self.resources), (b"content-type", openapi.CONTENT_TYPE.encode("ascii")))

    async def page(self, request: Request) -> Response:
        return pages.page_response(_page(self.resources))

    async def to_page(self, request: Request) -> Response:
        return redirect(308, "/docs/")

    async def style(self, request: Request) -> Response:
        return pages.asset_response("style.css")


@cache
def _document(resources: tuple[Resource, ...]) -> dict[str, Any]:
    return openapi.document(resources, metadata.version("progressdb-minikms"))


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
    return pages.render("docs.html", document=document, by_tag=by_tag, shape=shape)


_BOUNDS: Final = {"maxLength": "at most {} bytes", "minimum": "{} or more", "maxProperties": "at most {} entries"}


def shape(schema: dict[str, Any]) -> str:
    """A short text for a schema."""
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
