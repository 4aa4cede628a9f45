"""The HTTP/1.1 engine: bounded, zeroing, one reading of every request. The trust boundary of the key service.

Rules of the room; docs/spec/http.md is the specification:
1. The application gets only complete requests that have exactly one possible reading. The engine refuses everything
   that is malformed, ambiguous or beyond a bound with a 4xx, and ends the connection, because its framing is no longer
   certain.
2. A named constant in `limits` bounds everything that a peer can make grow or wait.
3. Received bytes stay in the engine's memory, which it zeroes; it never copies a body with Content-Length.
4. Answers leave in the order of the requests, at the end of the event-loop turn, after `Application.commit`.
5. The engine knows bytes and HTTP. The application (`exchange.Application`) authorises.

Modules, each importing only earlier ones: `limits` (bounds and refusals), `head` (heads and query strings), `reader`
(receiving, chunked bodies, complete requests), `exchange` (requests, answers), `routing` (path and method),
`connection`, `server`, `tls`, `accepting`, `page`. `limits`, `head` and `reader` are pure: no socket and no clock. The
room must never import the daemon or the service: any process can serve an application of its own with it.
"""

from minikms.http.exchange import (
    Application,
    GroupFull,
    HttpRequest,
    Link,
    Response,
    S,
    error_response,
    raised_response,
)
from minikms.http.head import ParsedHead, parse_query
from minikms.http.limits import LIMITS, TOO_MANY_CONNECTIONS, Limits, Refusal
from minikms.http.routing import Routes, no_route, path_id
from minikms.http.server import HttpServer

__all__ = [
    "LIMITS",
    "TOO_MANY_CONNECTIONS",
    "Application",
    "GroupFull",
    "HttpRequest",
    "HttpServer",
    "Limits",
    "Link",
    "ParsedHead",
    "Refusal",
    "Response",
    "Routes",
    "S",
    "error_response",
    "no_route",
    "parse_query",
    "path_id",
    "raised_response",
]
