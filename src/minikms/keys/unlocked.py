"""The unlocked keyring: its keys, in the arena, and what may be done with them.

Owns: the arena slots of the keyring key, of every KEK version and of the audit keys. Invariants: key material is
written straight into the arena (random bytes by `readv`, unwrapped keys by `decrypt_into`); the root key is needed
only while a slot is opened or made, and released by the caller right after. A body is trusted only once its tag was
checked. It must never do I/O of its own.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from minikms.crypto import aead, labels, roots
from minikms.errors import DecryptionError, KeyUnreadableError, StartError
from minikms.keys import keyring
from minikms.keys.states import KekState
from minikms.memory.arena import SecretArena, SecretSlot

Nonces = Callable[[], bytes]
FillRandom = Callable[[memoryview], None]


class UnlockedKeyring:
    """The keyring's body beside its opened keys. `body` is replaced only after the new one is durable."""

    def __init__(self, arena: SecretArena, nonces: Nonces, body: keyring.Body, keyring_key: SecretSlot) -> None:
        self._arena = arena
        self._nonces = nonces
        self._keyring_key = keyring_key
        self._keks: dict[int, SecretSlot] = {}
        self._audit: dict[int, tuple[SecretSlot, SecretSlot]] = {}
        self.body = body

    def __repr__(self) -> str:
        return f"<UnlockedKeyring {self.body.keyring_id} epoch {self.body.epoch}>"

    @classmethod
    def create(
        cls,
        arena: SecretArena,
        root: memoryview,
        *,
        keyring_id: str,
        provider: keyring.Provider,
        nonces: Nonces,
        fill_random: FillRandom,
        at: str,
    ) -> UnlockedKeyring:
        """A new keyring with one slot, KEK version 1 and a first pair of audit keys."""
        empty = keyring.Body(
            format=keyring.FORMAT,
            version=keyring.VERSION,
            keyring_id=keyring_id,
            epoch=1,
            created_at=at,
            updated_at=at,
            slots=(),
            keks=(),
            audit_keys=(),
        )
        key = arena.allocate()
        fill_random(key.view)
        unlocked = cls(arena, nonces, empty, key)
        slot = unlocked.make_slot(root, provider, slot_id="s1", at=at)
        kek = unlocked.make_kek(fill_random, state="active", version=1, at=at)
        audit_key = unlocked.make_audit_key(fill_random, version=1, at=at)
        unlocked.body = msgspec.structs.replace(empty, slots=(slot,), keks=(kek,), audit_keys=(audit_key,))
        keyring.check(unlocked.body)
        return unlocked

    @classmethod
    def open(
        cls, arena: SecretArena, root: memoryview, data: bytes, *, nonces: Nonces
    ) -> tuple[UnlockedKeyring, keyring.Slot]:
        """Opens the keyring file under `root`; also tells which slot opened. Raises StartError, naming both
        fingerprints.
        """
        body, body_bytes, tag = keyring.parse_file(data)
        given = roots.fingerprint(root)
        slot = body.slot_for(given)
        if slot is None:
            raise StartError(wrong_root_text(body, given))
        if not hmac.compare_digest(roots.commitment(root, slot.slot_id), slot.commitment):
            raise StartError("the keyring's slot does not belong to this root key; restore keyring.json from a backup")
        key = arena.allocate()
        try:
            aead.open_into(root, slot.wrapped, _slot_aad(body.keyring_id, slot.slot_id, given), key.view)
            aead.check_authentic(key.view, tag, labels.aad(labels.KEYRING, body_bytes))
        except DecryptionError:
            key.release()
            raise StartError("the keyring was altered or is damaged; restore keyring.json from a backup") from None
        unlocked = cls(arena, nonces, body, key)
        try:
            unlocked._open_keys()
        except DecryptionError:
            unlocked.release()
            raise StartError("a key of the keyring does not open; restore keyring.json from a backup") from None
        return unlocked, slot

    def _open_keys(self) -> None:
        for kek in self.body.keks:
            if kek.state != "destroyed":
                target = self._keks[kek.version] = self._arena.allocate()
                aead.open_into(self._keyring_key.view, kek.wrapped, self._kek_aad(kek.version), target.view)
        for audit_key in self.body.audit_keys:
            pair = self._audit[audit_key.version] = (self._arena.allocate(), self._arena.allocate())
            for wrapped, label, target in (
                (audit_key.wrapped_key, labels.AUDIT_KEY, pair[0]),
                (audit_key.wrapped_seed, labels.AUDIT_SEED, pair[1]),
            ):
                aead.open_into(self._keyring_key.view, wrapped, self._audit_aad(label, audit_key.version), target.view)

    # --- making keys -------------------------------------------------------------------------------------------------

    def make_slot(self, root: memoryview, provider: keyring.Provider, *, slot_id: str, at: str) -> keyring.Slot:
        """A slot that wraps the keyring key under `root`."""
        name = roots.fingerprint(root)
        aad = _slot_aad(self.body.keyring_id, slot_id, name)
        return keyring.Slot(
            slot_id=slot_id,
            fingerprint=name,
            provider=provider,
            created_at=at,
            commitment=roots.commitment(root, slot_id),
            wrapped=aead.seal(root, self._nonces(), self._keyring_key.view, aad),
        )

    def make_kek(self, fill_random: FillRandom, *, state: KekState, version: int, at: str) -> keyring.Kek:
        """A fresh random KEK version, kept in the arena under its number until `forget_kek` or `release`."""
        slot = self._keks[version] = self._arena.allocate()
        fill_random(slot.view)
        wrapped = aead.seal(self._keyring_key.view, self._nonces(), slot.view, self._kek_aad(version))
        return keyring.Kek(version=version, state=state, created_at=at, wraps_reserved=0, wrapped=wrapped)

    def make_audit_key(self, fill_random: FillRandom, *, version: int, at: str) -> keyring.AuditKey:
        """A fresh audit key and checkpoint seed (Ed25519, RFC 8032), wrapped; only the public key is in the clear."""
        key, seed = self._audit[version] = (self._arena.allocate(), self._arena.allocate())
        fill_random(key.view)
        fill_random(seed.view)
        public = Ed25519PrivateKey.from_private_bytes(seed.view).public_key().public_bytes_raw()
        return keyring.AuditKey(
            version=version,
            created_at=at,
            public_key=public,
            wrapped_key=aead.seal(
                self._keyring_key.view, self._nonces(), key.view, self._audit_aad(labels.AUDIT_KEY, version)
            ),
            wrapped_seed=aead.seal(
                self._keyring_key.view, self._nonces(), seed.view, self._audit_aad(labels.AUDIT_SEED, version)
            ),
        )

    def fingerprint(self, root: memoryview) -> str:
        """The name of a root key, for comparison with the slots'."""
        return roots.fingerprint(root)

    # --- using them --------------------------------------------------------------------------------------------------

    def encode(self, body: keyring.Body) -> bytes:
        """The file that holds `body`, authenticated under the keyring key."""
        body_bytes = keyring.encode_body(body)
        tag = aead.authenticate(self._keyring_key.view, self._nonces(), labels.aad(labels.KEYRING, body_bytes))
        return keyring.encode_file(body_bytes, tag)

    def kek(self, version: int) -> memoryview:
        """The view of a KEK version. Raises KeyUnreadableError for one that this keyring does not have."""
        slot = self._keks.get(version)
        if slot is None:
            raise KeyUnreadableError(
                f"the key is wrapped under KEK version {version}, which this keyring does not have: "
                "the keyring is older than the key, or the KEK was destroyed"
            )
        return slot.view

    def audit_key(self, version: int) -> tuple[memoryview, memoryview]:
        """(HMAC key, Ed25519 seed) of an audit key version."""
        key, seed = self._audit[version]
        return key.view, seed.view

    def forget_kek(self, version: int) -> None:
        """Zeroes a KEK version: one that was destroyed, or made for a rotation that could not begin."""
        slot = self._keks.pop(version, None)
        if slot is not None:
            slot.release()

    def release(self) -> None:
        """Zeroes every key."""
        for slot in (self._keyring_key, *self._keks.values(), *(s for pair in self._audit.values() for s in pair)):
            slot.release()
        self._keks.clear()
        self._audit.clear()

    def _kek_aad(self, version: int) -> bytes:
        return labels.aad(labels.KEK, self.body.keyring_id.encode(), labels.number(version))

    def _audit_aad(self, label: bytes, version: int) -> bytes:
        return labels.aad(label, self.body.keyring_id.encode(), labels.number(version))


def _slot_aad(keyring_id: str, slot_id: str, fingerprint: str) -> bytes:
    return labels.aad(labels.SLOT, keyring_id.encode(), slot_id.encode(), fingerprint.encode())


def wrong_root_text(body: keyring.Body, given: str) -> str:
    """Why a root key does not open this keyring, and what to do."""
    expected = " or ".join(slot.fingerprint for slot in body.slots)
    for old in body.retired_roots:
        if old.fingerprint == given:
            return (
                f"the root key {given} was rotated away on {old.rotated_at}; this keyring opens under {expected}. "
                "Give the newer root key, or restore a backup from before that time"
            )
    return (
        f"wrong root key: this keyring opens under {expected}, the given one is {given}. "
        "Nothing was changed; give the right key file"
    )
