"""The unlocked keyring: which root key opens it, what an alteration does, and what stays in the arena."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from minikms.api.errors import ArenaFullError, ConflictError, DecryptionError, KeyUnreadableError, StartError
from minikms.archives.restore import with_slots_of
from minikms.crypto import aead, labels, roots, slots
from minikms.crypto.aead import NONCE_BYTES, NonceSource
from minikms.crypto.slots import SlotBinding
from minikms.keys import keyring, root_slots
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random
from tests.minikms.keys import keyrings
from tests.minikms.keys.keyrings import AT, NEW_ROOT, ROOT


def open_bytes(arena: SecretArena, root: bytes, data: bytes) -> tuple[UnlockedKeyring, keyring.RootSlot]:
    return UnlockedKeyring.open(arena, memoryview(root), data, nonces=NonceSource().next)


def test_the_same_keys_come_out_of_the_file_that_went_in(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    again, slot = keyrings.reopened(arena, unlocked)
    assert slot.slot_id == "s1"
    assert bytes(again.kek(1)) == bytes(unlocked.kek(1)) != bytes(32)
    assert [bytes(part) for part in again.audit_key(1)] == [bytes(part) for part in unlocked.audit_key(1)]


def test_a_keyring_of_an_unknown_provider_opens(arena: SecretArena) -> None:
    """A later version may know more providers, and the name is for people only."""
    unlocked = keyrings.fresh(arena)
    slot = msgspec.structs.replace(unlocked.body.slots[0], provider="tpm2-0123456789-0123456789-01234")
    keyrings.adopt(unlocked, keyring.next_epoch(unlocked.body, at=AT, slots=(slot,)))
    assert keyrings.reopened(arena, unlocked)[1] == slot


def test_the_error_for_a_wrong_root_names_both_fingerprints(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    with pytest.raises(StartError, match="wrong root key") as refused:
        keyrings.reopened(arena, unlocked, NEW_ROOT)
    assert roots.fingerprint(memoryview(NEW_ROOT)) in str(refused.value)
    assert roots.fingerprint(memoryview(ROOT)) in str(refused.value)


def test_a_root_that_was_rotated_away_is_refused_with_the_date(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    keyrings.rotate(unlocked, NEW_ROOT)
    keyrings.remove(unlocked, "s1", at="2026-12-01T08:30:00Z")
    keyrings.reopened(arena, unlocked, NEW_ROOT)
    with pytest.raises(StartError, match="rotated away on 2026-12-01T08:30:00Z") as refused:
        keyrings.reopened(arena, unlocked, ROOT)
    assert roots.fingerprint(memoryview(NEW_ROOT)) in str(refused.value)


def test_during_a_root_rotation_both_roots_open_both_keks(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    keyrings.begin(unlocked, NEW_ROOT)
    for root in (ROOT, NEW_ROOT):
        again, _ = keyrings.reopened(arena, unlocked, root)
        assert bytes(again.kek(1)) == bytes(unlocked.kek(1))
        assert bytes(again.kek(2)) == bytes(unlocked.kek(2))


def test_only_the_removal_of_a_root_brings_a_new_keyring_key(arena: SecretArena) -> None:
    """A KEK rotation and a new root key keep the old one."""
    unlocked = keyrings.fresh(arena)
    first = bytes(unlocked.keyring_key.view)
    keyrings.rotate(unlocked)
    keyrings.rotate(unlocked, NEW_ROOT)
    assert bytes(unlocked.keyring_key.view) == first
    keyrings.remove(unlocked, "s1")
    assert bytes(unlocked.keyring_key.view) != first


def test_a_removed_root_and_an_old_keyring_open_nothing_of_a_later_keyring(arena: SecretArena) -> None:
    """With the old keyring key, neither a KEK, nor an audit key, nor the tag of a later keyring opens."""
    unlocked = keyrings.fresh(arena)
    keyrings.add(unlocked, NEW_ROOT)
    leaked, _ = keyrings.reopened(arena, unlocked)
    keyrings.remove(unlocked, "s1")
    later, _, tag = keyring.parse_file(unlocked.encode(unlocked.body))
    leaked_key = leaked.keyring_key.view
    with pytest.raises(DecryptionError):
        aead.check_authentic(leaked_key, tag, labels.aad(labels.KEYRING, keyring.encode_body(later)))
    target = memoryview(bytearray(32))
    for kek in later.keks:
        aad = labels.aad(labels.KEK, later.keyring_id.encode(), labels.number(kek.version))
        with pytest.raises(DecryptionError):
            aead.open_into(leaked_key, kek.wrapped, aad, target)
    for key in later.audit_keys:
        aad = labels.aad(labels.AUDIT_KEY, later.keyring_id.encode(), labels.number(key.version))
        with pytest.raises(DecryptionError):
            aead.open_into(leaked_key, key.wrapped_key, aad, target)
    with pytest.raises(StartError, match="rotated away"):
        keyrings.reopened(arena, unlocked, ROOT)
    assert bytes(leaked.audit_key(1)[0]) != bytes(unlocked.audit_key(2)[0])


def test_an_older_keyring_takes_the_roots_of_a_later_one(arena: SecretArena) -> None:
    """The added root key opens it, the removed ones do not, and can't be added again."""
    unlocked = keyrings.fresh(arena)
    before = unlocked.encode(unlocked.body)
    passing = bytes([7]) * 32
    passed = keyrings.add(unlocked, passing)
    keyrings.add(unlocked, NEW_ROOT)
    keyrings.remove(unlocked, "s1", passed)
    keyrings.rotate(unlocked)
    older, _ = UnlockedKeyring.open(arena, memoryview(ROOT), before, nonces=NonceSource().next)
    kek = bytes(older.kek(1))
    resealed = older.make_resealed_for(unlocked, fill_random)
    key = older.make_audit_key(fill_random, version=2, at=AT, key_version=resealed.key_version)
    older.body = with_slots_of(older.body, unlocked.body, resealed, key)
    older.settle()
    keyrings.adopt(older, keyring.next_epoch(older.body, at=AT))
    again, slot = keyrings.reopened(arena, older, NEW_ROOT)
    assert (bytes(again.kek(1)), slot.slot_id) == (kek, unlocked.body.slots[0].slot_id)
    assert {root.kek_version for root in again.body.revoking} == {2}
    assert again.body.revocation_due
    for root in (ROOT, passing):
        with pytest.raises(ConflictError):
            root_slots.check_is_new(again.body, roots.fingerprint(memoryview(root)))
        with pytest.raises(StartError):
            keyrings.reopened(arena, older, root)


