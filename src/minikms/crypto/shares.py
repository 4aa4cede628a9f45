"""Shares of a root key: Shamir's secret sharing over GF(2^8), and the text of a share.

Owns: the field, splitting and combining, and the format of a share (docs/spec/shares.md). Any `threshold` shares of a
set give the root key; fewer are independent of it (Shamir, "How to share a secret", 1979). The digests in the keyring
weaken that to a computational claim: an unlimited attacker could search for a share by its digest.

Invariants:
- Root key, coefficients and shares are views of the arena. No object holds more than one byte of them, and each
  intermediate value is one of the small integers that CPython shares.
- Multiplication has no branch and no table that depends on a secret. CPython promises no constant time beyond that.
- The coefficients are uniform over all 256 values, zero included, and used for one split.
- A share is the key of its checksum and its digest, never their message: a one-shot HMAC leaves no copy of its key.
It must never draw randomness, keep a share, or name the content of a share in an error.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from minikms import api
from minikms.api.errors import InvalidRequestError, ShareTextError
from minikms.crypto import labels

SHARE_BYTES: Final = 32
THRESHOLD_MIN: Final = 2
SHARES_COUNT_MAX: Final = 16

TEXT_CHARS: Final = 118
"""The length of a share as it is written: `mks1-`, then 19 groups of five characters with `-` between them."""

_FORMAT: Final = 1
_KEYRING_ID: Final = re.compile(r"kr_([0-9a-f]{16})")
SET_ID: Final = re.compile(r"[0-9a-f]{16}", re.ASCII)
_HEAD_BYTES: Final = 19
"""Format (1), keyring id (8), set id (8), number (1), threshold (1)."""
_CHECKSUM_BYTES: Final = 8
_PAYLOAD_BYTES: Final = _HEAD_BYTES + SHARE_BYTES + _CHECKSUM_BYTES
_SYMBOLS_COUNT: Final = 95
"""The symbols of five bits each: the 59 bytes of the payload and three zero bits."""
_GROUP_SYMBOLS: Final = 5

_PREFIX: Final = b"mks1"
_ALPHABET: Final = b"0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32."""
_INVALID: Final = 0xFF
_SKIP: Final = 0xFE
_SYMBOLS: Final = bytearray([_INVALID]) * 256
"""The value of each character. As Crockford has it, either case counts, `o` is 0, and `i` and `l` are 1."""
for _value, _char in [*enumerate(_ALPHABET), (0, ord("o")), (1, ord("i")), (1, ord("l"))]:
    _SYMBOLS[_char] = _SYMBOLS[ord(chr(_char).upper())] = _value
for _char in b" -\t\r\n":
    _SYMBOLS[_char] = _SKIP


class ShareInfo(NamedTuple):
    """What a share says beside its secret. `keyring_id`: `kr_` and 16 hex digits. `set_id`: 16 hex digits."""

    keyring_id: str
    set_id: str
    number: int
    threshold: int


def check_counts(threshold: int, count: int) -> None:
    """Checks that `threshold` of `count` shares is possible."""
    if not THRESHOLD_MIN <= threshold <= count <= SHARES_COUNT_MAX:
        raise InvalidRequestError(
            f"{threshold} of {count} shares is not possible: the threshold is {THRESHOLD_MIN} at least, and there are "
            f"{SHARES_COUNT_MAX} shares at most"
        )


# --- the field: GF(2^8) modulo x^8 + x^4 + x^3 + x + 1, as in AES (FIPS 197, section 4.2) -----------------------------


def multiply(one: int, other: int) -> int:
    """The product of two field elements. Every intermediate value is at most 255 and not negative."""
    product = 0
    for bit in range(8):
        product ^= (other >> bit & 1) * one
        one = (one & 0x7F) << 1 ^ (one >> 7) * 0x1B
    return product


def _inverse(value: int) -> int:
    """value^254, the product of value^2, value^4, … value^128. `value` is public and not zero."""
    result = 1
    for _ in range(7):
        value = multiply(value, value)
        result = multiply(result, value)
    return result


