"""Bytes of answers.

Owns: the only place where a status line or an answer's header is written. Invariants: every answer has exactly one
Content-Length and never a transfer coding; a name or value with a line break is refused, not written.
"""

from __future__ import annotations

import re
from email.utils import formatdate
from http import HTTPStatus
from typing import Final

from minikms import api
from minikms.http.exchange import Response

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_LENGTH_LINES_COUNT: Final = 4096
_LENGTH_LINES: Final = [b"%d\r\n\r\n" % length for length in range(_LENGTH_LINES_COUNT)]
_FIELD: Final = re.compile(r"[A-Za-z0-9-]+: [\t -~]*")
_PHRASES: Final = {status.value: status.phrase for status in HTTPStatus}


class AnswerEncoder:
    """Writes answers with the current date (RFC 9110 section 6.6.1), which `set_time` keeps."""

    __slots__ = ("_date", "_ok_prefix")

    def __init__(self, unix_seconds: float) -> None:
        self.set_time(unix_seconds)

    def set_time(self, unix_seconds: float) -> None:
        self._date = f"date: {formatdate(unix_seconds, usegmt=True)}\r\n".encode("ascii")
        self._ok_prefix = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n%bcontent-length: " % self._date

    def ok(self, body: bytes) -> bytes:
        """200, JSON, connection kept: the answer that is sent a hundred thousand times a second."""
        length = len(body)
        line = _LENGTH_LINES[length] if length < _LENGTH_LINES_COUNT else b"%d\r\n\r\n" % length
        return b"".join((self._ok_prefix, line, body))

    def answer(
        self, response: Response, *, close: bool, head_only: bool = False, request_id: str | None = None
    ) -> bytes:
        """Any answer. `close` announces that the connection ends; `head_only` answers a HEAD request.

        Raises `ValueError` for a header that would break the answer's framing.
        """
        lines = [f"content-type: {response.content_type}"]
        lines += [f"{name}: {value}" for name, value in response.headers]
        if request_id is not None:
            lines.append(f"{api.REQUEST_ID_HEADER}: {request_id}")
        if close:
            lines.append("connection: close")
        if not all(_FIELD.fullmatch(line) for line in lines):
            raise ValueError("an answer's header holds a character that no header may hold")
        status_line = f"HTTP/1.1 {response.status} {_PHRASES.get(response.status, 'Unknown')}\r\n"
        fields = "\r\n".join(lines)
        return b"".join(
            (
                status_line.encode("ascii"),
                self._date,
                f"{fields}\r\ncontent-length: {len(response.body)}\r\n\r\n".encode("ascii"),
                b"" if head_only else response.body,
            )
        )
