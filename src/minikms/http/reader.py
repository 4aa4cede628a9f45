"""Memory that requests are received into, and zeroed afterwards.

Owns: the allocation, growth and wiping of receive buffers, and the sum of what they hold. Invariants: a buffer grows by
allocate, copy, zero, never by `bytearray` resizing (which leaves the old block on the heap as it was); every byte that
was received is zeroed before its memory is given back. No parsing here.

The chunked transfer coding of RFC 9112 section 7.1, the strict subset that the service accepts.

Owns: decoding a chunked body into one contiguous, wipeable buffer. Rules:
- chunk = 1 to 8 hexadecimal digits, CR LF, that many bytes, CR LF; the last chunk has size 0 and is followed by CR LF.
- No chunk extension, no trailer, no white space, no bare CR or LF: else refused, at the first byte that
  shows it.
- The body and the number of chunks are bounded.
Pure: bytes in, bytes out, no socket and no clock. It must never hold a copy of the body that it does not wipe.

From received bytes to whole requests: the receive side of one connection, without the connection.

Owns: the bytes of a connection that are not yet a whole request. Rules:
- Bytes are received into the one buffer that all connections share and used there, in place. Only the rest that does
  not make a whole request is carried over, in a block of this reader, which then receives the next bytes directly.
- The body that `next` returns is a view of that memory: never a copy, except for a chunked body, which is decoded.
- Every byte is zeroed once it has been used or refused: in `settle` or `discard`, or, for what `only_request` gave, at
  the end of the turn in `Shared.wipe`.
- After a `RefusedError` only `discard` may be called: where the next request begins is no longer certain.
Pure: no socket, no clock. It must never decide what a refusal leads to.

Use: fill `room()`, `received(n)`, `next()` until None (or as long as the caller likes), then `settle()` or `discard()`
before control goes back to the event loop, for the shared buffer belongs to the next connection then.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from minikms.http.head import HeadMemo, ParsedHead, check_partial_head
from minikms.http.limits import (
    BAD_CHUNK,
    BODY_TOO_LARGE,
    CHUNK_SIZE_DIGITS_MAX,
    OVERLOADED,
    TOO_MANY_CHUNKS,
    Limits,
    RefusedError,
)

_ZEROS: Final = memoryview(bytes(64 * 1024))


def wipe(view: memoryview) -> None:
    """Zero all bytes of a writable view, without a temporary of its size."""
    step = len(_ZEROS)
    for start in range(0, len(view), step):
        part = view[start : start + step]
        part[:] = _ZEROS[: len(part)]


class Budget:
    """How many bytes all buffers of a server hold together, and may."""

    __slots__ = ("bytes_held", "bytes_max")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_held = 0

    def take(self, count: int) -> None:
        """Raises `RefusedError` (503) when the sum would pass the bound."""
        if self.bytes_held + count > self.bytes_max:
            raise RefusedError(OVERLOADED)
        self.bytes_held += count

    def give(self, count: int) -> None:
        self.bytes_held -= count


class ReceiveBuffer:
    """A fixed block of `capacity` bytes of which the first `filled` hold received data."""

    __slots__ = ("_budget", "capacity", "data", "filled", "view")

    def __init__(self, capacity: int, budget: Budget) -> None:
        """Raises `RefusedError` when the budget is spent."""
        budget.take(capacity)
        self._budget = budget
        self.capacity = capacity
        self.data = bytearray(capacity)
        self.view = memoryview(self.data)
        self.filled = 0

    def append(self, part: memoryview) -> None:
        """Copy `part` behind what is there; the caller has made room."""
        end = self.filled + len(part)
        self.view[self.filled : end] = part
        self.filled = end

    def room(self) -> memoryview:
        """The unfilled rest, to receive into."""
        return self.view[self.filled :]

    def moved(self, start: int, capacity: int) -> ReceiveBuffer:
        """A new buffer that begins with this one's bytes from `start` on. This one is wiped, also on failure."""
        try:
            new = ReceiveBuffer(capacity, self._budget)
            new.append(self.view[start : self.filled])
        finally:
            self.wipe()
        return new

    def wipe(self) -> None:
        """Zero what was received and give the bytes back to the budget. The buffer is not used again."""
        wipe(self.view[: self.filled])
        self.filled = 0
        self._budget.give(self.capacity)
        self.capacity = 0


_CR: Final = 0x0D
_LF: Final = 0x0A
_HEX: Final = {ord(digit): int(digit, 16) for digit in "0123456789abcdefABCDEF"}
_CAPACITY_BYTES_MIN: Final = 4096


class _At(IntEnum):
    """What the next byte must be."""

    SIZE = 0
    SIZE_LF = 1
    DATA = 2
    DATA_CR = 3
    DATA_LF = 4
    LAST_CR = 5
    LAST_LF = 6
    DONE = 7


