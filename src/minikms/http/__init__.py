"""The HTTP/1.1 engine of the daemon: the trust boundary of the key service.

Rules of the whole package; each module states its own part, docs/spec/http.md is the specification:
1. Nothing reaches the application but whole requests with exactly one possible reading. What is malformed, ambiguous or
   beyond a bound gets 4xx, and the connection ends, because its framing is no longer certain.
2. Everything a peer can make grow or wait is bounded by a named constant (`limits`).
3. Received bytes are handled in the engine's own memory and zeroed; an identity body is never copied.
4. Answers leave in the order of the requests, at the end of the event-loop turn, after the application has committed.
5. The engine knows bytes and HTTP; who may do what is the application's (`exchange.Application`).

Modules, each importing only those before it: `limits`, `refusals`, `receive`, `chunked`, `head`, `query`, `reader`,
`exchange`, `encode`, `connection`, `server`. Up to `reader` all is pure: bytes in, values out, no socket and no clock.
"""

from minikms.http.exchange import Application, Request, Response, S, error_response, raised_response
from minikms.http.head import ParsedHead, parse_query
from minikms.http.limits import LIMITS, Limits
from minikms.http.server import HttpServer

__all__ = [
    "LIMITS",
    "Application",
    "HttpServer",
    "Limits",
    "ParsedHead",
    "Request",
    "Response",
    "S",
    "error_response",
    "parse_query",
    "raised_response",
]
