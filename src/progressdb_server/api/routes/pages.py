"""HTML pages: rendered on the server, escaped by default, with almost no rights in a browser.

Owns: the template environment, the files that pages load, and the headers of every page. Invariants: every value that a
template inserts is escaped; a page loads styles, scripts and pictures only from this server, runs no inline script, is
in no frame and submits forms only to this server; no cache keeps a page. It must never mark a text as safe.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Final

import jinja2

from progressdb_server.api.gate.response import ApiResponse
from progressdb_server.http.asgi import Header

POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final[tuple[Header, ...]] = (
    (b"content-security-policy", POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # With `no-referrer`, browsers would send `Origin: null` with a form.
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
_TYPES: Final = {"css": b"text/css; charset=utf-8", "js": b"text/javascript; charset=utf-8"}
_PACKAGE: Final = "progressdb_server.api"


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(_PACKAGE, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)


def page_response(page: str, status: int = 200, headers: tuple[Header, ...] = ()) -> ApiResponse:
    return ApiResponse(status, page.encode(), (b"content-type", b"text/html; charset=utf-8"), (*HEADERS, *headers))


@cache
def asset_response(name: str) -> ApiResponse:
    """A file that pages load. `name` comes from this code, never from a client."""
    content = resources.files(_PACKAGE).joinpath("templates", name).read_bytes()
    return ApiResponse(200, content, (b"content-type", _TYPES[name.rpartition(".")[2]]), HEADERS)
