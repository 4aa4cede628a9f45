"""What the viewer asks the auditor about the audit log.

Owns: how a question is read from a form, and the exchange with the auditor. Invariants: the uid of who serves the
socket is checked before anything is sent; every wait is bounded; a failure is a sentence, never an empty answer. It
must never read the audit log itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from minikms.api import Condition, ErrorAnswer
from minikms.api.audit_questions import ANSWER_SECONDS_MAX, PATH, AuditAnswer, AuditQuestion
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsError, KmsTimeoutError, KmsUnavailableError, KmsUntrustedServerError
from minikms.client.connecting import SocketEndpoint
from minikms.client.connection import ClientConnection
from progressdb_server import config
from progressdb_server.api.gate.errors import bad_request
from progressdb_server.conditions import state

FIELDS: Final = {
    "thread": "The thread that a line names, or whose key it names.",
    "key": "The key that a line names.",
    "actor": "Who used it, as in the log: peer_uid:1000.",
    "verb": "The verb; `reads` for all that may answer plaintext.",
    "outcome": "`ok`, or an error code of the key service.",
    "from": "The earliest time, in UTC.",
    "to": "The first time after it, in UTC.",
    "before": "Only lines with a smaller number.",
}
"""The fields of the form, each with its label."""
BAD_TIME: Final = "a time is written as 2026-03-14T09:30, in UTC"
BAD_NUMBER: Final = "a line has a number of at most 18 digits"
CLOSED: Final = "it closed the connection: `users` of `[questions]` must name the user of this server"
CONNECT_S_MAX: Final = 2.0
CONDITIONS_S_MAX: Final = 2.0
CONDITIONS_AGE_S: Final = 10.0
"""How long a page waits for the auditor's conditions, and how long an answer counts."""
DIGITS_MAX: Final = 18


class AuditorError(Exception):
    """There is no answer. Its text is for the operator."""


class AuditorClient:
    def __init__(self, settings: config.ViewerSection) -> None:
        self._path = settings.audit_socket
        self._uids = settings.audit_server_uids or None
        self._asking: asyncio.Task[None] | None = None
        self._conditions = [state("auditor_unanswering", reason="it has not answered yet")]
        self._until_s = 0.0

    @property
    def is_configured(self) -> bool:
        return bool(self._path)

    async def conditions(self) -> list[Condition] | None:
        """What is wrong with the auditor, as it said within CONDITIONS_AGE_S; None where none is configured."""
        if not self.is_configured:
            return None
        if self._asking is None and time.monotonic() >= self._until_s:
            self._asking = asyncio.get_running_loop().create_task(self._ask_conditions())
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=CONDITIONS_S_MAX)
        return self._conditions

    async def _ask_conditions(self) -> None:
        try:
            answer = await self.ask(AuditQuestion(before=1, asker="overview"))
            self._conditions = [state("auditor_alarm", reason=answer.alarm)] if answer.alarm else []
            if answer.problems:
                self._conditions.append(
                    state("auditor_failing", count=f"{len(answer.problems):,}", first=answer.problems[0])
                )
        except AuditorError as error:
            self._conditions = [state("auditor_unanswering", reason=error)]
        finally:
            self._asking, self._until_s = None, time.monotonic() + CONDITIONS_AGE_S

    async def ask(self, question: AuditQuestion) -> AuditAnswer:
        try:
            connection = await ClientConnection.open(SocketEndpoint(self._path, self._uids), CONNECT_S_MAX)
            try:
                answer = await connection.exchange(
                    PATH.encode(), msgspec.json.encode(question), None, ANSWER_SECONDS_MAX
                )
            finally:
                connection.close()
            if answer.status == 200:
                return msgspec.json.decode(answer.body, type=AuditAnswer)
            raise AuditorError(msgspec.json.decode(answer.body, type=ErrorAnswer).error.rstrip("."))
        except KmsUntrustedServerError as error:
            raise AuditorError(f"{error}; name its user in `viewer.audit_server_uids`") from None
        except KmsTimeoutError:
            raise AuditorError("the auditor has not answered in time") from None
        except KmsUnavailableError as error:
            reason = getattr(error.__cause__, "strerror", None) or CLOSED
            raise AuditorError(f"no auditor answers at {self._path}: {reason}") from None
        except (KmsError, *UNDECODABLE):
            raise AuditorError("the auditor is busy, or of another version") from None


def question(form: Mapping[str, str], **more: str | tuple[str, ...]) -> AuditQuestion:
    """The question of the fields FIELDS, each a text without spaces around it. Raises ApiError 400."""
    if not (before := form["before"] or "0").isascii() or not before.isdigit() or len(before) > DIGITS_MAX:
        raise bad_request(BAD_NUMBER)
    texts = {name: form[name] for name in ("thread", "actor", "verb", "outcome", "key")}
    times = {"since_ns": _nanoseconds(form["from"]), "until_ns": _nanoseconds(form["to"])}
    return msgspec.convert({**texts, **times, "before": int(before), **more}, AuditQuestion)


def _nanoseconds(text: str) -> int:
    """Unix time of a time in ISO 8601, in UTC if it names no zone; 0 for an empty one. Raises ApiError 400."""
    try:
        moment = datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)
        seconds = int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise bad_request(BAD_TIME) from None
    if not 0 <= seconds < 2**33:
        raise bad_request(BAD_TIME)
    return seconds * 1_000_000_000
