"""Small applications for listeners of their own, such as the metrics of a process beside the key service.

Owns: what such a listener answers, and its limits. A page must never answer anything but its `GET`.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from minikms import api
from minikms.http.exchange import HttpRequest, Link, Response, error_response
from minikms.http.head import ParsedHead
from minikms.http.limits import Limits
from minikms.platform import process_metrics

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

CONNECTIONS_MAX: Final = 16
PAGE_LIMITS: Final = Limits(connections_max=CONNECTIONS_MAX, body_bytes_max=0)
METRICS_PATH: Final = "/metrics"


class SmallApplication:
    """What an application of the engine (see `minikms.http`) leaves as it is, if it has no state of its own."""

    def open_session(self, sock: socket.socket, tls: ssl.SSLObject | None, link: Link) -> int | None:
        return sock.fileno()

    def group(self, session: int) -> int:
        return 0

    def may_stay(self, session: int) -> bool:
        return True

    def admit(self, session: int, head: ParsedHead) -> Response | None:
        return None

    def refused(self, session: int | None, status: int, code: str) -> None:
        """Nothing to count."""

    def commit(self) -> bool:
        return True

    def close_session(self, session: int) -> None:
        """Nothing was opened."""


class PageApplication(SmallApplication):
    """`page` makes the page for each request."""

    def __init__(self, path: str, page: Callable[[], bytes], content_type: str) -> None:
        self._path = path
        self._content_type = content_type
        self.page = page

    def handle(self, session: int, request: HttpRequest) -> Response:
        if (request.method, request.path) != ("GET", self._path):
            return error_response(404, api.CODE_NOT_FOUND, f"ask for {self._path}")
        return Response(200, self.page(), content_type=self._content_type)


def metrics_page(collector: Collector, build_info: str) -> PageApplication:
    """The metrics of `collector` and of this process (`process_metrics`) in the text format of Prometheus."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    registry.register(process_metrics.collector(build_info))
    return PageApplication(METRICS_PATH, lambda: generate_latest(registry), CONTENT_TYPE_LATEST)
