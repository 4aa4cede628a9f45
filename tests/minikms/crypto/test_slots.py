"""Slots: a keyring key opens under its root key and at its binding only, whatever is wrong with what was sealed."""

import hashlib
import hmac

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minikms.api.errors import DecryptionError
from minikms.crypto import slots
from minikms.crypto.hpke import PUBLIC_KEY_BYTES
from minikms.crypto.slots import SlotBinding

ROOT, OTHER_ROOT = memoryview(bytes(range(32))), memoryview(bytes(range(1, 33)))
KEYRING_KEY = memoryview(bytes(range(200, 232)))
BINDING = SlotBinding("kr_00112233445566ff", "s1", bytes(32), 1)


def sealed(binding: SlotBinding = BINDING) -> bytes:
    return slots.seal(slots.public_key(ROOT, binding.keyring_id, binding.slot_id), binding, KEYRING_KEY)


def opened(data: bytes, binding: SlotBinding = BINDING, root: memoryview = ROOT) -> bytes:
    target = memoryview(bytearray(32))
    slots.open_into(root, binding, data, target)
    return bytes(target)


def test_what_is_sealed_to_the_public_key_opens_under_the_root() -> None:
    one, other = sealed(), sealed()
    assert one != other
    assert len(one) == slots.SEALED_BYTES
    assert opened(one) == opened(other) == bytes(KEYRING_KEY)


@pytest.mark.parametrize(
    "binding",
    [
        BINDING._replace(keyring_id="kr_00112233445566fe"),
        BINDING._replace(slot_id="s2"),
        BINDING._replace(commitment=bytes([1]) * 32),
        BINDING._replace(key_number=2),
    ],
)
def test_it_opens_under_no_other_binding(binding: SlotBinding) -> None:
    with pytest.raises(DecryptionError):
        opened(sealed(), binding)


def test_it_opens_under_no_other_root() -> None:
    with pytest.raises(DecryptionError):
        opened(sealed(), root=OTHER_ROOT)


@given(st.integers(0, slots.SEALED_BYTES - 1), st.integers(1, 255))
@example(1119, 0x80)
@settings(max_examples=50, deadline=None)
def test_an_altered_byte_is_refused(binding: int, change: int) -> None:
    """Also the bit of the X25519 key that X25519 ignores, since X-Wing hashes the key."""
    data = bytearray(sealed())
    data[binding] ^= change
    with pytest.raises(DecryptionError):
        opened(bytes(data))


@pytest.mark.parametrize("data", [b"", bytes(slots.SEALED_BYTES), bytes(slots.SEALED_BYTES - 1), b"x" * 5000])
def test_what_was_never_sealed_is_refused(data: bytes) -> None:
    """Zeros hold an X25519 key of low order, which the library refuses by another error."""
    with pytest.raises(DecryptionError):
        opened(data)


@pytest.mark.parametrize("public", [b"", bytes(PUBLIC_KEY_BYTES), b"\xff" * PUBLIC_KEY_BYTES])
def test_a_public_key_that_is_none_is_refused(public: bytes) -> None:
    with pytest.raises(DecryptionError, match="public key"):
        slots.seal(public, BINDING, KEYRING_KEY)


@given(st.binary(min_size=32, max_size=32))
def test_the_authentication_key_is_one_block_of_hkdf_expand(root: bytes) -> None:
    info = b"minikms/slot-auth/v2\0" + b"\0\0\0\x13kr_00112233445566ff" + b"\0\0\0\x02s1"
    target = memoryview(bytearray(32))
    slots.auth_key_into(memoryview(root), BINDING.keyring_id, BINDING.slot_id, target)
    assert bytes(target) == hmac.new(root, info + b"\x01", hashlib.sha256).digest()


def test_the_mac_depends_on_key_place_and_content() -> None:
    key, other = memoryview(bytes(32)), memoryview(bytes([1]) * 32)
    macs = {
        slots.mac(key, BINDING, b"text"),
        slots.mac(other, BINDING, b"text"),
        slots.mac(key, BINDING, b"texts"),
        slots.mac(key, BINDING._replace(key_number=2), b"text"),
        slots.mac(key, BINDING._replace(slot_id="s2"), b"text"),
        slots.mac(key, BINDING._replace(keyring_id="kr_"), b"text"),
    }
    assert len(macs) == 6
