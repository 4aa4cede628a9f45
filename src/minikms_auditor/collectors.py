"""Collectors over HTTP: batches of JSON lines, and the HTTP Event Collector of Splunk.

Owns: the request of a batch, and what an answer means. Invariants: a batch counts as stored by a 2xx answer, at Splunk
only once its indexers have acknowledged it; only an answer that blames the content refuses a line. It must never log
a token, or send one over plain HTTP to another host.
"""

from __future__ import annotations

import gzip
import re
import time
import uuid
from collections.abc import Sequence
from typing import Final

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import StartError
from minikms.processes.http_client import HttpAnswer, HttpClient
from minikms.processes.tls_files import client_context
from minikms_auditor.config import AuditorFiles, HttpSink, SplunkSink
from minikms_auditor.sinks import BatchRefusedError, LaterError, SinkMessage, Transport

EXCHANGE_SECONDS_MAX: Final = 30.0
ACKNOWLEDGED_SECONDS_MAX: Final = 300.0
"""After this time without an acknowledgement a batch is sent again."""
POLL_SECONDS: Final = 1.0
TOKEN_BYTES_MAX: Final = 4096
_TOKEN: Final = re.compile(rb"[!-~]+")
_REFUSES_CONTENT: Final = frozenset({400, 413, 422})
_SPLUNK_REFUSES_CONTENT: Final = frozenset({6, 12, 13, 15})
"""Codes of Splunk: invalid data format, event missing, event blank, indexed fields. All others blame the request."""
_GZIP_LEVEL: Final = 6


class Collector(Transport):
    """JSON lines with a bearer token."""

    scheme = "Bearer"
    content_type = "application/x-ndjson"

    def __init__(self, sink: HttpSink | SplunkSink, files: AuditorFiles) -> None:
        context = client_context(files, ca=sink.ca, cert=sink.cert, key=sink.key) if sink.has_tls else None
        self._http = HttpClient(sink.url, context, agent="minikms-auditor")
        self._headers = {"Content-Type": self.content_type, "Content-Encoding": "gzip"}
        if sink.token:
            self._headers["Authorization"] = f"{self.scheme} {_token(files, sink.token)}"

    def deliver(self, messages: Sequence[SinkMessage]) -> None:
        answer = self._post(self._http.target, b"".join([each.body + b"\n" for each in messages]))
        if not 200 <= answer.status < 300:
            raise self._failure(answer)

    def _post(self, target: str, body: bytes) -> HttpAnswer:
        content = gzip.compress(body, _GZIP_LEVEL, mtime=0)
        return self._http.post(target, content, self._headers, time.monotonic() + EXCHANGE_SECONDS_MAX)

    def _failure(self, answer: HttpAnswer) -> Exception:
        if answer.status in _REFUSES_CONTENT:
            return BatchRefusedError(f"it answers {answer.status}")
        return LaterError(f"it answers {answer.status}", answer.retry_after)


class _SplunkAnswer(msgspec.Struct):
    code: int = 0
    ackId: int | None = None
    acks: dict[str, bool] = {}


class SplunkCollector(Collector):
    """The HTTP Event Collector, whose token must have indexer acknowledgement."""

    scheme = "Splunk"
    content_type = "application/json"

    def __init__(
        self,
        sink: SplunkSink,
        files: AuditorFiles,
        *,
        acknowledged_seconds: float = ACKNOWLEDGED_SECONDS_MAX,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        super().__init__(sink, files)
        self._acknowledged_seconds = acknowledged_seconds
        self._poll_seconds = poll_seconds
        # Acknowledgements are counted for a channel, which one client has for itself.
        self._headers["X-Splunk-Request-Channel"] = str(uuid.uuid4())

    def deliver(self, messages: Sequence[SinkMessage]) -> None:
        answer = self._post("/services/collector/event", b"".join([_event(each) for each in messages]))
        content = _decoded(answer)
        if answer.status != 200:
            raise self._failure(answer)
        if content.ackId is None:
            raise LaterError("its token has no indexer acknowledgement: enable it (useACK)")
        ends_s = time.monotonic() + self._acknowledged_seconds
        request = msgspec.json.encode({"acks": [content.ackId]})
        while True:
            answer = self._post("/services/collector/ack", request)
            if answer.status != 200:
                raise LaterError(f"it answers {answer.status} to a question for an acknowledgement")
            if _decoded(answer).acks.get(str(content.ackId)):
                return
            if time.monotonic() >= ends_s:
                raise LaterError("it has not acknowledged what it was sent")
            time.sleep(self._poll_seconds)

    def _failure(self, answer: HttpAnswer) -> Exception:
        code = _decoded(answer).code
        if answer.status == 413 or (answer.status == 400 and code in _SPLUNK_REFUSES_CONTENT):
            return BatchRefusedError(f"it answers {answer.status} with the code {code}")
        return LaterError(f"it answers {answer.status} with the code {code}", answer.retry_after)


def _event(message: SinkMessage) -> bytes:
    """RFC 8259 allows no comma between events, and Splunk wants none."""
    seconds, rest_ns = divmod(message.event.ts, 1_000_000_000)
    head = b'{"time":%d.%06d,"source":"minikms","sourcetype":"minikms:audit","event":' % (seconds, rest_ns // 1000)
    return head + message.body + b"}\n"


def _decoded(answer: HttpAnswer) -> _SplunkAnswer:
    """Empty for one that is none."""
    try:
        return msgspec.json.decode(answer.body, type=_SplunkAnswer)
    except UNDECODABLE:
        return _SplunkAnswer()


def _token(files: AuditorFiles, text: str) -> str:
    files.check_private(text, "token")
    token = files.read(text, "token", TOKEN_BYTES_MAX).strip()
    if _TOKEN.fullmatch(token) is None:
        raise StartError(f"the token {files.path(text)} is not one line of printable ASCII")
    return token.decode("ascii")
