"""Encrypted streams: reading one gives exactly the plaintext, in order and complete, or an error."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.errors import DecryptionError, InvalidRequestError, TooLargeError
from minikms.client import streams
from minikms.client.streams import CHUNK_BYTES, StreamHeader, open_stream, seal_stream, split_header
from minikms.crypto import labels

PLACE = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((PLACE / "stream.json").read_text("ascii"))
HEADER = StreamHeader(VECTORS["key_id"], bytes.fromhex(VECTORS["wrapped_key"]))
KEY = memoryview(bytes.fromhex(VECTORS["key"]))
SEALED_BYTES = CHUNK_BYTES + 16


def plaintext(size: int) -> bytes:
    return bytes((i + (i >> 8)) & 0xFF for i in range(size))


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """`data` in parts of these sizes, then the rest."""
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


def sealed_chunks(size: int) -> tuple[bytes, list[bytes]]:
    """The header and the sealed chunks of a stream of `size` bytes."""
    header, *chunks = seal_stream(KEY, HEADER, [plaintext(size)])
    return header, chunks


def opened(sealed: Iterable[bytes], key: memoryview = KEY) -> bytes:
    header, rest = split_header(sealed)
    return b"".join(open_stream(key, header, rest))


def refused(sealed: Iterable[bytes], key: memoryview = KEY) -> None:
    with pytest.raises(DecryptionError, match="altered or truncated"):
        opened(sealed, key)


def test_the_script_makes_these_vectors() -> None:
    assert subprocess.run([sys.executable, PLACE / "make_stream.py", "--check"], check=False).returncode == 0


@pytest.mark.parametrize("vector", VECTORS["streams"], ids=lambda vector: str(vector["plaintext_bytes"]))
def test_known_answers(vector: dict[str, Any]) -> None:
    text = plaintext(vector["plaintext_bytes"])
    sealed = b"".join(seal_stream(KEY, HEADER, [text]))
    assert len(sealed) == vector["bytes"]
    assert hashlib.sha256(sealed).hexdigest() == vector["sha256"]
    assert sealed.hex() == vector.get("sealed", sealed.hex())
    assert opened([sealed]) == text


@given(
    st.integers(0, 3 * CHUNK_BYTES),
    st.lists(st.integers(0, 2 * CHUNK_BYTES), max_size=5),
    st.lists(st.integers(0, 2 * CHUNK_BYTES), max_size=5),
)
@settings(max_examples=30)
def test_a_stream_can_be_cut_into_any_parts(size: int, sealed_by: list[int], opened_by: list[int]) -> None:
    text = plaintext(size)
    sealed = b"".join(seal_stream(KEY, HEADER, cut(text, sealed_by)))
    assert sealed == b"".join(seal_stream(KEY, HEADER, [text]))
    assert opened(cut(sealed, opened_by)) == text


def test_a_stream_can_come_byte_by_byte() -> None:
    sealed = b"".join(seal_stream(KEY, HEADER, [bytes([byte]) for byte in plaintext(300)]))
    assert opened(bytes([byte]) for byte in sealed) == plaintext(300)


def test_at_most_one_chunk_is_held() -> None:
    """After k parts of a chunk each, there are k - 1 chunks: the newest may be the last one, so it waits."""
    given_out = 0

    def parts() -> Iterator[bytes]:
        nonlocal given_out
        for _ in range(5):
            given_out += 1
            yield bytes(CHUNK_BYTES)

    chunks = seal_stream(KEY, HEADER, parts())
    next(chunks)
    assert given_out == 0
    for expected in (2, 3, 4, 5, 5):
        next(chunks)
        assert given_out == expected
    assert next(chunks, None) is None


def test_every_changed_bit_of_a_short_stream_is_refused() -> None:
    sealed = b"".join(seal_stream(KEY, HEADER, [b"text"]))
    for offset in range(len(sealed)):
        for bit in (0, 7):
            altered = bytearray(sealed)
            altered[offset] ^= 1 << bit
            with pytest.raises((DecryptionError, InvalidRequestError)):
                opened([bytes(altered)])


def test_a_stream_cut_anywhere_is_refused() -> None:
    sealed = b"".join(seal_stream(KEY, HEADER, [plaintext(2 * CHUNK_BYTES + 9)]))
    head = len(HEADER.encode())
    ends = [*range(head + 40), *(head + number * SEALED_BYTES + d for number in (1, 2) for d in (-1, 0, 1, 15, 16, 17))]
    for end in ends:
        with pytest.raises((DecryptionError, InvalidRequestError)):
            opened([sealed[:end]])
    refused([sealed[:-1]])


@pytest.mark.parametrize("added", [b"\0", bytes(16), bytes(SEALED_BYTES)])
@pytest.mark.parametrize("size", [0, 5, CHUNK_BYTES])
def test_bytes_added_at_the_end_are_refused(size: int, added: bytes) -> None:
    header, chunks = sealed_chunks(size)
    refused([header, *chunks, added])


def test_chunks_moved_dropped_repeated_or_added_are_refused() -> None:
    header, (a, b, c, d) = sealed_chunks(3 * CHUNK_BYTES + 9)
    for chunks in ([b, a, c, d], [a, c, d], [a, a, b, c, d], [a, b, d], [a, b, c, d, d], [a, b, c], [b, c, d], [d], []):
        refused([header, *chunks])


def test_a_chunk_of_another_stream_is_refused() -> None:
    header, chunks = sealed_chunks(3 * CHUNK_BYTES)
    other = StreamHeader(HEADER.key_id, HEADER.wrapped_key[:-1] + b"\0")
    _, *others = seal_stream(KEY, other, [plaintext(3 * CHUNK_BYTES)])
    refused([header, chunks[0], others[1], chunks[2]])
    refused([other.encode(), *chunks])


def test_a_stream_may_not_end_in_an_empty_chunk() -> None:
    """Only a holder of the key can make this second form of the same plaintext; it is refused too."""
    aad = labels.aad(labels.STREAM, HEADER.encode())
    full = AESGCM(KEY).encrypt(bytes(12), bytes(CHUNK_BYTES), aad)
    empty = AESGCM(KEY).encrypt(bytes(10) + b"\1\1", b"", aad)
    refused([HEADER.encode(), full, empty])


def test_another_key_is_refused() -> None:
    header, chunks = sealed_chunks(10)
    refused([header, *chunks], memoryview(bytes(32)))


def test_chunks_before_an_altered_chunk_are_authentic() -> None:
    header, (a, b, c) = sealed_chunks(3 * CHUNK_BYTES)
    chunks = open_stream(KEY, HEADER, [a, b[:-1] + bytes([b[-1] ^ 1]), c])
    assert next(chunks) == plaintext(CHUNK_BYTES)
    with pytest.raises(DecryptionError):
        next(chunks)
    assert header == HEADER.encode()


def test_a_stream_has_a_bounded_number_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    header, chunks = sealed_chunks(3 * CHUNK_BYTES)
    monkeypatch.setattr(streams, "CHUNKS_COUNT_MAX", 2)
    with pytest.raises(TooLargeError):
        list(seal_stream(KEY, HEADER, [bytes(3 * CHUNK_BYTES)]))
    with pytest.raises(TooLargeError):
        opened([header, *chunks])


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_not_a_stream(content: bytes) -> None:
    with pytest.raises(InvalidRequestError):
        split_header([content])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({15: b"\2"}, "another version"),
        ({16: b"K_"}, "damaged"),
        ({16: b"\xff\xff"}, "damaged"),
        ({44: b"\0\0"}, "damaged"),
        ({44: b"\4\1"}, "damaged"),
        ({44: b"\3\xff"}, "ends within"),
        ({0: b"M"}, "not a stream"),
    ],
)
def test_a_damaged_header_is_refused(change: dict[int, bytes], reason: str) -> None:
    head = bytearray(HEADER.encode())
    for offset, value in change.items():
        head[offset : offset + len(value)] = value
    with pytest.raises(InvalidRequestError, match=reason):
        split_header([bytes(head), bytes(20)])


@pytest.mark.parametrize("header", [("k_", b"x"), (HEADER.key_id, b""), (HEADER.key_id, bytes(1025))])
def test_a_header_that_could_not_be_read_back_is_not_written(header: tuple[str, bytes]) -> None:
    with pytest.raises(ValueError, match="not a"):
        StreamHeader(*header).encode()
