"""What a connection has received and not used: its bytes, the requests in them, and whether more is read.

Owns: how far the bytes are used, the framing of the body that is being received, and what bytes that came before their
turn take from the budget of bodies. It must never look into a body.
"""

from __future__ import annotations

import asyncio
from typing import Final

from progressdb_server.http import framing, limits
from progressdb_server.http.shares import BodyAccount, Shares

_RECURRING_FIELDS_BYTES_MAX: Final = 1024
"""Fields of a head up to this length are kept, because those of the connection's next head may be the same."""


class Received:
    transport: asyncio.Transport

    def __init__(self) -> None:
        self.data = b""
        """Used up to `_at`; empty if all of it is used."""
        self.in_body = False
        self.paused = False
        """Whether nothing more is read."""
        self.held: BodyAccount | None = None
        """What `data` takes from the budget of bodies while a request before it is handled."""
        self._at = 0
        self._last_fields: framing.Fields | None = None
        """The fields of the last head."""
        self._body_left = 0
        self._chunks: framing.Chunks | None = None

    def add(self, data: bytes) -> None:
        self.data = self.data[self._at :] + data if self.data else data
        self._at = 0

    def drop(self) -> None:
        """Nothing of it matters any more."""
        self.in_body = False
        self.data = b""

    def drop_used(self) -> None:
        self.data = self.data[self._at :]
        self._at = 0

    # --- requests -----------------------------------------------------------------------------------------------
    def head(self) -> framing.RequestHead | None:
        """The next one; None if more bytes are needed. Raises HttpError."""
        data, at = self.data, self._at
        while data.startswith(b"\r\n", at):  # RFC 9112, section 2.2
            at += 2
        head = framing.parse_head(data, at, self._last_fields)
        if head is None:
            self._use(at)
            return None
        if len(head.fields.raw) <= _RECURRING_FIELDS_BYTES_MAX:
            self._last_fields = head.fields
        self._use(head.end)
        return head

    def begin_body(self, length: int) -> None:
        self.in_body = True
        self._chunks = framing.Chunks() if length == framing.CHUNKED else None
        self._body_left = length

    def body(self) -> bytes:
        """The next part of the body; after the last one `in_body` is false. Raises HttpError."""
        data, at = self.data, self._at
        if self._chunks is not None:
            part, at = self._chunks.feed(data, at)
            self.in_body = not self._chunks.complete
        else:
            part = data[at : at + self._body_left]
            at += len(part)
            self._body_left -= len(part)
            self.in_body = self._body_left > 0
        self._use(at)
        return part

    @property
    def has_chunks(self) -> bool:
        """Whether more of the body can be decoded without reading."""
        return self.data != b"" and self._chunks is not None and not self._chunks.starved

    def _use(self, at: int) -> None:
        self._at = at
        if at == len(self.data):
            self.data = b""
            self._at = 0

    # --- reading ------------------------------------------------------------------------------------------------
    def pause(self) -> None:
        if not self.paused:
            self.paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            self.transport.resume_reading()

    def hold(self, shares: Shares, group: str) -> bool:
        """Requests have come before their turn: read no more, and count what there is. Returns False if the budget has
        no room for it."""
        self.pause()
        if len(self.data) > limits.BODY_UNCOUNTED_BYTES_MAX and self.held is None:
            self.held = BodyAccount(shares, group, b"")
            return self.held.grow_to(len(self.data))
        return True

    def give_back(self) -> None:
        """What `hold` has counted is not counted any more."""
        if self.held is not None:
            self.held.close()
            self.held = None