_NEXT: Final = {
    _At.SIZE_LF: (_LF, _At.DATA),
    _At.DATA_CR: (_CR, _At.DATA_LF),
    _At.DATA_LF: (_LF, _At.SIZE),
    _At.LAST_CR: (_CR, _At.LAST_LF),
    _At.LAST_LF: (_LF, _At.DONE),
}
"""The states with exactly one acceptable byte, and where it leads (SIZE_LF of a zero-size chunk leads to LAST_CR)."""


class ChunkedDecoder:
    """Decodes one body. After `RefusedError` only `wipe` may be called."""

    __slots__ = ("_at", "_body_bytes_max", "_buffer", "_chunks", "_chunks_count_max", "_digits", "_size")

    def __init__(self, limits: Limits, budget: Budget) -> None:
        self._body_bytes_max = limits.body_bytes_max
        self._chunks_count_max = limits.chunks_count_max
        self._buffer = ReceiveBuffer(_CAPACITY_BYTES_MIN, budget)
        self._at = _At.SIZE
        self._size = 0
        self._digits = 0
        self._chunks = 0

    @property
    def complete(self) -> bool:
        return self._at is _At.DONE

    def feed(self, data: memoryview) -> int:
        """Decode from `data`; returns how many bytes of it belong to this body (all of them until `complete`).

        Raises `RefusedError` for malformed framing (400), too large a body or too many chunks (413).
        """
        position = 0
        end = len(data)
        while position < end and self._at is not _At.DONE:
            if self._at is _At.DATA:
                taken = min(self._size, end - position)
                self._take(data[position : position + taken])
                position += taken
                continue
            byte = data[position]
            position += 1
            if self._at is _At.SIZE:
                self._size_byte(byte)
                continue
            expected, after = _NEXT[self._at]
            if byte != expected:
                raise RefusedError(BAD_CHUNK)
            if after is _At.DATA and self._size == 0:
                after = _At.LAST_CR
            elif after is _At.SIZE:
                self._digits = 0
            self._at = after
        return position

    def body(self) -> memoryview:
        """The decoded body; valid until `wipe`."""
        return self._buffer.view[: self._buffer.filled]

    def wipe(self) -> None:
        """Zero the body and give its memory back."""
        self._buffer.wipe()

    def _size_byte(self, byte: int) -> None:
        digit = _HEX.get(byte)
        if digit is not None and self._digits < CHUNK_SIZE_DIGITS_MAX:
            self._size = self._size * 16 + digit if self._digits else digit
            self._digits += 1
            return
        if digit is not None or byte != _CR or self._digits == 0:
            raise RefusedError(BAD_CHUNK)
        if self._buffer.filled + self._size > self._body_bytes_max:
            raise RefusedError(BODY_TOO_LARGE)
        self._chunks += 1
        if self._chunks > self._chunks_count_max:
            raise RefusedError(TOO_MANY_CHUNKS)
        self._at = _At.SIZE_LF

    def _take(self, part: memoryview) -> None:
        needed = self._buffer.filled + len(part)
        if needed > self._buffer.capacity:
            capacity = min(max(needed, 2 * self._buffer.capacity), self._body_bytes_max)
            self._buffer = self._buffer.moved(0, capacity)
        self._buffer.append(part)
        self._size -= len(part)
        if self._size == 0:
            self._at = _At.DATA_CR


_CARRY_BYTES_MIN: Final = 4096


