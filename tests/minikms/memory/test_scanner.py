"""The scanner finds what it claims to find: a search that cannot find a planted key proves nothing."""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import needs
from tests.minikms.memory import scanner

MASK = 0x5A
CHILD = textwrap.dedent(f"""
    import sys
    planted = []
    for line in sys.stdin:
        if line == "go\\n":
            break
        planted.append(bytes(byte ^ {MASK} for byte in bytes.fromhex(line)))
    {{extra}}
    print("ready", flush=True)
    sys.stdin.read()
""")


class Planted:
    """A process that holds what it was sent, sent masked so that nothing else of it is found."""

    def __init__(self, values: list[bytes], extra: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD.replace("{extra}", extra)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        for value in values:
            self._process.stdin.write(bytes(byte ^ MASK for byte in value).hex() + "\n")
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "ready\n"
        self.pid = self._process.pid

    def __enter__(self) -> Planted:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_the_key_schedule_is_that_of_fips_197() -> None:
    """Appendix A.3."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    keys = scanner.aes256_round_keys(key)
    assert len(keys) == 15 and b"".join(keys[:2]) == key
    assert keys[2].hex() == "9ba354118e6925afa51a8b5f2067fcde"
    assert keys[14].hex() == "fe4890d1e6188d0b046df344706c631e"


def test_the_midstates_are_those_of_hmac() -> None:
    """HMAC of an empty message, finished by hand from the two midstates, is what the library computes."""
    key = random.Random(1).randbytes(32)
    inner, outer = (
        scanner.sha256_state_after(bytes(byte ^ pad for byte in key.ljust(64, b"\0"))) for pad in (0x36, 0x5C)
    )
    inner_digest = _finish(inner, b"")
    assert _finish(outer, inner_digest) == hmac.digest(key, b"", hashlib.sha256)


def _finish(state: list[int], message: bytes) -> bytes:
    """SHA-256 from `state`, which has taken one block in, over a message short enough for one more."""
    block = message + b"\x80" + bytes(55 - len(message)) + (8 * (64 + len(message))).to_bytes(8, "big")
    saved = scanner._SHA256_START
    try:
        scanner._SHA256_START = state
        return b"".join(word.to_bytes(4, "big") for word in scanner.sha256_state_after(block))
    finally:
        scanner._SHA256_START = saved


def test_every_form_of_a_planted_key_is_found_and_no_other_key() -> None:
    needs.root()
    planted_key, other_key = os.urandom(32), os.urandom(32)
    forms = scanner.forms_of("planted", planted_key)
    with Planted([needle.data for needle in forms]) as process:
        report = scanner.scan_process(process.pid, forms + scanner.forms_of("other", other_key))
    assert {hit.name for hit in report.hits} == {"planted"}
    assert {hit.form for hit in report.hits} == {"half", "hex", "base64", "round key", "HMAC midstate"}
    assert len(report.hits) >= len(forms)
    assert report.bytes_read > 1_000_000


@pytest.mark.parametrize("offset", range(3))
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_base64_is_found_at_every_alignment(offset: int, encode: Callable[[bytes], bytes]) -> None:
    key = os.urandom(32)
    text = encode(b"?" * offset + key + b"??")
    matcher = scanner.Matcher(scanner.forms_of("key", key))
    assert {needle.form for _, needle in matcher.search(text)} == {"base64"}


@pytest.mark.parametrize("length", [7, 12, 14, 15, 16, 32])
def test_a_needle_is_found_at_every_alignment(length: int) -> None:
    """Of words and of windows; among zeroes, and where the data ends with it."""
    needle = scanner.Needle("key", "text", random.Random(length).randbytes(length))
    matcher = scanner.Matcher([needle])
    for position in range(2 * scanner.WINDOW_BYTES - 20, 2 * scanner.WINDOW_BYTES + 20):
        for rest in (b"", bytes(100)):
            assert list(matcher.search(bytes(position) + needle.data + rest)) == [(position, needle)]
        assert list(matcher.search(bytes(position) + needle.data[:-1])) == []


def test_a_needle_is_found_where_needles_hold_zeroes() -> None:
    zeroes = scanner.Needle("zeroes", "text", bytes(16))
    matcher = scanner.Matcher([zeroes, scanner.Needle("key", "text", bytes(range(16)))])
    assert {place for place, _ in matcher.search(b"1" * 4097 + bytes(17) + b"1" * 4096)} == {4097, 4098}


def test_what_the_libraries_really_keep_is_found() -> None:
    """A living cipher object holds round keys, and a living HMAC object midstates, in forms that the scanner knows."""
    needs.root()
    key = os.urandom(32)
    code = (
        "import hmac; from cryptography.hazmat.primitives.ciphers.aead import AESGCM; "
        "cipher = AESGCM(planted[0]); mac = hmac.new(planted[0], digestmod='sha256'); planted.clear()"
    )
    with Planted([key], code) as process:
        forms = {hit.form for hit in scanner.scan_process(process.pid, scanner.forms_of("key", key)).hits}
    assert {"round key", "HMAC midstate"} <= forms


def test_a_region_that_even_root_cannot_read_is_reported() -> None:
    needs.root()
    code = (
        "from minikms.memory import SecretArena; "
        "arena = SecretArena(1); slot = arena.allocate(); slot.view[:] = planted.pop()"
    )
    key = os.urandom(32)
    with Planted([key], code) as process:
        report = scanner.scan_process(process.pid, scanner.forms_of("key", key))
    assert any("secretmem" in region for region in report.unreadable)


@pytest.mark.parametrize("place", ["start", "chunk border", "end"])
def test_a_needle_is_found_at_any_place_of_a_file(tmp_path: Path, place: str) -> None:
    key = os.urandom(32)
    size = 2 * scanner.CHUNK_BYTES + 100
    position = {"start": 0, "chunk border": scanner.CHUNK_BYTES - 7, "end": size - 32}[place]
    path = tmp_path / "core"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(position)
        file.write(key)
    report = scanner.scan_file(str(path), scanner.forms_of("key", key))
    assert {hit.where for hit in report.hits} == {f"{path} at {position}", f"{path} at {position + 16}"}
    assert report.bytes_read == size


def test_a_needle_is_found_across_the_chunks_of_a_process() -> None:
    needs.root()
    key = os.urandom(32)
    size = scanner.CHUNK_BYTES
    code = (
        "import mmap; value = planted.pop(); "
        f"big = mmap.mmap(-1, {8 * size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); "
        f"[big.__setitem__(slice(n * {size} - 16, n * {size} + 16), value) for n in range(1, 8)]"
    )
    with Planted([key], code) as process:
        hits = scanner.scan_process(process.pid, scanner.forms_of("key", key)).hits
    assert len({hit.where for hit in hits}) >= 14
