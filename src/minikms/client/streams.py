"""Encrypted streams for files and pipes of any size: the STREAM construction over AES-256-GCM.

Owns: the format of an encrypted stream (docs/spec/stream.md), and copying a source to a target in it, for both clients
and `minikms encrypt`. The construction is that of Hoang, Reyhanitabar, Rogaway
and Vizár (https://eprint.iacr.org/2015/189), as `age` uses it: chunks of 64 KiB, each sealed under the nonce chunk
number | final flag, so that a chunk that was altered, moved, removed, repeated or truncated does not open.

Invariants:
- The nonces are fixed because each data key is used for one stream: the caller gets a new one from
  `/generate_data_key` every time. A key must never be used for a second stream.
- The header is associated data of every chunk, so a chunk does not open under another header.
- A source that is stopped or gives nothing yet ends with an error, never as a shorter stream.
- The copy of a data key that is made here is zeroed at the end.
- What `open_stream` yields is authentic, but it is only a prefix until the iterator ends without an error. A caller
  that must not act on a prefix has to keep it aside until then.
- A stream has one form: only the empty stream has an empty chunk, and every chunk but the last is full.
It must never read ahead more than one chunk, fetch a key, open a file, or say why a chunk did not open. Only a client
whose streams are used loads it, because it needs the library `cryptography`.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Final, NamedTuple, ParamSpec, Protocol, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms import api
from minikms.api.errors import DecryptionError, InvalidRequestError, KmsProtocolError, TooLargeError

P = ParamSpec("P")
T = TypeVar("T")

TAG_BYTES: Final = 16
READ_BYTES: Final = 64 * 1024
CHUNK_BYTES: Final = 64 * 1024
CHUNKS_COUNT_MAX: Final = 1 << 32
"""256 TiB, and the number of invocations that NIST SP 800-38D (section 8.3) allows under one key."""
WRAPPED_KEY_BYTES_MAX: Final = 1024
WRAP_AAD: Final = b"minikms-stream v1"
"""The `aad` of a stream's data key. With another `aad`, a data key for another use does not open as one of a stream."""

_MAGIC: Final = b"minikms-stream\0"
_VERSION: Final = 1
_KEY_ID_BYTES: Final = 28
_HEAD: Final = struct.Struct(f">15sB{_KEY_ID_BYTES}sH")
_SEALED_BYTES: Final = CHUNK_BYTES + TAG_BYTES


class StreamSource(Protocol):
    """A binary file, or a pipe that blocks."""

    def read(self, size: int, /) -> bytes | None: ...


class StreamTarget(Protocol):
    """A binary file, or a pipe that blocks."""

    def write(self, data: memoryview, /) -> int: ...


class StreamCopy(NamedTuple):
    """The key of a stream, and the bytes that were written."""

    key_id: str
    size: int


class StreamHeader(NamedTuple):
    """Which key opens the stream. wrapped_key: the data key, sealed by `/generate_data_key` under `key_id`."""

    key_id: str
    wrapped_key: bytes

    def encode(self) -> bytes:
        """The header's bytes. Raises ValueError for a malformed key id, and for an empty or too long wrapped key."""
        if api.KEY_ID_PATTERN.fullmatch(self.key_id) is None:
            raise ValueError("not a key id")
        if not 1 <= len(self.wrapped_key) <= WRAPPED_KEY_BYTES_MAX:
            raise ValueError("not a wrapped key")
        return _HEAD.pack(_MAGIC, _VERSION, self.key_id.encode("ascii"), len(self.wrapped_key)) + self.wrapped_key


def seal_stream(key: memoryview, header: StreamHeader, plaintext: Iterable[bytes]) -> Iterator[bytes]:
    """The sealed stream, header first, of plaintext in parts of any size.

    key: a view of the 32 bytes of the data key, which was made for this stream. Raises TooLargeError after
    `CHUNKS_COUNT_MAX` chunks; what it has yielded does not open.
    """
    head = header.encode()
    aad = _aad(head)
    yield head
    for number, (chunk, final) in enumerate(_blocks(plaintext, CHUNK_BYTES)):
        # One cipher object for each chunk, because it holds a key schedule (see `aead`).
        yield AESGCM(key).encrypt(_nonce(number, final=final), chunk, aad)


def split_header(sealed: Iterable[bytes]) -> tuple[StreamHeader, Iterator[bytes]]:
    """The header of a sealed stream, and its rest for `open_stream`. Both are not authenticated yet.

    Raises InvalidRequestError if the data is not a stream, or has another version.
    """
    parts = iter(sealed)
    head, tail = _take(parts, _HEAD.size)
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise InvalidRequestError("this is not a stream that miniKMS encrypted")
    _, version, key_id, wrapped_bytes = _HEAD.unpack(head)
    if version != _VERSION:
        raise InvalidRequestError("this stream was encrypted by another version of miniKMS")
    text = key_id.decode("ascii", "replace")
    if api.KEY_ID_PATTERN.fullmatch(text) is None or not 1 <= wrapped_bytes <= WRAPPED_KEY_BYTES_MAX:
        raise InvalidRequestError("the header of the stream is damaged")
    # `chain` does not close `parts` when it is dropped; a generator with `yield from` would.
    wrapped, tail = _take(chain((tail,), parts), wrapped_bytes)
    if len(wrapped) < wrapped_bytes:
        raise InvalidRequestError("the stream ends within its header")
    return StreamHeader(text, wrapped), chain((tail,), parts)