class Phase(IntEnum):
    """What a connection waits for from its peer; each has its limit in seconds."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    LINGER = 3
    """The last answer was sent; the peer is to close."""


class Shared:
    """What the readers of one server have in common. `view` is all zero between two turns of the event loop."""

    __slots__ = ("budget", "data", "limits", "memo", "used_bytes", "view", "zeros")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.memo = HeadMemo(limits)
        self.budget = Budget(limits.buffered_bytes_max)
        self.data = bytearray(limits.receive_buffer_bytes)
        self.view = memoryview(self.data)
        self.zeros = memoryview(bytes(limits.receive_buffer_bytes))
        self.used_bytes = 0
        """How far `view` holds requests that were used in this turn."""

    def wipe(self) -> None:
        """To be called at the end of every turn in which `RequestReader.used` was."""
        self.view[: self.used_bytes] = self.zeros[: self.used_bytes]
        self.used_bytes = 0


class RequestReader:
    """Turns the bytes of one connection into whole requests."""

    __slots__ = (
        "_carry",
        "_chunks",
        "_data",
        "_end",
        "_last",
        "_last_bytes",
        "_last_raw",
        "_memo_get",
        "_position",
        "_shared",
        "_view",
        "head",
    )

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._carry: ReceiveBuffer | None = None
        self._chunks: ChunkedDecoder | None = None
        self._data = shared.data
        self._view = shared.view
        self._memo_get = shared.memo.get
        self._position = 0
        self._end = 0
        # What `only_request` gave last: how many bytes it was, its head as it came, and parsed.
        self._last_bytes = 0
        self._last_raw = b""
        self._last: ParsedHead | None = None
        self.head: ParsedHead | None = None
        """The head of the request whose body is being received."""

    @property
    def phase(self) -> Phase:
        """What the next bytes belong to, after `next` has returned None."""
        if self.head is not None:
            return Phase.BODY
        return Phase.HEAD if self._position < self._end else Phase.IDLE

    @property
    def holds_input(self) -> bool:
        """Are bytes carried over, or is a request half received?"""
        return self._carry is not None or self.head is not None

    def room(self) -> memoryview:
        """Where to receive the next bytes; never empty."""
        carry = self._carry
        return self._shared.view if carry is None else carry.room()

    def received(self, count: int) -> None:
        """The first `count` bytes of `room()` have been filled."""
        carry = self._carry
        if carry is None:
            self._end = count
        else:
            carry.filled += count
            self._end = carry.filled

    def only_request(self, count: int) -> tuple[ParsedHead, memoryview] | None:
        """The request that the first `count` bytes of `room()` are, if they are just one and its head is known.

        Then only `used` may follow. None says nothing, and has changed nothing: `received` and `next` tell.
        """
        if self._carry is not None or self.head is not None:
            return None  # these bytes go on with a request that has begun, whatever they look like
        head = self._last
        if head is not None and count == self._last_bytes and self._data.startswith(self._last_raw):
            return head, self._view[len(self._last_raw) : count]
        stop = self._data.find(b"\r\n\r\n", 0, count) + 4
        raw = bytes(self._view[:stop])
        head = self._memo_get(raw)
        if head is None or head.chunked or stop + head.content_length != count:
            return None
        self._last, self._last_raw, self._last_bytes = head, raw, count
        return head, self._view[stop:count]

    def next(self) -> tuple[ParsedHead, memoryview] | None:
        """The next whole request. None: more bytes are needed. Raises `RefusedError`.

        The body is valid until the next call of any method.
        """
        head = self.head
        position = self._position
        if head is None:
            if position == self._end:
                return None
            stop = self._data.find(b"\r\n\r\n", position, self._end) + 4
            if stop < 4:
                check_partial_head(self._data, position, self._end, self._shared.limits)
                return None
            raw = bytes(self._view[position:stop])
            head = self._shared.memo.get(raw) or self._shared.memo.parse(raw)
            position = self._position = stop
        if head.chunked:
            return self._next_chunked(head)
        stop = position + head.content_length
        if stop > self._end:
            self.head = head
            return None
        self.head = None
        self._position = stop
        return head, self._view[position:stop]

    def used(self, count: int) -> None:
        """The request that `only_request` gave was handed on: it is zeroed when the turn ends."""
        shared = self._shared
        shared.used_bytes = max(shared.used_bytes, count)

    def settle(self) -> None:
        """Zero what has been used and carry the rest over. Raises `RefusedError` when there is no memory for it."""
        self._drop_chunks(if_complete=True)
        carry = self._carry
        rest = self._end - self._position
        if carry is None:
            try:
                if rest:
                    carry = ReceiveBuffer(self._capacity(rest), self._shared.budget)
                    carry.append(self._view[self._position : self._end])
            finally:
                self._shared.view[: self._end] = self._shared.zeros[: self._end]
        elif not rest:
            carry.wipe()
            carry = None
        elif self._position or rest == carry.capacity:
            carry = carry.moved(self._position, self._capacity(rest))
        self._use(carry)

    def discard(self) -> None:
        """Forget and zero everything that was received."""
        self.head = None
        self._drop_chunks()
        if self._carry is not None:
            self._carry.wipe()
        else:
            self._shared.view[: self._end] = self._shared.zeros[: self._end]
        self._use(None)

    def _use(self, carry: ReceiveBuffer | None) -> None:
        self._carry = carry
        self._position = 0
        if carry is None:
            self._data, self._view, self._end = self._shared.data, self._shared.view, 0
        else:
            self._data, self._view, self._end = carry.data, carry.view, carry.filled

    def _capacity(self, filled: int) -> int:
        """For a block that holds `filled` bytes and takes more.

        Never the announced length at once: announcing costs the peer nothing, sending does.
        """
        capacity = max(2 * filled, _CARRY_BYTES_MIN)
        if self.head is not None and filled < self.head.content_length:
            return min(capacity, self.head.content_length)
        return capacity

    def _next_chunked(self, head: ParsedHead) -> tuple[ParsedHead, memoryview] | None:
        self._drop_chunks(if_complete=True)
        if self._chunks is None:
            self._chunks = ChunkedDecoder(self._shared.limits, self._shared.budget)
        self._position += self._chunks.feed(self._view[self._position : self._end])
        if not self._chunks.complete:
            self.head = head
            return None
        self.head = None
        return head, self._chunks.body()

    def _drop_chunks(self, *, if_complete: bool = False) -> None:
        """Zero the decoded body, or (`if_complete`) only one that the caller has used."""
        if self._chunks is not None and (self._chunks.complete or not if_complete):
            self._chunks.wipe()
            self._chunks = None
