"""A search of another process's memory for keys, as root, in every form that reveals a key.

Owns: the forms of a key (`forms_of`, `ghash_forms`) and the search for them in a live process or in a file.
Invariants: every byte that the kernel lets root read is searched, and every other region is reported; the search is
exact. It must know nothing about the program that it searches.

How 6,000 needles pass over some hundred megabytes in a second: a needle of 15 bytes or more covers a whole 8-byte word
of the data, wherever it lies. So the data is read as a sequence of words. The set of all words that needles can show
there is asked, in C, whether it has one of them. Only the few windows that have one are searched in Python.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.harness import decryptor

CHUNK_BYTES = 8 * 1024 * 1024
WINDOW_BYTES = 4096
HALF_BYTES = 16
GHASH_POWERS = 48
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
WORD_FORMATS: dict[int, Literal["Q", "I"]] = {8: "Q", 4: "I"}
"""Of memoryview.cast, by the size of a word in bytes."""
_ZEROES = bytes(WINDOW_BYTES)


class Needle(NamedTuple):
    name: str
    form: str
    data: bytes


class Hit(NamedTuple):
    name: str
    form: str
    where: str


class Report(NamedTuple):
    hits: list[Hit]
    bytes_read: int
    unreadable: list[str]
    """Regions, as in /proc/<pid>/maps, that the kernel does not let root read."""


# --- the forms of a key -------------------------------------------------------------------------------------------
def forms_of(name: str, key: bytes) -> list[Needle]:
    """Every needle for a 32-byte key. A whole key is found by its halves."""
    found = [Needle(name, "half", half) for half in _halves(key)]
    for half in _halves(key):
        found += [Needle(name, "hex", text) for text in {half.hex().encode(), half.hex().upper().encode()}]
        found += [Needle(name, "base64", text) for text in _base64_texts(half)]
    for round_key in aes256_round_keys(key)[2:]:  # the first two are the halves
        found += [Needle(name, "round key", round_key), Needle(name, "round key", _swap_words(round_key))]
    for pad in (0x36, 0x5C):
        state = sha256_state_after(bytes(byte ^ pad for byte in key.ljust(64, b"\0")))
        for order in ("<", ">"):
            found += [Needle(name, "HMAC midstate", half) for half in _halves(struct.pack(f"{order}8I", *state))]
    return found


def ed25519_forms(name: str, seed: bytes) -> list[Needle]:
    """What signing makes of a seed (RFC 8032, 5.1.5): the scalar, clamped and not, and the prefix."""
    digest = hashlib.sha512(seed).digest()
    clamped = bytes([digest[0] & 0xF8]) + digest[1:31] + bytes([digest[31] & 0x7F | 0x40])
    return [
        Needle(name, "expanded seed", half) for part in (digest[:32], clamped, digest[32:]) for half in _halves(part)
    ]


def cmac_forms(name: str, key: bytes) -> list[Needle]:
    """What CMAC makes of a 32-byte key (SP 800-38B, 6.1): the encrypted block of zeroes, and K1."""
    return [
        Needle(name, form, block)
        for form, value in (("CMAC block", decryptor.cmac_block(key)), ("CMAC K1", decryptor.k1(key)))
        for block in (value, _swap_words(value))
    ]


def x25519_forms(name: str, private: bytes) -> list[Needle]:
    """A private key as X25519 uses it (RFC 7748, section 5)."""
    clamped = bytes([private[0] & 0xF8]) + private[1:31] + bytes([private[31] & 0x7F | 0x40])
    return [Needle(name, "clamped", half) for half in _halves(clamped)]


def ghash_forms(name: str, key: bytes) -> list[Needle]:
    """The powers of the hash key of GCM under a 32-byte key (SP 800-38D, 6.3 and 7.1), as code for carry-less
    multiplication keeps them: multiplied by x, the bytes in reverse order.
    """
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    hash_key = power = int.from_bytes(encryptor.update(bytes(16)), "big")
    found = []
    for exponent in range(1, GHASH_POWERS + 1):
        shifted = (power << 1 & (1 << 128) - 1) ^ (0xC2 << 120 | 1 if power >> 127 else 0)
        found.append(Needle(name, f"power {exponent} of the hash key", shifted.to_bytes(16, "little")))
        power = _gf128_product(power, hash_key)
    return found


def _gf128_product(x: int, y: int) -> int:
    """SP 800-38D, algorithm 1."""
    product = 0
    for place in reversed(range(128)):
        if x >> place & 1:
            product ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return product


def _halves(value: bytes) -> tuple[bytes, bytes]:
    return value[:HALF_BYTES], value[HALF_BYTES:]


def _swap_words(value: bytes) -> bytes:
    """As implementations that load big-endian words keep it on a little-endian machine."""
    return b"".join(value[start : start + 4][::-1] for start in range(0, len(value), 4))


def _base64_texts(value: bytes) -> set[bytes]:
    """The characters that depend on nothing but `value`, wherever it begins in the encoded text, in both alphabets."""
    texts = set()
    for skipped in range(3):
        whole = value[skipped : skipped + (len(value) - skipped) // 3 * 3]
        texts |= {base64.b64encode(whole), base64.urlsafe_b64encode(whole)}
    return texts


def _sbox() -> bytes:
    """FIPS 197, 5.1.1: the multiplicative inverse in GF(2^8), then the affine transformation."""
    box = bytearray(256)
    p = q = 1
    while True:
        p ^= (p << 1 & 0xFF) ^ (0x1B if p & 0x80 else 0)  # p * 3
        q ^= q << 1  # q / 3
        q ^= q << 2
        q ^= q << 4
        q &= 0xFF
        if q & 0x80:
            q ^= 0x09
        spread = q ^ _rotate8(q, 1) ^ _rotate8(q, 2) ^ _rotate8(q, 3) ^ _rotate8(q, 4)
        box[p] = spread ^ 0x63
        if p == 1:
            break
    box[0] = 0x63
    return bytes(box)


def _rotate8(value: int, count: int) -> int:
    return (value << count | value >> 8 - count) & 0xFF


_SBOX = _sbox()


def aes256_round_keys(key: bytes) -> list[bytes]:
    """The 15 round keys of FIPS 197, 5.2."""
    words = [key[start : start + 4] for start in range(0, 32, 4)]
    constant = 1
    for index in range(8, 60):
        word = words[-1]
        if index % 8 == 0:
            word = bytes([_SBOX[word[1]] ^ constant, _SBOX[word[2]], _SBOX[word[3]], _SBOX[word[0]]])
            constant <<= 1
        elif index % 8 == 4:
            word = bytes(_SBOX[byte] for byte in word)
        words.append(bytes(a ^ b for a, b in zip(words[-8], word, strict=True)))
    return [b"".join(words[start : start + 4]) for start in range(0, 60, 4)]


def _primes(count: int) -> list[int]:
    primes: list[int] = []
    candidate = 2
    while len(primes) < count:
        if all(candidate % prime for prime in primes):
            primes.append(candidate)
        candidate += 1
    return primes


def _root_fraction(prime: int, degree: int) -> int:
    """The first 32 bits of the fraction of a root (FIPS 180-4, 4.2.2 and 5.3.3)."""
    scaled = prime << 32 * degree
    low, high = 0, prime << 32
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= scaled else (low, middle - 1)
    return low & 0xFFFFFFFF


_SHA256_K = [_root_fraction(prime, 3) for prime in _primes(64)]
_SHA256_START = [_root_fraction(prime, 2) for prime in _primes(8)]


def _rotate32(value: int, count: int) -> int:
    return (value >> count | value << 32 - count) & 0xFFFFFFFF


def sha256_state_after(block: bytes) -> list[int]:
    """The eight words after one 64-byte block (FIPS 180-4, 6.2.2): what a kept hash object holds."""
    w = list(struct.unpack(">16I", block))
    for t in range(16, 64):
        small0 = _rotate32(w[t - 15], 7) ^ _rotate32(w[t - 15], 18) ^ w[t - 15] >> 3
        small1 = _rotate32(w[t - 2], 17) ^ _rotate32(w[t - 2], 19) ^ w[t - 2] >> 10
        w.append((w[t - 16] + small0 + w[t - 7] + small1) & 0xFFFFFFFF)
    a, b, c, d, e, f, g, h = _SHA256_START
    for t in range(64):
        big1 = _rotate32(e, 6) ^ _rotate32(e, 11) ^ _rotate32(e, 25)
        first = h + big1 + (e & f ^ ~e & g) + _SHA256_K[t] + w[t]
        big0 = _rotate32(a, 2) ^ _rotate32(a, 13) ^ _rotate32(a, 22)
        second = big0 + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, h = (first + second) & 0xFFFFFFFF, a, b, c, (d + first) & 0xFFFFFFFF, e, f, g
    return [(x + y) & 0xFFFFFFFF for x, y in zip(_SHA256_START, (a, b, c, d, e, f, g, h), strict=True)]


_SCHEDULE_BYTES = 240
_SUMS_OF_A_SCHEDULE = re.compile(rb"(?:(?!\0{4}).{4}\0{12}){6}", re.DOTALL)
"""From the ninth word on: three of four words are the sum of the one before and the eighth before (FIPS 197, 5.2)."""


_ZEROES_OF_A_SUM = re.compile(rb"[^\0]\0{12,18}(?!\0)")
"""The three words, between bytes that are not zero; the words beside them may begin and end with zeroes."""


def aes256_schedules(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each AES-256 key whose whole schedule lies in `data`, with its position, whatever the key is."""
    value = int.from_bytes(data, "little")
    sums = (value ^ value << 32 ^ value << 256).to_bytes(len(data) + 33, "little")
    for zeroes in _ZEROES_OF_A_SUM.finditer(sums, 32, len(data)):  # five times as fast as to look for the whole
        for place in range(max(32, zeroes.start() - 3), zeroes.start() + 1):
            if not _SUMS_OF_A_SCHEDULE.match(sums, place, len(data)):
                continue
            start = place - 32
            key = data[start : start + 32]
            if data[start : start + _SCHEDULE_BYTES] == b"".join(aes256_round_keys(key)):
                yield start, key


