"""One request and its answer on their way through the application.

Owns: the headers that every answer carries and the record of what has left. Invariant: whoever answers, a handler or
a mounted application, the CORS headers and the request id are in the answer, and its status is counted.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Final

from progressdb_server.api.http import response
from progressdb_server.api.http.errors import Header
from progressdb_server.api.http.request import Call, Receive, Send
from progressdb_server.api.http.response import Answer, EventStream, JsonList

EXCHANGE: Final = "progressdb.exchange"
"""Where Starlette's scope holds it."""


class Exchange:
    __slots__ = ("_headers", "_send", "call", "receive", "status")

    def __init__(self, call: Call, headers: tuple[Header, ...], receive: Receive, send: Send) -> None:
        self.call = call
        self.receive = receive
        self.status = 0
        """Of the answer that has started to leave; 0 before that."""
        self._headers = headers
        self._send = send

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*self._headers, *message.get("headers", ())]
        await self._send(message)

    def replied(self, outcome: Answer | JsonList | EventStream) -> bool:
        """Whether it could leave at once and whole; `reply` is for what could not."""
        direct = self.call.direct
        if direct is None or not isinstance(outcome, Answer):
            return False
        status, body, content_type, headers = outcome
        if content_type is None or self.status:
            return False
        self.status = status
        return direct.answer(status, (*self._headers, *headers, content_type), body)

    async def reply(self, outcome: Answer | JsonList | EventStream) -> None:
        if isinstance(outcome, Answer):
            await response.send_answer(outcome, self.send)
        elif isinstance(outcome, EventStream):
            await response.send_events(outcome, self.receive, self.send)
        else:
            await response.send_list(outcome, self.receive, self.send)
