"""Spans of OpenTelemetry, for processes beside the key service.

Owns: whether spans are made (the environment says so: `OTEL_TRACES_EXPORTER`), and what is in them. Invariants: a span
is made after its request has ended, from what was counted anyway, so a process without tracing does nothing more; a
span has fixed words, a status and the request id, which the audit line has too, and no id of a thread, key or caller;
what a client sends as `traceparent` is believed only as the identity of a span (W3C Trace Context, section 3.2). The
exporter drops spans when the collector is away. It must never hold up a request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from minikms.api.errors import StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

EXPORTER_VARIABLE: Final = "OTEL_TRACES_EXPORTER"
EXCHANGES_MAX: Final = 32
"""The exchanges of one request that have spans of their own."""
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)


class TracedExchange(NamedTuple):
    """An exchange with the key service, in Unix nanoseconds. `answered`: there was an answer."""

    verb: str
    began_ns: int
    ended_ns: int
    answered: bool


class Tracing:
    """Makes the spans of one process."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("progressdb-minikms")

    def request(
        self,
        name: str,
        *,
        traceparent: str | None,
        began_ns: int,
        ended_ns: int,
        failed: bool,
        attributes: Mapping[str, str | int],
        exchanges: Iterable[TracedExchange],
    ) -> None:
        """The span of a request, a child of the one that `traceparent` names, with the exchanges as its children."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        span = self._tracer.start_span(
            name, context=_parent(traceparent), kind=SpanKind.SERVER, attributes=dict(attributes), start_time=began_ns
        )
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for exchange in exchanges:
            child = self._tracer.start_span(
                f"minikms {exchange.verb}", context=inside, kind=SpanKind.CLIENT, start_time=exchange.began_ns
            )
            if not exchange.answered:
                child.set_status(Status(StatusCode.ERROR))
            child.end(exchange.ended_ns)
        span.end(ended_ns)

    def close(self) -> None:
        """Sends what is left, for a few seconds at most. Blocks."""
        self._provider.shutdown()


def _parent(traceparent: str | None) -> Any:
    """The context of a span elsewhere; an empty one for anything but a `traceparent` of version 00."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    match = None if traceparent is None else _TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return Context()
    trace_id, span_id, flags = (int(part, 16) for part in match.groups())
    remote = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags & 1))
    return set_span_in_context(NonRecordingSpan(remote), Context()) if remote.is_valid else Context()


def is_wanted(environment: Mapping[str, str]) -> bool:
    return environment.get(EXPORTER_VARIABLE, "") not in ("", "none")


def from_environment(service: str, environment: Mapping[str, str]) -> Tracing | None:
    """None unless OTEL_TRACES_EXPORTER is `otlp`. The SDK reads the other variables. Raises StartError."""
    if not is_wanted(environment):
        return None
    exporter = environment[EXPORTER_VARIABLE]
    if exporter != "otlp":
        raise StartError(f"{EXPORTER_VARIABLE} is `otlp` or `none`, not {exporter[:32]!r}")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise StartError(
            f"{EXPORTER_VARIABLE} asks for traces, which need more packages: pip install 'progressdb-minikms[tracing]'"
        ) from None
    name = environment.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)
