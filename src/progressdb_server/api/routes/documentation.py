"""The API's documentation: `/openapi.yaml`, and `/docs/` for people; `/` leads to it.

Owns: these responses and the page's style. The document and the page are made on the first request for them.
Invariants: the page is made on the server and loads only its own style, from this server; its policy forbids the
browser anything else. Neither needs a key: nothing in them is a secret.
"""

from __future__ import annotations

from functools import cached_property
from importlib import metadata
from typing import Any, Final

from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import ApiResponse, redirect
from progressdb_server.api.openapi import document as openapi
from progressdb_server.api.openapi.description import NOTHING, TEXT, Operation, operations_of
from progressdb_server.api.routes import pages


def with_documentation(operations: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """The table, and the operations that document all of it, including themselves."""
    documentation = Documentation()
    documentation.operations = (*operations, *operations_of(documentation))
    return documentation.operations


class Documentation:
    def __init__(self) -> None:
        self.operations: tuple[Operation, ...] = ()

    @Operation("GET", "/", status=303, needs=NOTHING)
    async def root(self, request: ApiRequest) -> ApiResponse:
        """Redirect a browser to the viewer, and a program to this document."""
        accepted = request.headers.get(b"accept", b"").lower()
        place = "/viewer/" if b"text/html" in accepted else "/openapi.yaml"
        return redirect(303, place, ((b"vary", b"accept"),))

    @Operation("GET", "/openapi.yaml", response={"type": "object"}, content_type=openapi.CONTENT_TYPE, needs=NOTHING)
    async def document(self, request: ApiRequest) -> ApiResponse:
        """Read this document."""
        return ApiResponse(200, self._yaml, (b"content-type", openapi.CONTENT_TYPE.encode("ascii")))

    @Operation("GET", "/docs/", response=TEXT, content_type="text/html", needs=NOTHING)
    async def page(self, request: ApiRequest) -> ApiResponse:
        """Read this document as a web page."""
        return pages.page_response(self._page)

    @Operation("GET", "/docs", status=308, needs=NOTHING)
    async def to_page(self, request: ApiRequest) -> ApiResponse:
        """Redirect to `/docs/`."""
        return redirect(308, "/docs/")

    @Operation("GET", "/docs/style.css", response=TEXT, content_type="text/css", needs=NOTHING)
    async def style(self, request: ApiRequest) -> ApiResponse:
        """Read the style sheet of the page."""
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
