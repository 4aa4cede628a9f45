"""Pages for people: made on the server, escaped by default, and allowed to do next to nothing in a browser.

Owns: the templates' environment, the files that pages load, and the headers that every page carries. Invariants: what
a template inserts is escaped, always; a page may load styles, scripts and pictures from this server only, runs no
inline script, is in no frame and sends forms nowhere else; no page is kept by a cache.
It must never mark a text as safe.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Final

import jinja2

from progressdb_server.api.http.errors import Header
from progressdb_server.api.http.response import Answer

POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final[tuple[Header, ...]] = (
    (b"content-security-policy", POLICY.encode("ascii")),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    # with no referrer at all, browsers say `Origin: null` when they send a form
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


def rendered(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)


def answer(page: str, status: int = 200, headers: tuple[Header, ...] = ()) -> Answer:
    return Answer(status, page.encode(), (b"content-type", b"text/html; charset=utf-8"), (*HEADERS, *headers))


@cache
def asset(name: str) -> Answer:
    """A file that pages load. `name` is this code's own, never a client's."""
    content = resources.files(_PACKAGE).joinpath("templates", name).read_bytes()
    return Answer(200, content, (b"content-type", _TYPES[name.rpartition(".")[2]]), HEADERS)