def test_five_roots_in_a_row_each_open_until_they_are_dropped(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    roots = [ROOT, *(bytes([number]) * 32 for number in range(1, 5))]
    for root in roots[1:]:
        keyrings.rotate(unlocked, root)
    for root in roots:
        again, _ = keyrings.reopened(arena, unlocked, root)
        assert bytes(again.kek(5)) == bytes(unlocked.kek(5))
        again.release()


# --- alterations ------------------------------------------------------------------------------------------------------


def flipped(text: str) -> str:
    return ("A" if text[0] != "A" else "B") + text[1:]


def swap_keks(body: Any) -> None:
    first, second = body["keks"]
    first["wrapped"], second["wrapped"] = second["wrapped"], first["wrapped"]


ALTERATIONS: dict[str, Callable[[Any], None]] = {
    "a lower epoch": lambda body: body.update(epoch=body["epoch"] - 1),
    "a tombstone not counted": lambda body: body["tombstone_log"].update(count=0),
    "a KEK version made active": lambda body: body["keks"][0].update(created_at="2020-01-01T00:00:00Z"),
    "two KEKs swapped": swap_keks,
    "a foreign keyring id": lambda body: body.update(keyring_id="kr_other"),
    "an audit key's public part": lambda body: body["audit_keys"][0].update(
        public_key=flipped(body["audit_keys"][0]["public_key"])
    ),
    "a retired root's date": lambda body: body.update(updated_at="2027-01-01T00:00:00Z"),
}


@pytest.mark.parametrize("what", ALTERATIONS)
def test_an_altered_body_does_not_open_under_the_right_root(arena: SecretArena, what: str) -> None:
    unlocked = keyrings.fresh(arena)
    keyrings.rotate(unlocked)
    keyrings.adopt(unlocked, keyring.with_tombstones(unlocked.body, 1, bytes(32), at=AT))
    file = json.loads(unlocked.encode(unlocked.body))
    ALTERATIONS[what](file["body"])
    used = arena.in_use
    with pytest.raises(StartError, match="altered or is damaged"):
        open_bytes(arena, ROOT, json.dumps(file).encode())
    assert arena.in_use == used


def test_a_slot_that_commits_to_another_root_is_refused_unopened(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    file = json.loads(unlocked.encode(unlocked.body))
    slot = file["body"]["slots"][0]
    slot["commitment"] = flipped(slot["commitment"])
    with pytest.raises(StartError, match="does not belong to this root key"):
        open_bytes(arena, ROOT, json.dumps(file).encode())


def forged(arena: SecretArena, unlocked: UnlockedKeyring, *, mac_key: bytes) -> bytes:
    """A keyring by somebody who knows only the public keys: a keyring key of his own, sealed to them."""
    own = keyrings.fresh(arena, bytes(range(64, 96)))
    theirs = unlocked.body.slots[0]
    own.body = msgspec.structs.replace(own.body, keyring_id=unlocked.body.keyring_id)
    binding = SlotBinding(own.body.keyring_id, theirs.slot_id, theirs.commitment, own.body.key_version)
    sealed = slots.seal(theirs.public_key, binding, own.keyring_key.view)
    mac = slots.mac(memoryview(mac_key), binding, sealed)
    slot = msgspec.structs.replace(theirs, sealed=sealed, mac=mac)
    return own.encode(msgspec.structs.replace(own.body, slots=(slot,)))


def test_a_keyring_key_that_another_sealed_to_the_public_key_is_refused(arena: SecretArena) -> None:
    """HPKE itself opens it: only the MAC, under a key that needs the root key or a keyring key, refuses it."""
    unlocked = keyrings.fresh(arena)
    with pytest.raises(StartError, match="altered or is damaged"):
        open_bytes(arena, ROOT, forged(arena, unlocked, mac_key=bytes(32)))
    auth = memoryview(bytearray(32))
    slots.auth_key_into(memoryview(ROOT), unlocked.body.keyring_id, "s1", auth)
    with pytest.raises(StartError, match="a key of the keyring does not open"):  # with the MAC it would have opened
        open_bytes(arena, ROOT, forged(arena, unlocked, mac_key=bytes(auth)))


@pytest.mark.parametrize("member", ["sealed", "mac", "public_key", "wrapped_auth"])
def test_a_slot_with_an_altered_member_is_refused(arena: SecretArena, member: str) -> None:
    unlocked = keyrings.fresh(arena)
    used = arena.in_use
    file = json.loads(unlocked.encode(unlocked.body))
    slot = file["body"]["slots"][0]
    slot[member] = flipped(slot[member])
    with pytest.raises(StartError, match="altered or is damaged"):
        open_bytes(arena, ROOT, json.dumps(file).encode())
    assert arena.in_use == used


def test_a_slot_is_opened_before_it_is_returned(arena: SecretArena, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a root key is never stored that would not open the keyring."""
    unlocked = keyrings.fresh(arena)
    real = slots.seal
    monkeypatch.setattr(slots, "seal", lambda public, place, key: real(public, place, memoryview(bytes(32))))
    with pytest.raises(DecryptionError, match="does not hold the keyring key"):
        keyrings.add(unlocked, NEW_ROOT)


def test_only_its_own_root_passes_the_test_of_a_slot(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    keyrings.add(unlocked, NEW_ROOT)
    first, second = unlocked.body.slots
    unlocked.check_opens(memoryview(ROOT), first)
    unlocked.check_opens(memoryview(NEW_ROOT), second)
    with pytest.raises(DecryptionError, match="another root key"):
        unlocked.check_opens(memoryview(NEW_ROOT), first)


def test_the_tag_of_an_older_keyring_does_not_match_a_newer_body(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    old = json.loads(unlocked.encode(unlocked.body))
    keyrings.adopt(unlocked, keyring.next_epoch(unlocked.body, at=AT))
    new = json.loads(unlocked.encode(unlocked.body))
    with pytest.raises(StartError, match="altered"):
        open_bytes(arena, ROOT, json.dumps(new | {"tag": old["tag"]}).encode())


# --- the arena --------------------------------------------------------------------------------------------------------


def test_releasing_gives_every_slot_back(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    keyrings.rotate(unlocked, NEW_ROOT)
    assert arena.in_use == 1 + 2 + 2 + 1 + 2
    keyrings.remove(unlocked, "s1")
    assert arena.in_use == 1 + 2 + 4 + 1 + 1
    unlocked.release()
    assert arena.in_use == 0


def test_a_destroyed_kek_is_neither_opened_nor_found(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    keyrings.rotate(unlocked)
    keyrings.adopt(unlocked, keyring.destroy_kek(unlocked.body, 1, at=AT))
    again, _ = keyrings.reopened(arena, unlocked)
    for one in (unlocked, again):
        with pytest.raises(KeyUnreadableError, match="KEK version 1"):
            one.kek(1)


def test_new_keys_without_a_durable_body_are_zeroed(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    before, used = unlocked.encode(unlocked.body), arena.in_use
    unlocked.make_slot(memoryview(NEW_ROOT), "request", slot_id="s2", at=AT)
    unlocked.make_resealed(fill_random, without=[])
    unlocked.make_audit_key(fill_random, version=2, at=AT, key_version=2)
    unlocked.settle()
    assert arena.in_use == used
    again, _ = open_bytes(arena, ROOT, before)
    assert bytes(again.keyring_key.view) == bytes(unlocked.keyring_key.view)


@pytest.mark.parametrize("count", range(1, 10))
def test_an_arena_that_is_too_small_is_refused_and_left_empty(count: int) -> None:
    with keyrings.arena(64) as roomy:
        unlocked = keyrings.fresh(roomy)
        keyrings.rotate(unlocked, NEW_ROOT)
        data = unlocked.encode(unlocked.body)
    with SecretArena(count, force_fallback=True) as small:
        # the keyring key, two KEKs, an audit key and its seed, the tombstone key, two slots' authentication keys
        needed = 1 + 2 + 2 + 1 + 2
        if count >= needed:
            open_bytes(small, ROOT, data)
            return
        with pytest.raises(ArenaFullError):
            open_bytes(small, ROOT, data)
        assert small.in_use == 0


def test_nothing_shows_a_key_in_its_representation(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    shown = repr(unlocked) + str(unlocked)
    assert bytes(unlocked.kek(1)).hex() not in shown
    assert unlocked.body.keyring_id in shown


def test_derived_keys_of_a_kek_are_bounded_and_zeroed_with_it(
    arena: SecretArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minikms.keys.unlocked.WRAPPING_KEYS_MAX", 3)
    unlocked = keyrings.fresh(arena)
    unlocked.make_kek(fill_random, version=2, state="pending", at=AT)
    used = arena.in_use
    nonces = [bytes([number]) * NONCE_BYTES for number in range(5)]
    for version, nonce in [(1, nonces[0]), *((2, nonce) for nonce in nonces)] * 2:
        with unlocked.kek_cipher(version) as kek:
            sealed = kek.seal(nonce, b"text", b"")
        assert aead.open_sealed(unlocked.kek(version), sealed, b"") == b"text"
    assert arena.in_use == used + 3
    unlocked.settle()
    assert arena.in_use == used - 1
    with unlocked.kek_cipher(1) as kek:
        assert kek.open_sealed(aead.seal(unlocked.kek(1), nonces[0], b"text", b""), b"") == b"text"
    assert arena.in_use == used
    unlocked.release()
    assert arena.in_use == 0


def test_the_cipher_of_a_kek_ends_with_its_block(arena: SecretArena) -> None:
    unlocked = keyrings.fresh(arena)
    with unlocked.kek_cipher(1) as kek:
        kek.seal(bytes(NONCE_BYTES), b"", b"")
    with pytest.raises(ValueError, match="closed"):
        kek.seal(bytes([1]) * NONCE_BYTES, b"", b"")