# --- splitting and combining ------------------------------------------------------------------------------------------


def split(secret: memoryview, coefficients: Sequence[memoryview], shares: Mapping[int, memoryview]) -> None:
    """Writes share number x, for each key x of `shares`: the value at x of the polynomial of each byte.

    `coefficients` are `threshold` - 1 views of fresh random bytes. The caller zeroes them.
    """
    check_counts(len(coefficients) + 1, len(shares))
    if any(not 1 <= number <= SHARES_COUNT_MAX for number in shares):
        raise ValueError("the number of a share is out of range")
    for number, share in shares.items():
        for index in range(SHARE_BYTES):
            value = 0
            for coefficient in reversed(coefficients):
                value = multiply(value ^ coefficient[index], number)
            share[index] = value ^ secret[index]


def combine(shares: Mapping[int, memoryview], target: memoryview) -> None:
    """Writes the secret into `target`: Lagrange interpolation at 0 of at least `threshold` shares, by their numbers.

    With fewer shares, or shares that don't belong together, the result is another value: the caller checks it.
    """
    if not THRESHOLD_MIN <= len(shares) <= SHARES_COUNT_MAX:
        raise ValueError("the number of shares is out of range")
    if any(not 1 <= number <= SHARES_COUNT_MAX for number in shares):
        raise ValueError("the number of a share is out of range")
    weights = {number: _weight(number, shares) for number in shares}
    for index in range(SHARE_BYTES):
        value = 0
        for number, share in shares.items():
            value ^= multiply(share[index], weights[number])
        target[index] = value


def _weight(number: int, numbers: Mapping[int, memoryview]) -> int:
    """The Lagrange basis polynomial of `number`, at 0. It depends on the numbers only."""
    weight = 1
    for other in numbers:
        if other != number:
            weight = multiply(weight, multiply(other, _inverse(other ^ number)))
    return weight


# --- a share as text --------------------------------------------------------------------------------------------------


def digest(share: memoryview, info: ShareInfo) -> bytes:
    """32 bytes that identify a share in the keyring: HMAC-SHA-256(share, label, head)."""
    return _mac(share, labels.SHARE_DIGEST, _head(info))


def write_text(share: memoryview, info: ShareInfo, text: Sequence[memoryview]) -> None:
    """Writes the text of a share into views of TEXT_CHARS bytes in all."""
    if sum(map(len, text)) != TEXT_CHARS:
        raise ValueError(f"the text of a share has {TEXT_CHARS} bytes")
    head = _head(info)
    payload = _places(memoryview(head), share, memoryview(_mac(share, labels.SHARE_CHECKSUM, head)))
    chars = ((view, index) for view in text for index in range(len(view)))
    for char in _PREFIX:
        view, index = next(chars)
        view[index] = char
    for symbol in range(_SYMBOLS_COUNT):
        if symbol % _GROUP_SYMBOLS == 0:
            view, index = next(chars)
            view[index] = ord("-")
        place, shift = divmod(5 * symbol, 8)
        source, offset = payload[place]
        value = source[offset]
        if shift <= 3:
            value = value >> 3 - shift & 0x1F
        else:
            value = (value & 0xFF >> shift) << shift - 3
            if place + 1 < _PAYLOAD_BYTES:
                source, offset = payload[place + 1]
                value |= source[offset] >> 11 - shift
        view, index = next(chars)
        view[index] = _ALPHABET[value]


def read_text(text: Sequence[memoryview], share: memoryview) -> ShareInfo:
    """Reads a share that somebody typed, into `share`. The caller zeroes `text`.

    Raises ShareTextError for a text that is no share, or has a typing mistake; `share` is zeroed then.
    """
    head, checksum = bytearray(_HEAD_BYTES), bytearray(_CHECKSUM_BYTES)
    try:
        _decode(text, _places(memoryview(head), share, memoryview(checksum)))
        return _checked(bytes(head), share, bytes(checksum))
    except BaseException:
        share[:] = bytes(SHARE_BYTES)
        raise


