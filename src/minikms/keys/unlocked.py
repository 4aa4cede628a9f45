"""The unlocked keyring: its body, and its keys in the arena.

Owns: the arena slots of the keyring key, of every KEK version, of the audit keys, of the tombstone key, and of the
authentication key of every slot. Invariants: key material is written straight into the arena, both random bytes and
unwrapped keys. A root key is used only to open, to make or to test a slot; the caller releases it right after. A new
slot was opened before it is returned. A body is trusted only after its tag was checked. What is made for the next body
is kept beside what the current one has until `settle`, since that body may fail to reach the disk. It must never do
I/O.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Container, Iterator
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from minikms.api.errors import DecryptionError, KeyUnreadableError, StartError, UnknownRootError
from minikms.crypto import aead, labels, roots, slots
from minikms.crypto.aead import DerivedKeys, XaesCipher
from minikms.crypto.slots import SlotBinding
from minikms.keys import keyring, root_slots
from minikms.keys.keyring import KekState
from minikms.keys.tombstones import TombstoneChain
from minikms.memory.arena import SecretArena, SecretSlot

WRAPPING_KEYS_MAX: Final = 1024
"""Keys that are derived from KEKs and stay in the arena: those of half a million DEKs that were wrapped together."""

Nonces = Callable[[], bytes]
FillRandom = Callable[[memoryview], None]


class UnlockedKeyring:
    """The keyring's body and its opened keys. The owner replaces `body` only after the new one is durable."""

    def __init__(self, arena: SecretArena, nonces: Nonces, body: keyring.Body) -> None:
        self._arena = arena
        self._nonces = nonces
        self._keyring_keys: dict[int, SecretSlot] = {}
        self._keks: dict[int, SecretSlot] = {}
        self._derived = DerivedKeys(arena, count_max=min(WRAPPING_KEYS_MAX, arena.slots // 4))
        self._derived_of: dict[int, dict[bytes, SecretSlot]] = {}
        """By KEK version."""
        self._audit: dict[int, tuple[SecretSlot, SecretSlot]] = {}
        self._tombstone: SecretSlot | None = None
        self._slot_auth: dict[str, SecretSlot] = {}
        """By slot id: the authentication keys."""
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
        provider: str,
        nonces: Nonces,
        fill_random: FillRandom,
        at: str,
    ) -> UnlockedKeyring:
        """A new keyring with one slot, KEK version 1 and the first audit key."""
        empty = keyring.Body(
            format=keyring.FORMAT,
            version=keyring.VERSION,
            keyring_id=keyring_id,
            epoch=1,
            created_at=at,
            updated_at=at,
            key_version=1,
            slots=(),
            keks=(),
            audit_keys=(),
            tombstone_log=keyring.TombstoneLog(0, b"", b""),
        )
        unlocked = cls(arena, nonces, empty)
        with unlocked._released_on_failure():
            fill_random(unlocked._new_keyring_key(1))
            slot = unlocked.make_slot(root, provider, slot_id="s1", at=at)
            kek = unlocked.make_kek(fill_random, version=1, state="active", at=at)
            audit_key = unlocked.make_audit_key(fill_random, version=1, at=at)
            tombstone = unlocked._tombstone = arena.allocate()
            fill_random(tombstone.view)
            wrapped = unlocked._seal_under(unlocked.keyring_key.view, labels.TOMBSTONE_KEY, 1, tombstone)
            log = keyring.TombstoneLog(0, TombstoneChain(keyring_id).head, wrapped)
            unlocked.body = msgspec.structs.replace(
                empty, slots=(slot,), keks=(kek,), audit_keys=(audit_key,), tombstone_log=log
            )
            keyring.check(unlocked.body)
        return unlocked

    @classmethod
    def open(
        cls, arena: SecretArena, root: memoryview, data: bytes, *, nonces: Nonces
    ) -> tuple[UnlockedKeyring, keyring.RootSlot]:
        """The keyring in the bytes of its file, and the slot that `root` opened.

        Raises StartError: for another root key (it names both fingerprints), or for an altered or damaged file.
        """
        body, body_bytes, tag = keyring.parse_file(data)
        given = roots.fingerprint(root)
        slot = body.slot_for(given)
        if slot is None:
            raise UnknownRootError(wrong_root_text(body, given))
        if not hmac.compare_digest(roots.commitment(root, slot.slot_id), slot.commitment):
            raise UnknownRootError(f"the keyring's slot does not belong to this root key; {keyring.WAY_OUT}")
        unlocked = cls(arena, nonces, body)
        with unlocked._released_on_failure():
            try:
                unlocked._open_slot(root, slot, unlocked._new_keyring_key(body.key_version))
                aead.check_authentic(unlocked.keyring_key.view, tag, labels.aad(labels.KEYRING, body_bytes))
            except DecryptionError:
                raise StartError(f"the keyring was altered or is damaged; {keyring.WAY_OUT}") from None
            try:
                unlocked._open_keys()
            except DecryptionError:
                raise StartError(f"a key of the keyring does not open; {keyring.WAY_OUT}") from None
        return unlocked, slot

    @property
    def keyring_key(self) -> SecretSlot:
        """The key of the body's version, which seals the KEKs and the audit keys."""
        return self._keyring_keys[self.body.key_version]

    @contextlib.contextmanager
    def _released_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.release()
            raise

    def _open_slot(self, root: memoryview, slot: keyring.RootSlot, target: memoryview) -> None:
        """Opens the keyring key of a slot, whose MAC is compared first. Raises DecryptionError."""
        binding = self._binding(slot, self.body.key_version)
        with self._arena.allocate() as auth:
            slots.auth_key_into(root, binding.keyring_id, binding.slot_id, auth.view)
            if not hmac.compare_digest(slots.mac(auth.view, binding, slot.sealed), slot.mac):
                raise DecryptionError("the slot's MAC does not match")
        slots.open_into(root, binding, slot.sealed, target)

    def _new_keyring_key(self, version: int) -> memoryview:
        slot = self._keyring_keys[version] = self._arena.allocate()
        return slot.view

    def _open_keys(self) -> None:
        for kek in self.body.keks:
            if kek.state != "destroyed":
                target = self._keks[kek.version] = self._arena.allocate()
                self._open_under(kek.wrapped, labels.KEK, kek.version, target)
        for key in self.body.audit_keys:
            mac_key, seed = self._audit[key.version] = (self._arena.allocate(), self._arena.allocate())
            self._open_under(key.wrapped_key, labels.AUDIT_KEY, key.version, mac_key)
            self._open_under(key.wrapped_seed, labels.AUDIT_SEED, key.version, seed)
        self._tombstone = self._arena.allocate()
        self._open_under(self.body.tombstone_log.wrapped_key, labels.TOMBSTONE_KEY, 1, self._tombstone)
        for slot in self.body.slots:
            auth = self._slot_auth[slot.slot_id] = self._arena.allocate()
            aead.open_into(self.keyring_key.view, slot.wrapped_auth, self._auth_aad(slot.slot_id), auth.view)

    # --- making keys -------------------------------------------------------------------------------------------------

    def make_slot(
        self,
        root: memoryview,
        provider: str,
        *,
        slot_id: str,
        at: str,
        replaces: str = "",
        shares: keyring.ShareSet | None = None,
    ) -> keyring.RootSlot:
        """A slot for the root key, which was proved to open it. Call `settle` once it is known which body stays."""
        slot = keyring.RootSlot(
            slot_id=slot_id,
            fingerprint=roots.fingerprint(root),
            provider=provider,
            created_at=at,
            commitment=roots.commitment(root, slot_id),
            tested_at=at,
            public_key=slots.public_key(root, self.body.keyring_id, slot_id),
            sealed=b"",
            mac=b"",
            wrapped_auth=b"",
            replaces=replaces,
            shares=shares,
        )
        auth = self._slot_auth[slot_id] = self._arena.allocate()
        slots.auth_key_into(root, self.body.keyring_id, slot_id, auth.view)
        slot = self._sealed_slot(slot, self.body.key_version)
        self.check_opens(root, slot)
        return slot

    def check_opens(self, root: memoryview, slot: keyring.RootSlot) -> None:
        """Raises DecryptionError unless the root key opens the slot and gives the present keyring key."""
        if not hmac.compare_digest(roots.commitment(root, slot.slot_id), slot.commitment):
            raise DecryptionError("the slot belongs to another root key")
        with self._arena.allocate() as opened:
            self._open_slot(root, slot, opened.view)
            if not hmac.compare_digest(opened.view, self.keyring_key.view):
                raise DecryptionError("the slot does not hold the keyring key")

    def make_resealed(self, fill_random: FillRandom, *, without: Container[str]) -> root_slots.Resealed:
        """Everything that the keyring key seals, and the slots except those in `without`, under a fresh keyring key.

        That key is used as soon as `body` has its number. Call `settle` once it is known which body stays.
        """
        number = self.body.key_version + 1
        fill_random(self._new_keyring_key(number))
        sealing = self._keyring_keys[number].view
        return root_slots.Resealed(
            key_version=number,
            slots=tuple(self._sealed_slot(slot, number) for slot in self.body.slots if slot.slot_id not in without),
            keks=tuple(self._resealed_kek(sealing, kek) for kek in self.body.keks),
            audit_keys=tuple(self._resealed_audit_key(sealing, key) for key in self.body.audit_keys),
            tombstone_log=self._resealed_tombstone_log(sealing),
        )

    def make_resealed_for(self, later: UnlockedKeyring, fill_random: FillRandom) -> root_slots.Resealed:
        """As `make_resealed`, with the slots of `later`, a later state of this keyring, in place of all slots of
        the body.
        """
        resealed = self.make_resealed(fill_random, without=[slot.slot_id for slot in self.body.slots])
        for slot in later.body.slots:
            auth = self._arena.allocate()
            auth.view[:] = later._slot_auth[slot.slot_id].view
            if (former := self._slot_auth.get(slot.slot_id)) is not None:
                former.release()
            self._slot_auth[slot.slot_id] = auth
        return resealed._replace(
            slots=tuple(self._sealed_slot(slot, resealed.key_version) for slot in later.body.slots)
        )

    def settle(self) -> None:
        """Zeroes what only a body that was not stored, or one before it, has: keyring keys, and the authentication keys
        of slots.
        """
        for version in [version for version in self._keyring_keys if version != self.body.key_version]:
            self._keyring_keys.pop(version).release()
        for slot_id in self._slot_auth.keys() - {slot.slot_id for slot in self.body.slots}:
            self._slot_auth.pop(slot_id).release()

    def _sealed_slot(self, slot: keyring.RootSlot, key_number: int) -> keyring.RootSlot:
        """The slot with the keyring key of this number sealed to it."""
        binding = self._binding(slot, key_number)
        keyring_key = self._keyring_keys[key_number].view
        auth = self._slot_auth[slot.slot_id].view
        sealed = slots.seal(slot.public_key, binding, keyring_key)
        return msgspec.structs.replace(
            slot,
            sealed=sealed,
            mac=slots.mac(auth, binding, sealed),
            wrapped_auth=aead.seal(keyring_key, self._nonces(), auth, self._auth_aad(slot.slot_id)),
        )

    def _resealed_kek(self, sealing: memoryview, kek: keyring.Kek) -> keyring.Kek:
        if kek.state == "destroyed":
            return kek
        wrapped = self._seal_under(sealing, labels.KEK, kek.version, self._keks[kek.version])
        return msgspec.structs.replace(kek, wrapped=wrapped)

    def _resealed_audit_key(self, sealing: memoryview, key: keyring.AuditKeyEntry) -> keyring.AuditKeyEntry:
        mac_key, seed = self._audit[key.version]
        return msgspec.structs.replace(
            key,
            wrapped_key=self._seal_under(sealing, labels.AUDIT_KEY, key.version, mac_key),
            wrapped_seed=self._seal_under(sealing, labels.AUDIT_SEED, key.version, seed),
        )

    def _resealed_tombstone_log(self, sealing: memoryview) -> keyring.TombstoneLog:
        wrapped = self._seal_under(sealing, labels.TOMBSTONE_KEY, 1, self._tombstone_slot())
        return msgspec.structs.replace(self.body.tombstone_log, wrapped_key=wrapped)

    def make_kek(self, fill_random: FillRandom, *, version: int, state: KekState, at: str) -> keyring.Kek:
        """A fresh random KEK version, kept in the arena under its number until `forget_kek` or `release`."""
        slot = self._keks[version] = self._arena.allocate()
        fill_random(slot.view)
        wrapped = self._seal_under(self.keyring_key.view, labels.KEK, version, slot)
        return keyring.Kek(version=version, state=state, created_at=at, wrapped=wrapped)

    def make_audit_key(
        self,
        fill_random: FillRandom,
        *,
        version: int,
        at: str,
        since_seq: int = 0,
        since_sig: bytes = b"",
        key_version: int | None = None,
    ) -> keyring.AuditKeyEntry:
        """A fresh audit key and a checkpoint seed (Ed25519, RFC 8032), both wrapped, with the public key in the clear.

        since_seq, since_sig: the last line of the audit log under the version before; empty for the first version.
        key_version: the keyring key that seals them; None means the current one.
        """
        key, seed = self._audit[version] = (self._arena.allocate(), self._arena.allocate())
        fill_random(key.view)
        fill_random(seed.view)
        public = Ed25519PrivateKey.from_private_bytes(seed.view).public_key().public_bytes_raw()
        sealing = self._keyring_keys[self.body.key_version if key_version is None else key_version].view
        return keyring.AuditKeyEntry(
            version=version,
            created_at=at,
            public_key=public,
            wrapped_key=self._seal_under(sealing, labels.AUDIT_KEY, version, key),
            wrapped_seed=self._seal_under(sealing, labels.AUDIT_SEED, version, seed),
            since_seq=since_seq,
            since_sig=since_sig,
        )

    # --- using them --------------------------------------------------------------------------------------------------

    def slot_auth_keys(self) -> list[tuple[keyring.RootSlot, memoryview]]:
        """The slots, each with its authentication key."""
        return [(slot, self._slot_auth[slot.slot_id].view) for slot in self.body.slots]

    def encode(self, body: keyring.Body) -> bytes:
        """The file that holds `body`, authenticated under the keyring key of the body's version."""
        body_bytes = keyring.encode_body(body)
        key = self._keyring_keys[body.key_version].view
        tag = aead.authenticate(key, self._nonces(), labels.aad(labels.KEYRING, body_bytes))
        return keyring.encode_file(body_bytes, tag)

    def kek(self, version: int) -> memoryview:
        """The KEK of a version, 32 bytes. Raises KeyUnreadableError if this keyring does not have it."""
        slot = self._keks.get(version)
        if slot is None:
            raise KeyUnreadableError(
                f"the key is wrapped under KEK version {version}, which this keyring does not have: "
                "the keyring is older than the key, or the KEK was destroyed"
            )
        return slot.view

    def kek_cipher(self, version: int) -> XaesCipher:
        """The cipher of a KEK, for a `with` block. Raises as `kek`."""
        return XaesCipher(self.kek(version), self._derived_of.setdefault(version, {}), self._derived)

    def audit_key(self, version: int) -> tuple[memoryview, memoryview]:
        """(HMAC key, Ed25519 seed) of an audit key version."""
        key, seed = self._audit[version]
        return key.view, seed.view

    @property
    def tombstone_key(self) -> memoryview:
        """The key of the tombstones' tags."""
        return self._tombstone_slot().view

    def _tombstone_slot(self) -> SecretSlot:
        if self._tombstone is None:
            raise StartError("the keyring was zeroed")
        return self._tombstone

    def forget_kek(self, version: int) -> None:
        """Zeroes a KEK version that was destroyed, or that was made for a rotation that could not begin."""
        slot = self._keks.pop(version, None)
        if slot is not None:
            self._derived.forget(self._derived_of.pop(version, {}))
            slot.release()

    def forget_audit_key(self, version: int) -> None:
        """Zeroes an audit key version that no stored body has."""
        for slot in self._audit.pop(version, ()):
            slot.release()

    def release(self) -> None:
        """Zeroes every key."""
        for derived in self._derived_of.values():
            self._derived.forget(derived)
        pairs = (slot for pair in self._audit.values() for slot in pair)
        for slot in (*self._keyring_keys.values(), *self._keks.values(), *pairs, *self._slot_auth.values()):
            slot.release()
        self._slot_auth.clear()
        if self._tombstone is not None:
            self._tombstone.release()
            self._tombstone = None
        self._keyring_keys.clear()
        self._keks.clear()
        self._audit.clear()

    def _seal_under(self, sealing: memoryview, label: bytes, version: int, key: SecretSlot) -> bytes:
        return aead.seal(sealing, self._nonces(), key.view, self._versioned_aad(label, version))

    def _open_under(self, wrapped: bytes, label: bytes, version: int, target: SecretSlot) -> None:
        aead.open_into(self.keyring_key.view, wrapped, self._versioned_aad(label, version), target.view)

    def _binding(self, slot: keyring.RootSlot, key_number: int) -> SlotBinding:
        return SlotBinding(self.body.keyring_id, slot.slot_id, slot.commitment, key_number)

    def _auth_aad(self, slot_id: str) -> bytes:
        return labels.aad(labels.SLOT_AUTH_KEY, self.body.keyring_id.encode(), slot_id.encode())

    def _versioned_aad(self, label: bytes, version: int) -> bytes:
        return labels.aad(label, self.body.keyring_id.encode(), labels.number(version))


def wrong_root_text(body: keyring.Body, given: str) -> str:
    """The error text for a root key that does not open this keyring: the reason, and what to do."""
    expected = " or ".join(slot.fingerprint for slot in body.slots)
    gone = [(old.fingerprint, old.rotated_at) for old in body.retired_roots]
    gone += [(old.fingerprint, old.removed_at) for old in body.revoking]
    for fingerprint, at in gone:
        if fingerprint == given:
            return (
                f"the root key {given} was removed or rotated away on {at}; this keyring opens under {expected}. "
                "Give one of these with --master-key-file or --root"
            )
    return (
        f"wrong root key: this keyring opens under {expected}, the given one is {given}. "
        "Nothing was changed; give the file of the right key with --master-key-file"
    )
