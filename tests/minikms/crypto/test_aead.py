"""XAES-256-GCM: altered data does not open, and no error says why."""

import os
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minikms.api.errors import DecryptionError
from minikms.crypto import aead

KEY = memoryview(bytes(range(32)))
OTHER_KEY = memoryview(bytes(32))


def nonce() -> bytes:
    return os.urandom(aead.NONCE_BYTES)


@given(st.binary(max_size=200), st.binary(max_size=50))
def test_what_was_sealed_opens_under_the_same_key_and_aad_only(plaintext: bytes, aad: bytes) -> None:
    sealed = aead.seal(KEY, nonce(), plaintext, aad)
    assert len(sealed) == len(plaintext) + aead.OVERHEAD_BYTES
    assert aead.open_sealed(KEY, sealed, aad) == plaintext
    with pytest.raises(DecryptionError):
        aead.open_sealed(OTHER_KEY, sealed, aad)
    with pytest.raises(DecryptionError):
        aead.open_sealed(KEY, sealed, aad + b"x")


@given(st.binary(min_size=1, max_size=60), st.data())
def test_a_flipped_bit_prevents_opening(plaintext: bytes, data: st.DataObject) -> None:
    sealed = bytearray(aead.seal(KEY, nonce(), plaintext, b"aad"))
    position = data.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[position // 8] ^= 1 << position % 8
    with pytest.raises(DecryptionError):
        aead.open_sealed(KEY, bytes(sealed), b"aad")


@given(st.integers(0, aead.OVERHEAD_BYTES - 1))
def test_a_too_short_ciphertext_is_refused(size: int) -> None:
    with pytest.raises(DecryptionError):
        aead.open_sealed(KEY, bytes(size), b"")


def test_the_reason_of_a_refusal_is_the_same_sentence_for_every_cause() -> None:
    sealed = aead.seal(KEY, nonce(), b"text", b"aad")
    told = set()
    for key, value, aad in (
        (OTHER_KEY, sealed, b"aad"),
        (KEY, sealed, b"other"),
        (KEY, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"aad"),
    ):
        with pytest.raises(DecryptionError) as refused:
            aead.open_sealed(key, value, aad)
        told.add(str(refused.value))
    assert len(told) == 1


def test_a_key_opens_in_place_and_a_failure_leaves_zeroes() -> None:
    target = memoryview(bytearray(32))
    sealed = aead.seal(KEY, nonce(), bytes(range(100, 132)), b"a")
    aead.open_into(KEY, sealed, b"a", target)
    assert bytes(target) == bytes(range(100, 132))
    with pytest.raises(DecryptionError):
        aead.open_into(KEY, sealed, b"b", target)
    assert bytes(target) == bytes(32)


def test_one_cipher_opens_keys_of_several_prefixes() -> None:
    raws = [os.urandom(32) for _ in range(4)]
    sealed = [aead.seal(KEY, bytes([n % 2]) * 12 + os.urandom(12), raw, b"a") for n, raw in enumerate(raws)]
    target = memoryview(bytearray(32))
    with aead.XaesCipher(KEY) as cipher:
        for one, raw in zip(sealed, raws, strict=True):
            cipher.open_into(one, b"a", target)
            assert bytes(target) == raw


@pytest.mark.parametrize("size", [0, 40, 71, 73, 104])
def test_a_wrapped_key_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(DecryptionError):
        aead.open_into(KEY, bytes(size), b"", memoryview(bytearray(32)))


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_a_tag_authenticates_its_data_and_no_other(data: bytes, other: bytes) -> None:
    tag = aead.authenticate(KEY, nonce(), data)
    aead.check_authentic(KEY, tag, data)
    if other != data:
        with pytest.raises(DecryptionError):
            aead.check_authentic(KEY, tag, other)
    with pytest.raises(DecryptionError):
        aead.check_authentic(OTHER_KEY, tag, data)
    with pytest.raises(DecryptionError):
        aead.check_authentic(KEY, tag[:-1], data)


def test_a_source_of_nonces_never_repeats_one_across_its_refills() -> None:
    source = aead.NonceSource()
    drawn = [source.next() for _ in range(5000)]
    assert {len(one) for one in drawn} == {aead.NONCE_BYTES}
    assert len(set(drawn)) == len(drawn)
    prefixes = [one[: aead.PREFIX_BYTES] for one in drawn]
    whole = list(dict.fromkeys(prefixes))[:-1]
    assert [prefixes.count(prefix) for prefix in whole] == [aead.NONCES_PER_PREFIX] * len(whole)


def test_the_chance_of_a_repeated_nonce_of_a_source_is_as_documented() -> None:
    """Below 2^-47 for 2^40 nonces under one key."""
    sharing = Fraction(2**40 * aead.NONCES_PER_PREFIX, 2) / 2**96
    assert sharing + Fraction(2**80, 2) / 2**192 < Fraction(1, 2**47)