# --- the search ---------------------------------------------------------------------------------------------------
class Matcher:
    """Finds all needles at once. Each needle has at least 7 bytes; from 15 bytes on the search is faster."""

    def __init__(self, needles: Iterable[Needle]) -> None:
        needles = list(needles)
        lengths = [len(needle.data) for needle in needles]
        self.needle_bytes_max = max(lengths)
        self._word_bytes = next(size for size in WORD_FORMATS if 2 * size - 1 <= min(lengths))
        self._places: dict[int, list[tuple[int, Needle]]] = {}
        """By each word that a needle can show: where the word is in which needle."""
        for needle in needles:
            for offset in range(self._word_bytes):
                word = int.from_bytes(needle.data[offset : offset + self._word_bytes], sys.byteorder)
                self._places.setdefault(word, []).append((offset, needle))
        self._words = frozenset(self._places)

    def search(self, data: bytes) -> Iterator[tuple[int, Needle]]:
        """Each needle that lies wholly in `data`, with its position."""
        size = self._word_bytes
        words = memoryview(data)[: len(data) // size * size].cast(WORD_FORMATS[size])
        step = WINDOW_BYTES // size
        for first in range(0, len(words), step):
            # Memory is mostly zeroes, which are compared faster than they are looked up.
            if 0 not in self._words and data.startswith(_ZEROES, first * size):
                continue
            window = words[first : first + step]
            if not self._words.isdisjoint(window):
                yield from self._search_words(data, window, first * size)

    def _search_words(self, data: bytes, window: memoryview[int], position: int) -> Iterator[tuple[int, Needle]]:
        for place, word in enumerate(window):
            for offset, needle in self._places.get(word, ()):
                start = position + place * self._word_bytes - offset
                if start >= 0 and data[start : start + len(needle.data)] == needle.data:
                    yield start, needle


class _Region(NamedTuple):
    start: int
    end: int
    line: str

    @property
    def permissions(self) -> str:
        return self.line.split()[1]

    @property
    def mapped_readable(self) -> bool:
        return self.permissions.startswith("r")

    @property
    def offset(self) -> int:
        return int(self.line.split()[2], 16)

    @property
    def path(self) -> str:
        """Of the file that is mapped; empty for anonymous memory."""
        words = self.line.split(maxsplit=5)
        return words[5] if len(words) == 6 else ""


def _regions(pid: int) -> list[_Region]:
    regions = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            start, end = (int(part, 16) for part in line.split(maxsplit=1)[0].split("-"))
            regions.append(_Region(start, end, line.strip()))
    return regions


class _Libraries:
    """The files that the process runs code from. Their own bytes, read back unchanged, need no search: a key that is
    made or given at run time is not in them. A data file, mapped or not, is none of them.
    """

    def __init__(self, regions: list[_Region]) -> None:
        paths = {region.path for region in regions if "x" in region.permissions and region.path.startswith("/")}
        self._files = {path: os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths if os.path.isfile(path)}

    def hold(self, region: _Region, address: int, data: bytes) -> bool:
        """Whether `data`, read at `address`, is what the file has at that place."""
        descriptor = self._files.get(region.path)
        return descriptor is not None and data == os.pread(
            descriptor, len(data), region.offset + address - region.start
        )

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)


