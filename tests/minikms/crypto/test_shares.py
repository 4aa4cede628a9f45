"""Shares of a root key: the field, splitting, combining, and the text of a share."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyshamir  # type: ignore[import-untyped]  # the package has no types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.errors import InvalidRequestError, ShareTextError
from minikms.crypto import shares
from minikms.crypto.shares import ShareInfo

PLACE = Path(__file__).parents[2] / "vectors"
VECTORS: dict[str, Any] = json.loads((PLACE / "shares.json").read_text("ascii"))
INFO = ShareInfo("kr_0123456789abcdef", "fedcba9876543210", 3, 5)
ELEMENTS = st.integers(0, 255)
KEYS = st.binary(min_size=32, max_size=32)
INFOS = st.builds(
    ShareInfo,
    st.binary(min_size=8, max_size=8).map(lambda value: "kr_" + value.hex()),
    st.binary(min_size=8, max_size=8).map(bytes.hex),
    st.integers(1, 16),
    st.integers(2, 16),
)


def view(value: bytes) -> memoryview:
    return memoryview(bytearray(value))


def split(root: bytes, coefficients: list[bytes], count: int) -> dict[int, bytes]:
    made = {number: view(bytes(32)) for number in range(1, count + 1)}
    shares.split(view(root), [view(coefficient) for coefficient in coefficients], made)
    return {number: bytes(share) for number, share in made.items()}


def combine(given_shares: Mapping[int, bytes]) -> bytes:
    target = view(b"\xff" * 32)
    shares.combine({number: view(share) for number, share in given_shares.items()}, target)
    return bytes(target)


def written(share: bytes, info: ShareInfo) -> str:
    text = view(bytes(shares.TEXT_CHARS))
    shares.write_text(view(share), info, [text[:7], text[7:70], text[70:]])
    return bytes(text).decode("ascii")


def read(text: str) -> tuple[bytes, ShareInfo]:
    """The share may come in any parts."""
    typed, share = view(text.encode("latin-1")), view(b"\xff" * 32)
    info = shares.read_text([typed[:9], typed[9:9], typed[9:]], share)
    return bytes(share), info


def refused(text: str, match: str | None = None) -> None:
    share = view(b"\xff" * 32)
    with pytest.raises(ShareTextError, match=match):
        shares.read_text([view(text.encode("latin-1"))], share)
    assert bytes(share) == bytes(32), "what was decoded is zeroed"


# --- known answers ----------------------------------------------------------------------------------------------------


def test_the_script_makes_these_vectors() -> None:
    assert subprocess.run([sys.executable, PLACE / "make_shares.py", "--check"], check=False).returncode == 0


@pytest.mark.parametrize(("one", "other", "product"), VECTORS["products"])
def test_products_of_fips_197(one: int, other: int, product: int) -> None:
    assert shares.multiply(one, other) == product


@pytest.mark.parametrize("known", VECTORS["sets"], ids=lambda known: f"{known['threshold']}/{len(known['shares'])}")
def test_known_sets(known: dict[str, Any]) -> None:
    root, coefficients = bytes.fromhex(known["root"]), [bytes.fromhex(value) for value in known["coefficients"]]
    made = split(root, coefficients, len(known["shares"]))
    assert {share["number"]: share["share"] for share in known["shares"]} == {n: made[n].hex() for n in made}
    for share in known["shares"]:
        info = ShareInfo(known["keyring_id"], known["set_id"], share["number"], known["threshold"])
        assert written(made[info.number], info) == share["text"]
        assert read(share["text"]) == (made[info.number], info)
        assert shares.digest(view(made[info.number]), info).hex() == share["digest"]


# --- the field, and the oracle ----------------------------------------------------------------------------------------


def test_every_product_is_that_of_the_definition() -> None:
    """Polynomial multiplication and division by 0x11b, for all pairs."""
    for one, other in itertools.product(range(256), range(256)):
        product = 0
        for bit in range(8):
            if other >> bit & 1:
                product ^= one << bit
        for bit in range(14, 7, -1):
            if product >> bit & 1:
                product ^= 0x11B << bit - 8
        assert shares.multiply(one, other) == product


@given(KEYS, st.integers(2, 8), st.integers(0, 4), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_any_threshold_of_the_shares_gives_the_root_key(root: bytes, threshold: int, more: int, pick: Any) -> None:
    made = split(root, [pick.randbytes(32) for _ in range(threshold - 1)], threshold + more)
    for size in range(threshold, threshold + more + 1):
        chosen = pick.sample(sorted(made), size)
        assert combine({number: made[number] for number in chosen}) == root


@given(KEYS, st.integers(2, 5), st.integers(0, 4), st.randoms(use_true_random=False))
@settings(max_examples=8)
def test_another_implementation_combines_our_shares(root: bytes, threshold: int, more: int, pick: Any) -> None:
    made = split(root, [pick.randbytes(32) for _ in range(threshold - 1)], threshold + more)
    chosen = pick.sample(sorted(made), threshold)
    assert bytes(pyshamir.combine([bytearray(made[number] + bytes([number])) for number in chosen])) == root


@given(KEYS, st.integers(2, 3))
@settings(max_examples=3, deadline=None)
def test_we_combine_the_shares_of_another_implementation(root: bytes, threshold: int) -> None:
    """Its numbers are random; ours are at most 16, so it makes all 255 and those are taken."""
    made = {part[-1]: bytes(part[:-1]) for part in pyshamir.split(root, 255, threshold)}
    assert combine({number: made[number] for number in range(17 - threshold, 17)}) == root


@given(KEYS, KEYS, st.lists(KEYS, min_size=1, max_size=3))
@settings(max_examples=40)
def test_one_share_less_fits_every_other_root_key(root: bytes, other: bytes, coefficients: list[bytes]) -> None:
    """For any other root key there are coefficients that give the same `threshold` - 1 shares. That is the secrecy."""
    threshold = len(coefficients) + 1
    made = split(root, coefficients, threshold)
    fewer = {number: made[number] for number in range(1, threshold)}
    # The polynomial through the fewer shares and the other root key at 0, evaluated at the missing number.
    missing = bytearray(32)
    points: dict[int, bytes] = {0: other, **fewer}
    for number, share in points.items():
        weight = 1
        for point in points:
            if point != number:
                weight = shares.multiply(weight, shares.multiply(threshold ^ point, inverse(number ^ point)))
        for index in range(32):
            missing[index] ^= shares.multiply(share[index], weight)
    assert combine({**fewer, threshold: bytes(missing)}) == other


def inverse(value: int) -> int:
    return next(other for other in range(256) if shares.multiply(value, other) == 1)


@pytest.mark.parametrize(("threshold", "count"), [(1, 3), (0, 0), (4, 3), (2, 17), (17, 17), (-1, 5)])
def test_counts_that_are_not_possible_are_refused(threshold: int, count: int) -> None:
    with pytest.raises(InvalidRequestError, match="is not possible"):
        shares.check_counts(threshold, count)


def test_one_share_alone_is_not_combined() -> None:
    with pytest.raises(ValueError, match="out of range"):
        combine({1: bytes(32)})
    with pytest.raises(ValueError, match="out of range"):
        combine({0: bytes(32), 1: bytes(32)})
    with pytest.raises(ValueError, match="out of range"):
        combine({1: bytes(32), shares.SHARES_COUNT_MAX + 1: bytes(32)})
    assert combine(dict.fromkeys(range(1, shares.SHARES_COUNT_MAX + 1), bytes(32))) == bytes(32)
    with pytest.raises(InvalidRequestError):
        split(bytes(32), [], 3)


# --- the text ---------------------------------------------------------------------------------------------------------


@given(KEYS, INFOS)
def test_a_written_share_is_read_again(share: bytes, info: ShareInfo) -> None:
    text = written(share, info)
    assert len(text) == shares.TEXT_CHARS
    assert read(text) == (share, info)


@given(KEYS, INFOS, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_case_hyphens_spaces_and_similar_letters_do_not_count(share: bytes, info: ShareInfo, pick: Any) -> None:
    typed = ""
    for symbol in written(share, info).replace("-", ""):
        typed += pick.choice({"0": "0oO", "1": "1iIlL"}.get(symbol, symbol + symbol.upper()))
        typed += pick.choice(["", "", "", " ", "-"])
    assert read(typed + "\r\n") == (share, info)


def test_every_mistyped_character_is_found() -> None:
    """Each of the 95 symbols, replaced by every other one."""
    text = written(os.urandom(32), INFO)
    for position, right in enumerate(text):
        for wrong in "0123456789abcdefghjkmnpqrstvwxyz":
            if right not in ("-", wrong):
                refused(text[:position] + wrong + text[position + 1 :])


@given(KEYS, st.integers(0, 97))
@settings(max_examples=60)
def test_swapped_lost_and_repeated_characters_are_found(share: bytes, position: int) -> None:
    symbols = written(share, INFO).replace("-", "")
    one, other = symbols[position], symbols[position + 1]
    refused(symbols[:position] + symbols[position + 1 :])
    refused(symbols[:position] + one + symbols[position:])
    if one != other:
        refused(symbols[:position] + other + one + symbols[position + 2 :])


@given(st.binary(max_size=300))
def test_any_other_text_is_refused(text: bytes) -> None:
    refused(text.decode("latin-1"))


def test_the_error_says_what_is_wrong_and_quotes_nothing() -> None:
    text = written(bytes(range(32)), INFO)
    refused(text[:-1], "99 letters and digits, and this text has 98")
    refused("mks2" + text[4:], "begins with mks1-")
    refused(text[:20] + "é" + text[20:], "character 21 can't be in a share")
    refused(text[:20] + "u" + text[21:], "character 21 can't be in a share")
    refused(text + " " * (257 - len(text)), "more than 256")
    assert read(text + " " * (256 - len(text)))
    refused(text[:30] + ("0" if text[30] != "0" else "1") + text[31:], "typing mistake")
    refused("", "this text has 0")


@pytest.mark.parametrize(
    "info", [INFO._replace(number=0), INFO._replace(number=17), INFO._replace(threshold=1), INFO._replace(threshold=99)]
)
def test_numbers_out_of_range_are_refused_with_a_right_checksum(info: ShareInfo) -> None:
    refused(written(bytes(32), info), "does not know")


def test_a_text_has_one_payload() -> None:
    """The three bits after the payload are zero: no second text reads as the same share."""
    text = written(bytes(32), INFO)
    last = "0123456789abcdefghjkmnpqrstvwxyz".index(text[-1])
    for bits in range(1, 8):
        refused(text[:-1] + "0123456789abcdefghjkmnpqrstvwxyz"[last | bits], "the last character")


@given(KEYS, INFOS, INFOS)
def test_a_digest_is_of_one_share_at_one_place(share: bytes, info: ShareInfo, other: ShareInfo) -> None:
    mine = shares.digest(view(share), info)
    assert (mine == shares.digest(view(share), other)) == (info == other)
    assert mine != shares.digest(view(bytes([share[0] ^ 1]) + share[1:]), info)


def test_a_share_names_a_keyring_of_the_right_form() -> None:
    for info in (INFO._replace(keyring_id="keyring"), INFO._replace(set_id="x")):
        with pytest.raises(InvalidRequestError, match="16 hex digits"):
            written(bytes(32), info)
