"""Questions about the audit log, over a Unix socket: who used which key, when, with what outcome.

Owns: who may ask, the bounds of a question, and the line of this process's log about each. Invariants: the uid of the
peer is known before a byte of its question is parsed, and only configured ones are answered; one search runs
at a time, in a thread, for at most `SECONDS_MAX`; no answer leaves before its line is logged. It must never write
a file, or keep the steps of the auditor waiting.
"""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import msgspec

from minikms import api
from minikms.api.audit_questions import (
    LINES_MAX,
    NAMED_COUNT_MAX,
    PATH,
    QUESTION_BYTES_MAX,
    READS,
    SECONDS_MAX,
    THREAD_KEYS_MAX,
    AuditAnswer,
    AuditLine,
    AuditQuestion,
)
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsRefusedError
from minikms.audit.blocks import BLOCKS_NAME
from minikms.audit.queries import query, shows_every_creation
from minikms.audit.questions import Found, Search
from minikms.audit.record import Event
from minikms.http import HttpRequest, Limits, Link, Response, error_response
from minikms.http.page import SmallApplication
from minikms.platform.logs import Log
from minikms.platform.workers import in_worker
from minikms.processes.peer import is_overflow_uid, read_peer
from minikms_auditor.auditor import Auditor, Status
from minikms_auditor.config import Config, Questions

CONNECTIONS_MAX: Final = 16
WAITING_MAX: Final = 4
"""Questions, including the one that is being answered."""
QUESTION_LIMITS: Final = Limits(connections_max=CONNECTIONS_MAX, body_bytes_max=QUESTION_BYTES_MAX)
REFUSALS_PAUSE_SECONDS: Final = 60.0
"""Between two lines about peers that may not ask."""

_decode: Final = msgspec.json.Decoder(AuditQuestion).decode


class QuestionApplication(SmallApplication):
    """The application of the engine. A session is the uid of its peer."""

    def __init__(
        self,
        config: Config,
        questions: Questions,
        auditor: Auditor,
        *,
        status: Callable[[], Status],
        stopping: Callable[[], bool],
        log: Log,
    ) -> None:
        """`status`: of the last step."""
        self._log_dir = config.log_dir
        self._index = os.path.join(config.state_dir, BLOCKS_NAME)
        self._uids = questions.uids
        self._auditor = auditor
        self._status = status
        self._stopping = stopping
        self._log = log
        self._worker = ThreadPoolExecutor(1, "questions")
        self._waiting = 0
        self._refusals = 0
        self._refusals_s = float("-inf")

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    def open_session(self, sock: socket.socket, tls: ssl.SSLObject | None, link: Link) -> int | None:
        """None: the connection is closed at once, so that it takes no place of those who may ask."""
        try:
            uid = read_peer(sock).uid
        except OSError:
            return None
        if uid in self._uids and not is_overflow_uid(uid):
            return uid
        self._refusals += 1
        if time.monotonic() - self._refusals_s >= REFUSALS_PAUSE_SECONDS:
            self._log.warning("peer refused", uid=uid, count=self._refusals)
            self._refusals, self._refusals_s = 0, time.monotonic()
        return None

    def handle(self, session: int, request: HttpRequest) -> Response | Awaitable[bytes | Response]:
        if (request.method, request.path) != ("POST", PATH):
            return error_response(404, api.CODE_NOT_FOUND, f"ask for POST {PATH}")
        try:
            question = _decode(request.body)
        except UNDECODABLE as error:
            return error_response(400, api.CODE_INVALID_REQUEST, str(error))
        if question.thread_keys and not question.thread:
            return error_response(400, api.CODE_INVALID_REQUEST, "thread_keys are keys of a thread: give it too")
        if self._waiting >= WAITING_MAX:
            return error_response(503, api.CODE_TOO_MANY, "other questions wait already: ask again")
        self._waiting += 1
        return self._answer(session, question)

    async def _answer(self, uid: int, question: AuditQuestion) -> bytes | Response:
        members: dict[str, Any] = {name: value for name, value in msgspec.structs.asdict(question).items() if value}
        members["thread_keys"] = len(question.thread_keys)
        try:
            answer = await in_worker(self._worker, partial(self._search, question))
        except (KmsRefusedError, OSError) as error:
            why = str(getattr(error, "strerror", None) or error)
            self._log.warning("question failed", uid=uid, why=why, **members)
            return error_response(503, api.CODE_AUDIT_UNAVAILABLE, f"the audit log can't be read: {why}")
        finally:
            self._waiting -= 1
        self._log.info("question", uid=uid, lines=len(answer.lines), stopped=answer.stopped, **members)
        return msgspec.json.encode(answer)

    def _search(self, question: AuditQuestion) -> AuditAnswer:
        status, ends_s = self._status(), time.monotonic() + SECONDS_MAX
        sought = query(
            thread=question.thread,
            thread_keys=question.thread_keys,
            key=question.key,
            actor=question.actor,
            verb=question.verb,
            outcome=question.outcome,
            reads=question.verb == READS,
            since_ns=question.since_ns,
            until_ns=question.until_ns,
        )
        search = Search(
            directory=self._log_dir,
            index=self._index,
            sought=sought,
            before=question.before,
            count=LINES_MAX,
            is_late=lambda: self._stopping() or time.monotonic() >= ends_s,
        ).run()
        if search.stopped == "index":
            self._auditor.check_index = True
        return AuditAnswer(
            lines=[_line(event, question, search) for event in search.events],
            before=search.before,
            stopped=search.stopped,
            thread_keys=search.keys[:THREAD_KEYS_MAX],
            begins_late=bool(question.thread) and not shows_every_creation(self._log_dir),
            signed_seq=status.position_seq,
            indexed_seq=status.indexed_seq,
            durable_seq=status.durable_seq,
            alarm=status.alarm,
            problems=status.problems,
        )


def _line(event: Event, question: AuditQuestion, match: Found) -> AuditLine:
    keys = [event.key_id] if event.key_id else event.key_ids
    wanted = {question.key, *question.thread_keys, *match.keys}
    requests = [event.request_id] if event.request_id else event.request_ids
    return AuditLine(
        seq=event.seq,
        ts=event.ts,
        type=event.type,
        actor=event.actor,
        outcome=event.outcome,
        thread_id=event.thread_id,
        keys=sorted(keys, key=lambda each: each not in wanted)[:NAMED_COUNT_MAX],
        keys_count=len(keys),
        requests=requests[:NAMED_COUNT_MAX],
        requests_count=len(requests),
    )
