"""TLS between a TCP connection and the engine, with the bounds of handshakes.

Owns: the exchange of bytes between OpenSSL (`ssl.SSLObject`) and two neighbours: the TCP transport below, and above it
a `ServerConnection`, for which a `TlsConnection` is the transport. Invariants:
- The engine gets no byte, and its application opens no session, before the handshake has succeeded.
- Handshakes are bounded in time and in number. Beyond the number, the address that has the most loses its oldest one,
  so that a flood of handshakes that never end does not keep out a peer that ends its own in time.
- `get_write_buffer_size` is what the kernel has not taken, encrypted; nothing waits in a buffer of this module. So the
  engine's bounds of unread answers hold.
- After a failed handshake the alert is sent, and input is discarded until the peer closes or LINGER_SECONDS_MAX has
  passed: closing at once would reset the connection, and the peer might never read why.
It must never decide whose certificate is accepted (the context does, and then the application), nor log.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any, Final, Generic, cast

from minikms.http.connection import ServerConnection
from minikms.http.exchange import S
from minikms.http.limits import LINGER_SECONDS_MAX
from minikms.http.server import HttpServer
from minikms.platform.addresses import Places, address_group

HANDSHAKE_SECONDS_MAX: Final = 10.0
HANDSHAKES_COUNT_MAX: Final = 256
"""The connections that have not ended their handshake."""
CIPHERTEXT_BYTES: Final = 64 * 1024
"""What is read from a TCP connection at once."""
_FLUSH_BYTES: Final = 1024 * 1024
"""A large answer goes to the transport in parts of this size."""

Failed = Callable[[Exception | None, str], None]


class TlsServer(Generic[S]):
    """The TLS side of an `HttpServer`: its context, and the handshakes that have not ended.

    `context` is used for each new handshake, and may be replaced. `on_failed` gets the reason of a failed handshake:
    an `ssl.SSLError`, a TimeoutError, or None if the peer closed the connection, and the address of the peer.
    """

    def __init__(self, server: HttpServer[S], context: ssl.SSLContext, *, on_failed: Failed) -> None:
        self.server = server
        self.context = context
        self.on_failed = on_failed
        self.ciphertext = memoryview(bytearray(CIPHERTEXT_BYTES))
        self._places: Places[TlsConnection[S]] = Places(HANDSHAKES_COUNT_MAX)
        self._open: dict[TlsConnection[S], float] = {}
        """Handshakes, and failed ones that linger, with the loop's time at which they are aborted."""
        self._timer: asyncio.TimerHandle | None = None

    def protocol_factory(self) -> TlsConnection[S]:
        return TlsConnection(self)

    @property
    def handshakes_count(self) -> int:
        return len(self._open)

    def begin(self, connection: TlsConnection[S]) -> None:
        loser = self._places.take(connection.group, connection)
        if loser is not None:
            loser.give_up()
        self._until(connection, HANDSHAKE_SECONDS_MAX)

    def linger(self, connection: TlsConnection[S]) -> None:
        """A handshake has failed."""
        self._until(connection, LINGER_SECONDS_MAX)

    def end(self, connection: TlsConnection[S]) -> None:
        self._open.pop(connection, None)
        self._places.leave(connection.group, connection)

    def close(self) -> None:
        """Abort every handshake."""
        for connection in list(self._open):
            connection.give_up()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _until(self, connection: TlsConnection[S], seconds: float) -> None:
        self._open[connection] = self.server.loop.time() + seconds
        if self._timer is None:
            self._timer = self.server.loop.call_later(self.server.limits.sweep_seconds, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = self.server.loop.time()
        for connection in [connection for connection, ends_at in self._open.items() if ends_at <= now]:
            connection.give_up()
        if self._open:
            self._timer = self.server.loop.call_later(self.server.limits.sweep_seconds, self._sweep)


class TlsConnection(asyncio.BufferedProtocol, asyncio.Transport, Generic[S]):
    """The protocol of a TCP connection, and the transport of the engine's connection above it."""

    __slots__ = (
        "_connection",
        "_ended",
        "_eof",
        "_eof_reported",
        "_failed",
        "_incoming",
        "_outgoing",
        "_paused",
        "_raw",
        "_server",
        "_tls",
        "group",
        "peer",
    )

    _raw: asyncio.Transport
    _tls: ssl.SSLObject

    def __init__(self, server: TlsServer[S]) -> None:
        super().__init__()
        self._server = server
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._connection: ServerConnection[S] | None = None
        self._paused = False
        self._ended = False
        """This side has sent its last byte: input is discarded."""
        self._eof = False
        """The peer has closed its side of the TCP connection. OpenSSL must not know: it would end the other side."""
        self._eof_reported = False
        """The engine knows that the peer sends nothing more."""
        self._failed = False
        """The handshake has failed, and that was reported."""
        self.peer = self.group = ""
        """The address of the peer, and the group of addresses by which it is counted."""

    # --- the TCP transport's calls ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._raw.set_write_buffer_limits(high=0)  # what the kernel does not take at once, pauses
        peername = self._raw.get_extra_info("peername")
        self.peer = str(peername[0]) if peername else ""
        self.group = address_group(self.peer)
        self._tls = self._server.context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._server.begin(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.end(self)
        if self._connection is not None:
            self._connection.connection_lost(exc)
        else:
            self._fail(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._server.ciphertext

    def buffer_updated(self, nbytes: int) -> None:
        if self._ended or self._eof_reported:
            return
        self._incoming.write(self._server.ciphertext[:nbytes])
        if self._connection is None:
            self._shake()
        else:
            self._read()

    def eof_received(self) -> bool:
        """The peer sends nothing more, perhaps without the alert that says so."""
        if self._connection is None:
            self._fail(None)
            return False
        self._eof = True
        if not self._ended:
            self._read()
        elif not self._raw.is_closing():
            self._connection.eof_received()
        return not self._raw.is_closing()

    def pause_writing(self) -> None:
        if self._connection is not None:
            self._connection.pause_writing()

    def resume_writing(self) -> None:
        if self._connection is not None:
            self._connection.resume_writing()

    # --- handshake ----------------------------------------------------------------------------------------------

    def give_up(self) -> None:
        """The handshake, or the peer after a failed one, took too long."""
        self._server.end(self)
        self._fail(TimeoutError())
        self._raw.abort()

    def _shake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except (ssl.SSLError, ValueError) as error:  # ValueError: a server name that is not text
            self._flush()
            self._fail(error)
            self._ended = True
            if self._raw.can_write_eof() and not self._raw.is_closing():
                self._server.linger(self)
                self._raw.write_eof()
            else:
                self._raw.abort()
            return
        self._flush()
        self._server.end(self)
        self._connection = self._server.server.protocol_factory()
        self._connection.connection_made(self)
        if self._raw.get_write_buffer_size():
            self._connection.pause_writing()
        self._read()

    def _fail(self, error: Exception | None) -> None:
        if not self._failed and self._connection is None:
            self._failed = True
            self._server.on_failed(error, self.peer)

    # --- data ---------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Decrypt what has arrived into the engine's buffer, until it is used up or the engine pauses."""
        connection = self._connection
        if connection is None or self._eof_reported:
            return
        waits = False
        ended = False
        while not (waits or ended or self._paused or self._ended or self._raw.is_closing()):
            room = connection.get_buffer(-1)
            filled = 0
            try:
                while filled < len(room):
                    count = self._tls.read(len(room) - filled, room[filled:])
                    if not count:  # the alert close_notify
                        ended = True
                        break
                    filled += cast(int, count)
            except ssl.SSLWantReadError:
                waits = True
                ended = self._eof  # perhaps without close_notify: a request that was cut off is refused by its length
            except ssl.SSLError:
                self._raw.abort()
                return
            if filled:
                connection.buffer_updated(filled)
            if ended and not self._ended:
                self._eof_reported = True
                if not connection.eof_received():
                    self.close()
        self._flush()  # the answer to a key update

    def _flush(self) -> None:
        if self._outgoing.pending and not self._raw.is_closing():
            self._raw.write(self._outgoing.read())

    # --- the engine's calls: asyncio.Transport ------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._ended or self._raw.is_closing():
            return
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._tls.write(rest) :]
                if self._outgoing.pending >= _FLUSH_BYTES:
                    self._flush()
        except ssl.SSLError:
            self._raw.abort()
            return
        self._flush()

    def can_write_eof(self) -> bool:
        return self._raw.can_write_eof()

    def write_eof(self) -> None:
        self._end()
        self._raw.write_eof()

    def close(self) -> None:
        self._end()
        self._raw.close()

    def abort(self) -> None:
        self._ended = True
        self._raw.abort()

    def is_closing(self) -> bool:
        return self._raw.is_closing()

    def pause_reading(self) -> None:
        self._paused = True
        self._raw.pause_reading()

    def resume_reading(self) -> None:
        self._paused = False
        self._raw.resume_reading()
        self._server.server.loop.call_soon(self._read)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """They are those of the TCP transport, set when the connection was made."""

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._tls if name == "ssl_object" else self._raw.get_extra_info(name, default)

    def _end(self) -> None:
        """Send close_notify, once."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(ssl.SSLError):  # it waits for the peer's, which nobody waits for here
            self._tls.unwrap()
        self._flush()
