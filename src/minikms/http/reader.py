"""From received bytes to complete requests: the receive side of one connection, without its socket.

Owns: the receive buffers, their total size and their zeroing, the decoding of chunked bodies (RFC 9112 section 7.1),
and the bytes that are not yet a complete request. Rules:

- Bytes are received into the buffer that all connections share, and used there. Only the rest that is not a complete
  request is carried over, into a buffer of this reader, which then receives the following bytes directly.
- The body that `next` returns is a view of that memory, never a copy. Only a chunked body is decoded into a buffer.
- A chunk is 1 to 8 hexadecimal digits, CR LF, that many bytes, CR LF. The last chunk has size 0, and CR LF follows.
  A chunk extension, a trailer, white space, or a bare CR or LF is refused at its first byte. The size of the body and
  the number of chunks are bounded.
- A buffer grows by allocating, copying and zeroing, because resizing a `bytearray` leaves the old block on the heap.
- Every byte is zeroed after it has been used or refused: by `RequestReader.zero_used` or `RequestReader.discard`, or,
  for the result of `RequestReader.only_request`, by `Shared.wipe` at the end of the turn.
- After a RefusedError only `discard` may be called, because the start of the next request is no longer certain.

Usage: receive into `room()`, call `received(n)`, then `next()` until it returns None, then `zero_used()` or `discard()`
before control returns to the event loop, because the next connection uses the shared buffer.

Pure: no socket, no clock. It must never keep a copy of a body that it does not zero, nor answer a refusal.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from minikms.http.head import HeadCache, ParsedHead, check_partial_head
from minikms.http.limits import (
    BAD_CHUNK,
    BODY_TOO_LARGE,
    CHUNK_SIZE_DIGITS_MAX,
    OVERLOADED,
    TOO_MANY_CHUNKS,
    Limits,
    RefusedError,
)
from minikms.memory.arena import zero

_CR: Final = 0x0D
_LF: Final = 0x0A
_HEX: Final = {ord(digit): int(digit, 16) for digit in "0123456789abcdefABCDEF"}
_CAPACITY_BYTES_MIN: Final = 4096


class Budget:
    """The number of bytes that the buffers of a group, or of all, hold, and its bound. `whole`: of a group, that of
    all.
    """

    __slots__ = ("bytes_held", "bytes_max", "whole")

    def __init__(self, bytes_max: int, whole: Budget | None = None) -> None:
        self.bytes_max = bytes_max
        self.bytes_held = 0
        self.whole = whole

    def take(self, count: int) -> None:
        """Charges `count` bytes. Raises RefusedError (503) if a sum would exceed its bound."""
        whole = self.whole
        if self.bytes_held + count > self.bytes_max or (whole and whole.bytes_held + count > whole.bytes_max):
            raise RefusedError(OVERLOADED)
        self.add(count)

    def give(self, count: int) -> None:
        self.add(-count)

    def add(self, count: int) -> None:
        """Whatever the bound."""
        self.bytes_held += count
        if self.whole is not None:
            self.whole.bytes_held += count


class ReceiveBuffer:
    """A block of `capacity` bytes, the first `filled` of which are received data."""

    __slots__ = ("_budget", "capacity", "data", "filled", "view")

    def __init__(self, capacity: int, budget: Budget) -> None:
        budget.take(capacity)
        self._budget = budget
        self.capacity = capacity
        self.data = bytearray(capacity)
        self.view = memoryview(self.data)
        self.filled = 0

    def append(self, part: memoryview) -> None:
        """Append a copy of `part`. The caller has made room."""
        end = self.filled + len(part)
        self.view[self.filled : end] = part
        self.filled = end

    def room(self) -> memoryview:
        """The unused part, to receive into."""
        return self.view[self.filled :]

    def moved(self, start: int, capacity: int) -> ReceiveBuffer:
        """A new buffer with this one's bytes from `start` on. This one is zeroed, even if that fails."""
        try:
            new = ReceiveBuffer(capacity, self._budget)
            new.append(self.view[start : self.filled])
        finally:
            self.wipe()
        return new

    def charge(self, budget: Budget) -> None:
        """Count the capacity there from now on, even beyond the bound."""
        self._budget.give(self.capacity)
        self._budget = budget
        budget.add(self.capacity)

    def wipe(self) -> None:
        """Zero the received bytes and return the capacity to the budget. The buffer must not be used again."""
        zero(self.view[: self.filled])
        self.filled = 0
        self._budget.give(self.capacity)
        self.capacity = 0


class _At(IntEnum):
    """The state of a `ChunkedDecoder`: what the next byte must be."""

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
"""For a state with one acceptable byte: that byte and the next state. After a chunk size of 0 the next is LAST_CR."""


class ChunkedDecoder:
    """Decodes one chunked body. After a RefusedError only `wipe` may be called."""

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
        """Decode `data`. Returns how many of its bytes belong to this body: all of them unless it is now `complete`.

        Raises RefusedError for malformed framing (400), too large a body or too many chunks (413).
        """
        position = 0
        end = len(data)
        while position < end and self._at is not _At.DONE:
            if self._at is _At.DATA:
                count = min(self._size, end - position)
                self._take(data[position : position + count])
                position += count
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

    def charge(self, budget: Budget) -> None:
        """Counts the capacity against the budget. Raises RefusedError."""
        self._buffer.charge(budget)

    def wipe(self) -> None:
        """Zero the body and return its capacity to the budget."""
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


