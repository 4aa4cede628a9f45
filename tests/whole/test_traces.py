"""Traces of requests, as a collector of OpenTelemetry gets them from server and gateway."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minikms
from minikms.api.errors import StartError
from minikms.processes.tracing import from_environment
from tests import needs
from tests.harness import forked
from tests.harness.gateways import Pair
from tests.harness.waiting import wait_until
from tests.progressdb_server.api.real_server import real_server

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
"""Those of the example in W3C Trace Context."""


class Collector:
    """An OTLP/HTTP receiver: keeps the spans, by name."""

    def __init__(self) -> None:
        needs.library("opentelemetry.sdk")
        self.parse = needs.library("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
        self.spans: list[Any] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                sent = collector.parse.ExportTraceServiceRequest.FromString(body)
                for resource in sent.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *values: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2",  # seconds that a stop waits for a collector that is away
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def said(span: Any) -> dict[str, Any]:
    return {one.key: one.value.string_value or one.value.int_value for one in span.attributes}


def test_a_request_is_a_span_and_its_exchange_a_child(tmp_path: Path, collector: Collector) -> None:
    with real_server(tmp_path, environment=collector.environment) as server:
        server("POST", "/v1/threads/t1/messages", {"author": "ada", "body": "private"})
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "traced-1"}
        assert server("GET", "/v1/messages?thread=t1", headers=headers).status == 200
        assert server("GET", "/v1/messages/nothing", headers={"traceparent": "00-nonsense"}).status == 404
        wait_until(lambda: len(collector.named("GET /v1/messages/{message}")) == 1)
        wait_until(lambda: len(collector.named("GET /v1/messages")) == 1)
        (span,) = collector.named("GET /v1/messages")
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
        assert said(span)["progressdb.request_id"] == "traced-1"
        assert said(span)["http.response.status_code"] == 200
        (child,) = [one for one in collector.spans if one.parent_span_id == span.span_id]
        assert child.name == "minikms decrypt_batch"
        found = forked.run("minikms", "audit", "find", "--data-dir", server.db / "kms", "--request", "traced-1")
        assert "decrypt_batch" in found.stdout, "the audit line has the request id of the span"
        (stray,) = collector.named("GET /v1/messages/{message}")
        assert stray.parent_span_id == b"", "what is no traceparent names no parent"
        for one in collector.spans:
            assert b"private" not in one.SerializeToString() and b"t1" not in one.SerializeToString()


def test_a_collector_that_is_away_holds_up_nothing(tmp_path: Path, collector: Collector) -> None:
    collector.close()
    with real_server(tmp_path, environment=collector.environment) as server:
        assert server("POST", "/v1/threads/t1/messages", {"author": "ada", "body": 1}).status == 200
        assert server("GET", "/v1/messages?thread=t1").status == 200


def test_the_gateway_makes_a_span_with_the_exchange_as_its_child(
    tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.root()
    for name, value in collector.environment.items():
        monkeypatch.setenv(name, value)
    with Pair(forked=False) as pair:
        cert, key = pair.gateway.authority.issue(uris=["spiffe://prod/chat/api"]).write(tmp_path)
        url = f"https://localhost:{pair.gateway.port}"
        with minikms.Client(url, ca=pair.gateway.ca_file, cert=cert, key=key) as client:
            client.create_dek_for_thread("t1", request_id="traced-2")
        wait_until(lambda: len(collector.named("create_dek")) == 1)
        (span,) = collector.named("create_dek")
        (child,) = [one for one in collector.spans if one.parent_span_id == span.span_id]
        assert child.name == "minikms create_dek"


def test_traces_are_off_unless_the_environment_asks_for_them() -> None:
    for off in ({}, {"OTEL_TRACES_EXPORTER": ""}, {"OTEL_TRACES_EXPORTER": "none"}):
        assert from_environment("x", off) is None
    with pytest.raises(StartError, match="`otlp` or `none`"):
        from_environment("x", {"OTEL_TRACES_EXPORTER": "zipkin"})