def scan_process(pid: int, needles: Iterable[Needle]) -> Report:
    """Search all memory of the process `pid`, readable to itself or not, through /proc/<pid>/mem."""
    regions = _regions(pid)
    needles = list(needles)
    hits: list[Hit] = []
    unreadable: list[str] = []
    bytes_read = 0
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    libraries = _Libraries(regions)
    try:
        matcher = Matcher(needles)
        for region in regions:
            refused = 0
            for start, end in _parts(pagemap, region):
                for address, data, missing in _read(memory, start, end, matcher.needle_bytes_max - 1):
                    refused += missing
                    bytes_read += len(data)
                    if libraries.hold(region, address, data):
                        continue
                    hits += [
                        Hit(needle.name, needle.form, f"{address + position:#x} in {region.line}")
                        for position, needle in matcher.search(data)
                    ]
            if refused:
                unreadable.append(region.line)
    finally:
        os.close(memory)
        os.close(pagemap)
        libraries.close()
    return Report(hits, bytes_read, unreadable)


def memory(pid: int, *, overlap: int) -> Iterator[bytes]:
    """All memory of a process that root can read, in chunks of which each repeats the last bytes of the one before."""
    memory_fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for region in _regions(pid):
            for start, end in _parts(pagemap, region):
                yield from (data for _, data, _ in _read(memory_fd, start, end, overlap))
    finally:
        os.close(memory_fd)
        os.close(pagemap)