def _checked(head: bytes, share: memoryview, checksum: bytes) -> ShareInfo:
    if not hmac.compare_digest(_mac(share, labels.SHARE_CHECKSUM, head)[:_CHECKSUM_BYTES], checksum):
        raise ShareTextError(
            "the share has a typing mistake: its checksum does not match; compare it with what was written down"
        )
    info = ShareInfo("kr_" + head[1:9].hex(), head[9:17].hex(), head[17], head[18])
    if head[0] != _FORMAT or not (
        1 <= info.number <= SHARES_COUNT_MAX and THRESHOLD_MIN <= info.threshold <= SHARES_COUNT_MAX
    ):
        raise ShareTextError("the share has a format that this program does not know; use a newer version")
    return info


def _decode(text: Sequence[memoryview], payload: Sequence[tuple[memoryview, int]]) -> None:
    """Writes the payload that the text encodes. The places are zero before, or are overwritten by `_place`."""
    count = 0
    for value in _symbols(text):
        if count < len(_PREFIX):
            if value != _SYMBOLS[_PREFIX[count]]:
                raise ShareTextError("a share begins with mks1-")
        elif count < len(_PREFIX) + _SYMBOLS_COUNT:
            _place(value, count - len(_PREFIX), payload)
        count += 1
    if count != len(_PREFIX) + _SYMBOLS_COUNT:
        raise ShareTextError(
            f"a share has {len(_PREFIX) + _SYMBOLS_COUNT} letters and digits, and this text has {count}: compare it "
            "with what was written down"
        )


def _place(value: int, symbol: int, payload: Sequence[tuple[memoryview, int]]) -> None:
    """Writes the five bits of a symbol. Its first bits complete a byte, or begin one; the others begin the next."""
    place, shift = divmod(5 * symbol, 8)
    target, offset = payload[place]
    before = target[offset] if shift else 0
    if shift <= 3:
        target[offset] = before | value << 3 - shift
        return
    target[offset] = before | value >> shift - 3
    rest = (value & (1 << shift - 3) - 1) << 11 - shift
    if place + 1 < _PAYLOAD_BYTES:
        target, offset = payload[place + 1]
        target[offset] = rest
    elif rest:
        raise ShareTextError("the last character of the share is wrong; compare it with what was written down")


def _symbols(text: Sequence[memoryview]) -> Iterator[int]:
    """The value of each character that counts. Raises ShareTextError for one that can't be in a share."""
    if sum(map(len, text)) > api.SHARE_BYTES_MAX:
        raise ShareTextError(f"a share has {TEXT_CHARS} characters, and this text has more than {api.SHARE_BYTES_MAX}")
    position = 0
    for view in text:
        for char in view:
            position += 1
            value = _SYMBOLS[char]
            if value == _INVALID:
                raise ShareTextError(f"character {position} can't be in a share; compare it with what was written down")
            if value != _SKIP:
                yield value


def _places(head: memoryview, share: memoryview, checksum: memoryview) -> list[tuple[memoryview, int]]:
    """The view and the index of each byte of the payload."""
    parts = ((head, _HEAD_BYTES), (share, SHARE_BYTES), (checksum, _CHECKSUM_BYTES))
    return [(view, index) for view, size in parts for index in range(size)]


def _head(info: ShareInfo) -> bytes:
    keyring = _KEYRING_ID.fullmatch(info.keyring_id)
    if keyring is None or SET_ID.fullmatch(info.set_id) is None:
        raise InvalidRequestError("a share names a keyring as kr_ and 16 hex digits, and a set as 16 hex digits")
    return bytes((_FORMAT, *bytes.fromhex(keyring[1]), *bytes.fromhex(info.set_id), info.number, info.threshold))


def _mac(share: memoryview, label: bytes, head: bytes) -> bytes:
    return hmac.digest(share, labels.aad(label, head), "sha256")
