"""Records under a DEK: prefixes of nonces, derived keys and their end."""

import os
from collections.abc import Iterator
from fractions import Fraction

import pytest

from minikms.api.errors import DecryptionError
from minikms.crypto import aead, records
from minikms.crypto.aead import PREFIX_BYTES
from minikms.crypto.records import RecordKey, RecordKeys
from minikms.memory.arena import SecretArena
from tests.harness import decryptor
from tests.minikms.custody.watched_cipher import WatchedCipher, WatchedSchedule

SLOTS = 16


@pytest.fixture
def arena() -> Iterator[SecretArena]:
    with SecretArena(SLOTS, force_fallback=True) as made:
        yield made


def new_key(arena: SecretArena, keys: RecordKeys, raw: bytes | None = None) -> RecordKey:
    slot = arena.allocate()
    slot.view[:] = raw or os.urandom(32)
    return RecordKey(slot, keys)


def test_a_record_opens_elsewhere_and_under_its_own_key_only(arena: SecretArena) -> None:
    keys, raw = RecordKeys(arena), os.urandom(32)
    key, other = new_key(arena, keys, raw), new_key(arena, keys)
    for sealed in (key.seal(b"text", b"aad"), key.seal(memoryview(b"text"), b"aad")):
        assert decryptor.xaes_open(raw, sealed, b"aad") == b"text"
        assert key.open(sealed, b"aad") == b"text"
        for owner, data, aad in ((other, sealed, b"aad"), (key, sealed, b""), (key, sealed[:-1], b"aad")):
            with pytest.raises(DecryptionError):
                owner.open(data, aad)
            with pytest.raises(DecryptionError):
                owner.check(data, aad, memoryview(bytearray(64)))


def test_a_mac_has_its_known_value_and_its_turn_overwrites_the_stack(arena: SecretArena) -> None:
    keys = RecordKeys(arena)
    mac = new_key(arena, keys, bytes(range(32))).mac(b"text", b"place")
    assert mac.hex() == "781e0ac181009ee6520c06502dae32571c9f23b1ce13cd64b38515a6ec993666"
    assert keys.stack_used


@pytest.mark.parametrize("size", [0, aead.OVERHEAD_BYTES - 1])
def test_a_too_short_record_does_not_open(arena: SecretArena, size: int) -> None:
    key = new_key(arena, RecordKeys(arena))
    with pytest.raises(DecryptionError, match="too short"):
        key.open(bytes(size), b"")
    with pytest.raises(DecryptionError, match="too short"):
        key.check(bytes(size), b"", memoryview(bytearray(64)))


@pytest.mark.parametrize("per_prefix", [1, 7, 1000])
def test_the_records_of_all_keys_share_a_prefix_up_to_the_bound(
    arena: SecretArena, monkeypatch: pytest.MonkeyPatch, per_prefix: int
) -> None:
    """Also within one turn, whose ciphers are those of the prefix before."""
    monkeypatch.setattr(records, "RECORDS_PER_PREFIX", per_prefix)
    keys = RecordKeys(arena)
    both = new_key(arena, keys), new_key(arena, keys)
    sealed = [both[number % 2].seal(b"%d" % number, b"") for number in range(3 * per_prefix)]
    prefixes = [one[:PREFIX_BYTES] for one in sealed]
    assert [prefixes.count(prefix) for prefix in dict.fromkeys(prefixes)] == [per_prefix] * 3
    assert len({one[: aead.NONCE_BYTES] for one in sealed}) == len(sealed)
    for number, one in enumerate(sealed):
        assert both[number % 2].open(one, b"") == b"%d" % number


def test_the_chance_of_a_repeated_nonce_is_as_documented() -> None:
    """Below 2^-32 for 2^40 records of a DEK: pairs that share a draw of the prefix, and at most all as the others."""
    count, bits = 2**40, 8 * aead.NONCE_BYTES
    sharing = Fraction(count * records.RECORDS_PER_PREFIX, 2) / 2 ** (bits - 8 * PREFIX_BYTES)
    assert sharing + Fraction(count**2, 2) / 2**bits < Fraction(1, 2**32)