def scan_file(path: str, needles: Iterable[Needle]) -> Report:
    """Search a file: a core, an environment, a log."""
    hits: list[Hit] = []
    bytes_read = 0
    with open(path, "rb") as file:
        head = file.read(CHUNK_BYTES)
        matcher = Matcher(needles)
        tail, position = b"", 0
        while head:
            data = tail + head
            hits += [
                Hit(needle.name, needle.form, f"{path} at {position - len(tail) + place}")
                for place, needle in matcher.search(data)
            ]
            bytes_read += len(head)
            position += len(head)
            tail = data[-(matcher.needle_bytes_max - 1) :]
            head = file.read(CHUNK_BYTES)
    return Report(hits, bytes_read, [])


def _parts(pagemap: int, region: _Region) -> Iterator[tuple[int, int]]:
    """The whole region if the process may read it; of the others (reserved, mostly empty) the pages that exist."""
    if region.mapped_readable:
        yield region.start, region.end
        return
    present = 1 << 63 | 1 << 62  # in memory, or swapped out: pagemap of proc_pid_pagemap(5)
    for first in range(region.start, region.end, CHUNK_BYTES):
        last = min(region.end, first + CHUNK_BYTES)
        entries = os.pread(pagemap, (last - first) // PAGE_BYTES * 8, first // PAGE_BYTES * 8)
        for index, (entry,) in enumerate(struct.iter_unpack("=Q", entries)):
            if entry & present:
                yield first + index * PAGE_BYTES, first + (index + 1) * PAGE_BYTES


def _read(memory: int, start: int, end: int, overlap: int) -> Iterator[tuple[int, bytes, int]]:
    """Chunks of what can be read, each with its address and the count of refused pages before it.

    Chunks that follow each other overlap, so that no needle falls between two.
    """
    address, refused, tail = start, 0, b""
    while address < end:
        try:
            data = os.pread(memory, min(CHUNK_BYTES, end - address), address)
        except OSError:
            data = b""
        if data:
            yield address - len(tail), tail + data, refused
            address += len(data)
            refused, tail = 0, data[-overlap:] if overlap else b""
        else:
            refused, tail = refused + 1, b""
            address += PAGE_BYTES
    if refused:
        yield end, b"", refused
