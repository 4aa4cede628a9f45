"""The public derivations from a root key: its fingerprint and its commitment."""

import hashlib
import hmac

from hypothesis import given
from hypothesis import strategies as st

from minikms.crypto import roots

ROOTS = st.binary(min_size=32, max_size=32)


@given(ROOTS)
def test_a_fingerprint_is_the_first_eight_bytes_of_a_labelled_hmac(root: bytes) -> None:
    expected = hmac.new(root, b"minikms/root-fingerprint/v1\0", hashlib.sha256).hexdigest()[:16]
    assert roots.fingerprint(memoryview(root)) == expected


@given(ROOTS, st.text(max_size=10))
def test_a_commitment_is_one_block_of_hkdf_expand(root: bytes, slot_id: str) -> None:
    """RFC 5869 section 2.3: T(1) = HMAC(PRK, info | 0x01)."""
    name = slot_id.encode()
    info = b"minikms/root-commitment/v1\0" + len(name).to_bytes(4, "big") + name
    expected = hmac.new(root, info + b"\x01", hashlib.sha256).digest()
    assert roots.commitment(memoryview(root), slot_id) == expected


@given(ROOTS, ROOTS)
def test_two_root_keys_have_different_fingerprints_and_commitments(one: bytes, other: bytes) -> None:
    same = one == other
    assert (roots.fingerprint(memoryview(one)) == roots.fingerprint(memoryview(other))) == same
    assert (roots.commitment(memoryview(one), "s1") == roots.commitment(memoryview(other), "s1")) == same


@given(ROOTS)
def test_the_commitment_of_one_slot_is_not_that_of_another(root: bytes) -> None:
    assert roots.commitment(memoryview(root), "s1") != roots.commitment(memoryview(root), "s2")
