"""The API's documentation: `/openapi.yaml`, and `/docs/` for people; `/` leads to it.

Owns: these responses and the page's style. The document and the page are made on the first request for them.
Invariants: the page is made on the server and loads only its own style, from this server; its policy forbids the
browser anything else. Neither needs a key: nothing in them is a secret.
"""

from __future__ import annotations

from functools import cached_property
from importlib import metadata
from typing import Any, Final

from progressdb_server.api.http.request import Request
from progressdb_server.api.http.response import Response, redirect
from progressdb_server.api.openapi import document as openapi
from progressdb_server.api.openapi.description import NOTHING, TEXT
from progressdb_server.api.routes import pages
from progressdb_server.api.routes.table import Operation


def with_documentation(operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """The table, and the operations that document all of it, including themselves."""
    documentation = Documentation()
    own = (
        Operation(
            "GET",
            "/",
            documentation.root,
            tag="documentation",
            summary="A browser to the viewer, a program to this document",
            status=303,
            needs=NOTHING,
        ),
        Operation(
            "GET",
            "/openapi.yaml",
            documentation.document,
            tag="documentation",
            summary="Read this document",
            response={"type": "object"},
            content_type=openapi.CONTENT_TYPE,
            needs=NOTHING,
        ),
        Operation(
            "GET",
            "/docs",
            documentation.to_page,
            tag="documentation",
            summary="Redirect to `/docs/`",
            status=308,
            needs=NOTHING,
        ),
        Operation(
            "GET",
            "/docs/",
            documentation.page,
            tag="documentation",
            summary="Read this document as a web page",
            response=TEXT,
            content_type="text/html",
            needs=NOTHING,
        ),
        Operation(
            "GET",
            "/docs/style.css",
            documentation.style,
            tag="documentation",
            summary="The style sheet of the page",
            response=TEXT,
            content_type="text/css",
            needs=NOTHING,
        ),
    )
    documentation.operations = (*operations, *own)
    return documentation.operations


class Documentation:
    def __init__(self) -> None:
        self.operations: tuple[Operation, ...] = ()

    async def root(self, request: Request) -> Response:
        """To /viewer/ if the request accepts `text/html`, else to /openapi.yaml."""
        accepted = request.headers.get(b"accept", b"").lower()
        place = "/viewer/" if b"text/html" in accepted else "/openapi.yaml"
        return redirect(303, place, ((b"vary", b"accept"),))

    async def document(self, request: Request) -> Response:
        """OpenAPI 3.1 as YAML (RFC 9512)."""
        return Response(200, self._yaml, (b"content-type", openapi.CONTENT_TYPE.encode("ascii")))

    async def page(self, request: Request) -> Response:
        return pages.page_response(self._page)

    async def to_page(self, request: Request) -> Response:
        return redirect(308, "/docs/")

    async def style(self, request: Request) -> Response:
        return pages.asset_response("style.css")

    @cached_property
    def _document(self) -> dict[str, Any]:
        return openapi.document(self.operations, metadata.version("progressdb-minikms"))

    @cached_property
    def _yaml(self) -> bytes:
        return openapi.as_yaml(self._document)

    @cached_property
    def _page(self) -> str:
        by_tag: dict[str, list[dict[str, Any]]] = {tag["name"]: [] for tag in self._document["tags"]}
        for path, methods in self._document["paths"].items():
            for method, operation in methods.items():
                by_tag[operation["tags"][0]].append({"method": method.upper(), "path": path, **operation})
        return pages.render("docs.html", document=self._document, by_tag=by_tag, shape=shape)


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