def test_each_start_draws_a_prefix_of_its_own(arena: SecretArena) -> None:
    drawn = {new_key(arena, RecordKeys(arena)).seal(b"", b"")[:PREFIX_BYTES] for _ in range(4)}
    assert len(drawn) == 4


def test_a_derived_key_is_in_the_arena_and_zeroed_with_its_dek(arena: SecretArena) -> None:
    keys, raw = RecordKeys(arena), os.urandom(32)
    key, other = new_key(arena, keys, raw), new_key(arena, keys)
    prefix = key.seal(b"", b"")[:PREFIX_BYTES]
    other.seal(b"", b"")
    [slot] = key.derived.values()
    view = memoryview(slot.view)
    assert bytes(view) == decryptor.derived(raw, prefix)
    assert arena.in_use == 4
    key.release()
    assert not any(view)
    assert arena.in_use == 2
    with pytest.raises(ValueError, match="released"):
        key.seal(b"", b"")
    assert other.open(other.seal(b"text", b""), b"") == b"text"


@pytest.mark.parametrize("derived_keys_max", [1, 3])
def test_the_derived_keys_of_many_runs_are_bounded_and_each_record_opens(
    arena: SecretArena, monkeypatch: pytest.MonkeyPatch, derived_keys_max: int
) -> None:
    monkeypatch.setattr(records, "DERIVED_KEYS_MAX", derived_keys_max)
    raw, other = os.urandom(32), os.urandom(32)
    runs = [RecordKeys(arena) for _ in range(10)]
    sealed: list[tuple[bytes, bytes]] = []
    for run in runs:
        for of in (raw, other):
            writer = new_key(arena, run, of)
            sealed.append((writer.seal(of, b"aad"), of))
            writer.release()
    keys = RecordKeys(arena)
    readers = {of: new_key(arena, keys, of) for of in (raw, other)}
    for turn in range(3):
        for one, of in sealed:
            assert readers[of].open(one, b"aad") == of
            readers[raw].check(sealed[0][0], b"aad", memoryview(bytearray(32)))
            assert sum(len(reader.derived) for reader in readers.values()) <= derived_keys_max
            assert arena.in_use <= len(readers) + derived_keys_max
        if turn:
            keys.end_turn()
    for reader in readers.values():
        reader.release()
    assert arena.in_use == 0


def test_derived_keys_take_at_most_half_of_a_small_arena(arena: SecretArena) -> None:
    key = new_key(arena, RecordKeys(arena))
    for number in range(2 * SLOTS):
        with pytest.raises(DecryptionError):
            key.open(number.to_bytes(PREFIX_BYTES, "big") + bytes(aead.OVERHEAD_BYTES), b"")
    assert arena.in_use == 1 + SLOTS // 2


@pytest.mark.parametrize("end", ["turn", "release"])
def test_no_cipher_outlives_its_turn_or_its_key(arena: SecretArena, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """Whoever keeps the error of a record that does not open keeps no cipher with it."""
    monkeypatch.setattr(records, "AESGCM", WatchedCipher)
    monkeypatch.setattr(aead, "Cipher", WatchedSchedule)
    keys = RecordKeys(arena)
    key = new_key(arena, keys)
    with pytest.raises(DecryptionError) as kept:
        key.open(key.seal(b"text", b""), b"other")
    key.seal(b"text", b"")
    assert len(WatchedCipher.alive) == len(WatchedSchedule.alive) == 1, "one for the turn"
    if end == "turn":
        keys.end_turn()
    else:
        key.release()
    assert kept.value.__traceback__ is not None
    assert not WatchedCipher.alive
    assert not WatchedSchedule.alive