def open_stream(key: memoryview, header: StreamHeader, sealed: Iterable[bytes]) -> Iterator[bytes]:
    """The plaintext in authenticated chunks. It is complete only when the iterator ends without an error.

    sealed: from `split_header`. Raises DecryptionError if anything was altered, removed or added, or if the key is
    another one, without saying which.
    """
    aad = _aad(header.encode())
    for number, (chunk, final) in enumerate(_blocks(sealed, _SEALED_BYTES)):
        if len(chunk) < TAG_BYTES or (len(chunk) == TAG_BYTES and number > 0):
            raise _not_open()
        try:
            plaintext = AESGCM(key).decrypt(_nonce(number, final=final), chunk, aad)
        except InvalidTag:
            raise _not_open() from None
        yield plaintext


def parts(source: StreamSource, stop: threading.Event | None = None) -> Iterator[bytes]:
    """The bytes of a source, part by part. Raises InterruptedError once `stop` is set, and BlockingIOError for a source
    that does not block: an end there would be the end of the stream.
    """
    while part := source.read(READ_BYTES):
        yield part
        if stop is not None and stop.is_set():
            raise InterruptedError("the stream was cancelled")
    if part is None:
        raise BlockingIOError("the source of a stream must block")


def seal_to(target: StreamTarget, key_id: str, answer: api.DataKeyAnswer, plaintext: Iterable[bytes]) -> StreamCopy:
    """Seals a stream under a new data key, the answer of `/generate_data_key` with the `aad` WRAP_AAD."""
    if not isinstance(answer.plaintext, bytes):
        raise KmsProtocolError("the key service gave no data key")
    with _zeroed(answer.plaintext) as key:
        return _copy(key_id, seal_stream(key, StreamHeader(key_id, answer.ciphertext), plaintext), target)


def open_to(target: StreamTarget, header: StreamHeader, data_key: bytes, sealed: Iterable[bytes]) -> StreamCopy:
    """Opens the rest of a stream, of `split_header`. What was written is whole only if this returns."""
    with _zeroed(data_key) as key:
        return _copy(header.key_id, open_stream(key, header, sealed), target)


async def in_thread(stop: threading.Event, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `work` in a thread. If the caller is cancelled, sets `stop` and waits for the thread, which may
    still use the caller's files.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        _ = running.exception()
        raise


def _copy(key_id: str, content: Iterable[bytes], target: StreamTarget) -> StreamCopy:
    size = 0
    for part in content:
        rest = memoryview(part)
        size += len(rest)
        while rest:  # a raw file may write less
            rest = rest[target.write(rest) :]
    return StreamCopy(key_id, size)


@contextmanager
def _zeroed(key: bytes) -> Iterator[memoryview]:
    """A view of a copy of the key, zeroed at the end."""
    copy = bytearray(key)
    try:
        yield memoryview(copy)
    finally:
        copy[:] = bytes(len(copy))


def _aad(head: bytes) -> bytes:
    return api.STREAM_LABEL + len(head).to_bytes(4, "big") + head


def _nonce(number: int, *, final: bool) -> bytes:
    if number >= CHUNKS_COUNT_MAX:
        raise TooLargeError("a stream has at most 2^32 chunks of 64 KiB")
    return number.to_bytes(11, "big") + (b"\1" if final else b"\0")


def _blocks(parts: Iterable[bytes], size: int) -> Iterator[tuple[bytearray | memoryview, bool]]:
    """`parts` as blocks of `size`, each with whether it is the last one, which may be shorter or empty.

    A block is valid until the next one is requested.
    """
    pending = bytearray()  # at most `size`: the block that may be the last one
    for part in parts:
        view = memoryview(part)
        while len(pending) + len(view) > size:
            missing = size - len(pending)
            if pending:
                pending += view[:missing]
                yield pending, False
                pending = bytearray()
            else:
                yield view[:missing], False
            view = view[missing:]
        pending += view
    yield pending, True


def _take(parts: Iterator[bytes], size: int) -> tuple[bytes, bytes]:
    """The first `size` bytes, or all if there are fewer, and the rest of the last part."""
    content = bytearray()
    while len(content) < size:
        part = next(parts, None)
        if part is None:
            break
        content += part
    return bytes(content[:size]), bytes(content[size:])


def _not_open() -> DecryptionError:
    return DecryptionError("the stream does not open: it was altered or truncated, or belongs to another key")
