"""The unlocked keyring: its body, and its keys in the arena.

Owns: the arena slots of the keyring key, of every KEK version and of the audit keys. Invariants: key material is
written straight into the arena, both random bytes and unwrapped keys. The root key is used only to open or to make a
slot; the caller releases it right after. A body is trusted only after its tag was checked. A new keyring key is kept
beside the current one until `settle`, since the body that contains it may fail to reach the disk. It must never do I/O.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Iterator

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from minikms.crypto import aead, labels, roots
from minikms.errors import DecryptionError, KeyUnreadableError, StartError
from minikms.keys import keyring
from minikms.keys.keyring import KekState
from minikms.memory.arena import SecretArena, SecretSlot

Nonces = Callable[[], bytes]
FillRandom = Callable[[memoryview], None]


class UnlockedKeyring:
    """The keyring's body and its opened keys. The owner replaces `body` only after the new one is durable."""

    def __init__(self, arena: SecretArena, nonces: Nonces, body: keyring.Body) -> None:
        self._arena = arena
        self._nonces = nonces
        self._keyring_keys: dict[int, SecretSlot] = {}
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
        )
        unlocked = cls(arena, nonces, empty)
        with unlocked._released_on_failure():
            fill_random(unlocked._new_keyring_key(1))
            slot = unlocked._make_slot(root, provider, opens=1, slot_id="s1", at=at)
            kek = unlocked.make_kek(fill_random, version=1, state="active", at=at)
            audit_key = unlocked.make_audit_key(fill_random, version=1, at=at)
            unlocked.body = msgspec.structs.replace(empty, slots=(slot,), keks=(kek,), audit_keys=(audit_key,))
            keyring.check(unlocked.body)
        return unlocked

    @classmethod
    def open(
        cls, arena: SecretArena, root: memoryview, data: bytes, *, nonces: Nonces
    ) -> tuple[UnlockedKeyring, keyring.Slot]:
        """The keyring in the bytes of its file, and the slot that `root` opened.

        Raises StartError: for another root key (it names both fingerprints), or for an altered or damaged file.
        """
        body, body_bytes, tag = keyring.parse_file(data)
        given = roots.fingerprint(root)
        slot = body.slot_for(given)
        if slot is None:
            raise StartError(wrong_root_text(body, given))
        if not hmac.compare_digest(roots.commitment(root, slot.slot_id), slot.commitment):
            raise StartError(f"the keyring's slot does not belong to this root key; {keyring.WAY_OUT}")
        unlocked = cls(arena, nonces, body)
        with unlocked._released_on_failure():
            try:
                unlocked._open_keyring_key(root, slot)
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

    def _open_keyring_key(self, root: memoryview, slot: keyring.Slot) -> None:
        """Opens the keyring key of the slot, then link by link the newest one, and keeps only that one."""
        body = self.body
        aad = _slot_aad(body.keyring_id, slot.slot_id, slot.fingerprint, slot.opens)
        aead.open_into(root, slot.wrapped, aad, self._new_keyring_key(slot.opens))
        for link in body.links:
            if link.version > slot.opens:
                before = self._keyring_keys[link.version - 1].view
                target = self._new_keyring_key(link.version)
                aead.open_into(before, link.wrapped, self._versioned_aad(labels.KEYRING_KEY, link.version), target)
        self.settle()

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

    # --- making keys -------------------------------------------------------------------------------------------------

    def make_root(
        self, root: memoryview, provider: str, fill_random: FillRandom, *, slot_id: str, at: str
    ) -> keyring.NewRoot:
        """The parts that a new root key adds to the body: a slot, and every key sealed under a fresh keyring key.

        The new keyring key is used as soon as `body` has its version. Call `settle` once it is known which body stays.
        """
        before = self.keyring_key.view
        version = self.body.key_version + 1
        fill_random(self._new_keyring_key(version))
        link = self._seal_under(before, labels.KEYRING_KEY, version, self._keyring_keys[version])
        sealing = self._keyring_keys[version].view
        return keyring.NewRoot(
            slot=self._make_slot(root, provider, opens=version, slot_id=slot_id, at=at),
            link=keyring.Link(version, link),
            keks=tuple(self._resealed_kek(sealing, kek) for kek in self.body.keks),
            audit_keys=tuple(self._resealed_audit_key(sealing, key) for key in self.body.audit_keys),
        )

    def settle(self) -> None:
        """Zeroes every keyring key but the one of the current body."""
        for version in [version for version in self._keyring_keys if version != self.body.key_version]:
            self._keyring_keys.pop(version).release()

    def _make_slot(self, root: memoryview, provider: str, *, opens: int, slot_id: str, at: str) -> keyring.Slot:
        name = roots.fingerprint(root)
        aad = _slot_aad(self.body.keyring_id, slot_id, name, opens)
        return keyring.Slot(
            slot_id=slot_id,
            fingerprint=name,
            provider=provider,
            created_at=at,
            commitment=roots.commitment(root, slot_id),
            opens=opens,
            wrapped=aead.seal(root, self._nonces(), self._keyring_keys[opens].view, aad),
        )

    def _resealed_kek(self, sealing: memoryview, kek: keyring.Kek) -> keyring.Kek:
        if kek.state == "destroyed":
            return kek
        wrapped = self._seal_under(sealing, labels.KEK, kek.version, self._keks[kek.version])
        return msgspec.structs.replace(kek, wrapped=wrapped)

    def _resealed_audit_key(self, sealing: memoryview, key: keyring.AuditKey) -> keyring.AuditKey:
        mac_key, seed = self._audit[key.version]
        return msgspec.structs.replace(
            key,
            wrapped_key=self._seal_under(sealing, labels.AUDIT_KEY, key.version, mac_key),
            wrapped_seed=self._seal_under(sealing, labels.AUDIT_SEED, key.version, seed),
        )

    def make_kek(
        self,
        fill_random: FillRandom,
        *,
        version: int,
        state: KekState,
        at: str,
        key_version: int | None = None,
    ) -> keyring.Kek:
        """A fresh random KEK version, kept in the arena under its number until `forget_kek` or `release`.

        It is sealed under the keyring key of version `key_version`; None means the current one.
        """
        slot = self._keks[version] = self._arena.allocate()
        fill_random(slot.view)
        sealing = self._keyring_keys[self.body.key_version if key_version is None else key_version].view
        wrapped = self._seal_under(sealing, labels.KEK, version, slot)
        return keyring.Kek(version=version, state=state, created_at=at, wraps_reserved=0, wrapped=wrapped)

    def make_audit_key(
        self, fill_random: FillRandom, *, version: int, at: str, since_seq: int = 0, since_sig: bytes = b""
    ) -> keyring.AuditKey:
        """A fresh audit key and a checkpoint seed (Ed25519, RFC 8032), both wrapped, with the public key in the clear.

        since_seq, since_sig: the last line of the audit log under the version before; empty for the first version.
        """
        key, seed = self._audit[version] = (self._arena.allocate(), self._arena.allocate())
        fill_random(key.view)
        fill_random(seed.view)
        public = Ed25519PrivateKey.from_private_bytes(seed.view).public_key().public_bytes_raw()
        sealing = self.keyring_key.view
        return keyring.AuditKey(
            version=version,
            created_at=at,
            public_key=public,
            wrapped_key=self._seal_under(sealing, labels.AUDIT_KEY, version, key),
            wrapped_seed=self._seal_under(sealing, labels.AUDIT_SEED, version, seed),
            since_seq=since_seq,
            since_sig=since_sig,
        )

    # --- using them --------------------------------------------------------------------------------------------------

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

    def audit_key(self, version: int) -> tuple[memoryview, memoryview]:
        """(HMAC key, Ed25519 seed) of an audit key version."""
        key, seed = self._audit[version]
        return key.view, seed.view

    def forget_kek(self, version: int) -> None:
        """Zeroes a KEK version that was destroyed, or that was made for a rotation that could not begin."""
        slot = self._keks.pop(version, None)
        if slot is not None:
            slot.release()

    def release(self) -> None:
        """Zeroes every key."""
        pairs = (slot for pair in self._audit.values() for slot in pair)
        for slot in (*self._keyring_keys.values(), *self._keks.values(), *pairs):
            slot.release()
        self._keyring_keys.clear()
        self._keks.clear()
        self._audit.clear()

    def _seal_under(self, sealing: memoryview, label: bytes, version: int, key: SecretSlot) -> bytes:
        return aead.seal(sealing, self._nonces(), key.view, self._versioned_aad(label, version))

    def _open_under(self, wrapped: bytes, label: bytes, version: int, target: SecretSlot) -> None:
        aead.open_into(self.keyring_key.view, wrapped, self._versioned_aad(label, version), target.view)

    def _versioned_aad(self, label: bytes, version: int) -> bytes:
        return labels.aad(label, self.body.keyring_id.encode(), labels.number(version))


def _slot_aad(keyring_id: str, slot_id: str, fingerprint: str, opens: int) -> bytes:
    return labels.aad(labels.SLOT, keyring_id.encode(), slot_id.encode(), fingerprint.encode(), labels.number(opens))


def wrong_root_text(body: keyring.Body, given: str) -> str:
    """The error text for a root key that does not open this keyring: the reason, and what to do."""
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