class Phase(IntEnum):
    """What a connection waits for from its peer. Each phase has a limit in seconds."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    LINGER = 3
    """The last answer was sent; the connection waits for the peer to close."""


class Shared:
    """What the readers of one server share. `view` is all zeros between two turns of the event loop."""

    __slots__ = ("budget", "data", "head_cache", "limits", "used_bytes", "view", "zeros")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.head_cache = HeadCache(limits)
        self.budget = Budget(limits.buffered_bytes_max)
        self.data = bytearray(limits.receive_buffer_bytes)
        self.view = memoryview(self.data)
        self.zeros = memoryview(bytes(limits.receive_buffer_bytes))
        self.used_bytes = 0
        """Length of the part of `view` that holds requests of this turn."""

    def wipe(self) -> None:
        """Zero the used part. Call this at the end of every turn in which `RequestReader.only_request` had a result."""
        self.view[: self.used_bytes] = self.zeros[: self.used_bytes]
        self.used_bytes = 0


class RequestReader:
    """Turns the bytes of one connection into complete requests."""

    __slots__ = (
        "_budget",
        "_cached_head",
        "_carry",
        "_chunks",
        "_data",
        "_end",
        "_last",
        "_last_bytes",
        "_last_raw",
        "_position",
        "_shared",
        "_view",
        "head",
    )

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._budget = shared.budget
        self._carry: ReceiveBuffer | None = None
        self._chunks: ChunkedDecoder | None = None
        self._data = shared.data
        self._view = shared.view
        self._cached_head = shared.head_cache.get
        self._position = 0
        self._end = 0
        # The last result of `only_request`: its size, its head as received, and its parsed head.
        self._last_bytes = 0
        self._last_raw = b""
        self._last: ParsedHead | None = None
        self.head: ParsedHead | None = None
        """The head of the request whose body is being received."""

    def charge(self, budget: Budget) -> None:
        """From now on, what it holds counts there."""
        self._budget = budget
        for buffer in (self._carry, self._chunks):
            if buffer is not None:
                buffer.charge(budget)

    @property
    def phase(self) -> Phase:
        """What the next bytes belong to. Valid after `next` has returned None."""
        if self.head is not None:
            return Phase.BODY
        return Phase.HEAD if self._position < self._end else Phase.IDLE

    @property
    def holds_input(self) -> bool:
        """Whether bytes are carried over, or a request has been received in part."""
        return self._carry is not None or self.head is not None

    def room(self) -> memoryview:
        """The part of the buffer for the next bytes; never empty."""
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
        """A shortcut: the request in the first `count` bytes of `room()`, if they are one request with a cached head.

        `Shared.wipe` zeroes them. None changes nothing; the caller calls `received` and `next` instead.
        """
        if self._carry is not None or self.head is not None:
            return None  # these bytes continue an incomplete request
        head = self._last
        if head is None or count != self._last_bytes or not self._data.startswith(self._last_raw):
            stop = self._data.find(b"\r\n\r\n", 0, count) + 4
            raw = bytes(self._view[:stop])
            head = self._cached_head(raw)
            if head is None or head.chunked or stop + head.content_length != count:
                return None
            self._last, self._last_raw, self._last_bytes = head, raw, count
        shared = self._shared
        if count > shared.used_bytes:  # noqa: PLR1730 - a call of max() for every request takes longer
            shared.used_bytes = count
        return head, self._view[len(self._last_raw) : count]

    def next(self) -> tuple[ParsedHead, memoryview] | None:
        """The next complete request. None: more bytes are needed. Raises RefusedError.

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
            head = self._shared.head_cache.get(raw) or self._shared.head_cache.parse(raw)
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

    def zero_used(self) -> None:
        """Zero what has been used and carry the rest over. Raises RefusedError if the budget does not allow it."""
        self._drop_chunks(if_complete=True)
        carry = self._carry
        rest = self._end - self._position
        if carry is None:
            try:
                if rest:
                    carry = ReceiveBuffer(self._capacity(rest), self._budget)
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
        """The capacity of a buffer with `filled` bytes that will receive more.

        It is not the announced length at once, because announcing a length costs the peer nothing.
        """
        capacity = max(2 * filled, _CAPACITY_BYTES_MIN)
        if self.head is not None and filled < self.head.content_length:
            return min(capacity, self.head.content_length)
        return capacity

    def _next_chunked(self, head: ParsedHead) -> tuple[ParsedHead, memoryview] | None:
        self._drop_chunks(if_complete=True)
        if self._chunks is None:
            self._chunks = ChunkedDecoder(self._shared.limits, self._budget)
        self._position += self._chunks.feed(self._view[self._position : self._end])
        if not self._chunks.complete:
            self.head = head
            return None
        self.head = None
        return head, self._chunks.body()

    def _drop_chunks(self, *, if_complete: bool = False) -> None:
        """Zero the decoded body. if_complete: only if the body is complete, so that the caller has used it."""
        if self._chunks is not None and (self._chunks.complete or not if_complete):
            self._chunks.wipe()
            self._chunks = None
