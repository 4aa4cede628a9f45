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

from minikms.api.errors import (
    DecryptionError,
    KeyUnreadableError,
    ReplicaForkedError,
    ReplicaRolledBackError,
    StartError,
    UnknownRootError,
)
from minikms.crypto import aead, labels, roots, slots
from minikms.crypto.aead import DerivedKeys, XaesCipher
from minikms.crypto.slots import Newcomer, SlotBinding
from minikms.keys import keyring, root_slots
from minikms.keys.keyring import KekState
from minikms.keys.tombstones import TombstoneChain
from minikms.memory.arena import SecretArena, SecretSlot

WRAPPING_KEYS_MAX: Final = 1024
"""Keys that are derived from KEKs and stay in the arena: those of half a million DEKs that were wrapped together."""

NEVER: Final = "1970-01-01T00:00:00Z"
"""When a root key was tested that has not opened its slot yet."""

Nonces = Callable[[], bytes]
FillRandom = Callable[[memoryview], None]


class EntrySealer:
    """Seals the entries of a keyring, and opens them. It keeps no key. sealing: a keyring key; number: its version."""

    def __init__(self, arena: SecretArena, nonces: Nonces, keyring_id: str) -> None:
        self._arena = arena
        self._nonces = nonces
        self._keyring_id = keyring_id

    def slot(self, slot: keyring.RootSlot, number: int, sealing: memoryview, auth: memoryview) -> keyring.RootSlot:
        """The slot with the keyring key sealed to it. auth: its authentication key."""
        binding = self._binding(slot, number)
        sealed = slots.seal(slot.public_key, binding, sealing)
        return msgspec.structs.replace(
            slot,
            sealed=sealed,
            mac=slots.mac(auth, binding, sealed),
            wrapped_auth=aead.seal(sealing, self._nonces(), auth, self._auth_aad(slot.slot_id)),
        )

    def open_slot(self, root: memoryview, slot: keyring.RootSlot, number: int, target: memoryview) -> None:
        """Opens the keyring key of a slot, whose MAC is compared first. Raises DecryptionError."""
        binding = self._binding(slot, number)
        with self._arena.allocate() as auth:
            slots.auth_key_into(root, binding.keyring_id, binding.slot_id, auth.view)
            if not hmac.compare_digest(slots.mac(auth.view, binding, slot.sealed), slot.mac):
                raise DecryptionError("the slot's MAC does not match")
        slots.open_into(root, binding, slot.sealed, target)

    def open_auth(self, sealing: memoryview, slot: keyring.RootSlot, target: SecretSlot) -> None:
        aead.open_into(sealing, slot.wrapped_auth, self._auth_aad(slot.slot_id), target.view)

    def kek(self, kek: keyring.Kek, sealing: memoryview, key: SecretSlot) -> keyring.Kek:
        return msgspec.structs.replace(kek, wrapped=self._seal(sealing, labels.KEK, kek.version, key.view))

    def audit_key(
        self, entry: keyring.AuditKeyEntry, sealing: memoryview, keys: tuple[SecretSlot, SecretSlot]
    ) -> keyring.AuditKeyEntry:
        mac_key, seed = keys
        return msgspec.structs.replace(
            entry,
            wrapped_key=self._seal(sealing, labels.AUDIT_KEY, entry.version, mac_key.view),
            wrapped_seed=self._seal(sealing, labels.AUDIT_SEED, entry.version, seed.view),
        )

    def open_audit_key(
        self, entry: keyring.AuditKeyEntry, sealing: memoryview, keys: tuple[SecretSlot, SecretSlot]
    ) -> None:
        self.open(sealing, entry.wrapped_key, labels.AUDIT_KEY, entry.version, keys[0])
        self.open(sealing, entry.wrapped_seed, labels.AUDIT_SEED, entry.version, keys[1])

    def resealed_audit(self, audit: keyring.AuditState, opening: memoryview, sealing: memoryview) -> keyring.AuditState:
        """The audit keys of any member, sealed again. Nothing of them stays in the arena. Raises DecryptionError."""
        resealed = []
        with self._arena.allocate() as mac_key, self._arena.allocate() as seed:
            for key in audit.audit_keys:
                self.open_audit_key(key, opening, (mac_key, seed))
                resealed.append(self.audit_key(key, sealing, (mac_key, seed)))
        return msgspec.structs.replace(audit, audit_keys=tuple(resealed))

    def tombstone_log(self, log: keyring.TombstoneLog, sealing: memoryview, key: memoryview) -> keyring.TombstoneLog:
        return msgspec.structs.replace(log, wrapped_key=self._seal(sealing, labels.TOMBSTONE_KEY, 1, key))

    def open(self, sealing: memoryview, wrapped: bytes, label: bytes, version: int, target: SecretSlot) -> None:
        """Opens the key of an entry other than a slot. Raises DecryptionError."""
        aead.open_into(sealing, wrapped, self._aad(label, version), target.view)

    def _seal(self, sealing: memoryview, label: bytes, version: int, key: memoryview) -> bytes:
        return aead.seal(sealing, self._nonces(), key, self._aad(label, version))

    def _binding(self, slot: keyring.RootSlot, number: int) -> SlotBinding:
        return SlotBinding(self._keyring_id, slot.slot_id, slot.commitment, number)

    def _auth_aad(self, slot_id: str) -> bytes:
        return labels.aad(labels.SLOT_AUTH_KEY, self._keyring_id.encode(), slot_id.encode())

    def _aad(self, label: bytes, version: int) -> bytes:
        return labels.aad(label, self._keyring_id.encode(), labels.number(version))


GIVE_ANOTHER: Final = "Give one of these with --master-key-file or --root"


class NeedsRootError(Exception):
    """A later keyring has another keyring key, which only a root key opens."""


@contextlib.contextmanager
def _released_on_failure(unlocked: UnlockedKeyring) -> Iterator[None]:
    try:
        yield
    except BaseException:
        unlocked.release()
        raise


def _labelled(body: keyring.Body, label: bytes, data: bytes) -> bytes:
    return labels.aad(label, body.keyring_id.encode(), data)


class UnlockedKeyring:
    """The keyring's body and its opened keys. The owner replaces `body` only after the new one is durable.

    `member_id`: of this host of a replicated key service; otherwise empty. Only the audit keys of its log are opened.
    """

    def __init__(self, arena: SecretArena, nonces: Nonces, body: keyring.Body, member_id: str = "") -> None:
        self.member_id = member_id
        self._arena = arena
        self._nonces = nonces
        self._entries = EntrySealer(arena, nonces, body.keyring_id)
        self._keyring_keys: dict[int, SecretSlot] = {}
        self._expected = 0
        """The version of the keyring key that `expect` has opened."""
        self._keks: dict[int, SecretSlot] = {}
        self._derived = DerivedKeys(arena, count_max=min(WRAPPING_KEYS_MAX, arena.slots // 4))
        self._derived_of: dict[int, dict[bytes, SecretSlot]] = {}
        """The derived keys of each KEK version."""
        self._audit: dict[int, tuple[SecretSlot, SecretSlot]] = {}
        self._tombstone: SecretSlot | None = None
        self._slot_auth: dict[str, SecretSlot] = {}
        """The authentication key of each slot."""
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
        with _released_on_failure(unlocked):
            fill_random(unlocked._new_keyring_key(1))
            slot = unlocked.make_slot(root, provider, slot_id="s1", at=at)
            kek = unlocked.make_kek(fill_random, version=1, state="active", at=at)
            audit_key = unlocked.make_audit_key(fill_random, version=1, at=at)
            tombstone = unlocked._tombstone = arena.allocate()
            fill_random(tombstone.view)
            log = unlocked._entries.tombstone_log(
                keyring.TombstoneLog(0, TombstoneChain(keyring_id).head, b""), unlocked.keyring_key.view, tombstone.view
            )
            unlocked.body = msgspec.structs.replace(
                empty, slots=(slot,), keks=(kek,), audit_keys=(audit_key,), tombstone_log=log
            )
            keyring.check(unlocked.body)
        return unlocked

    @classmethod
    def open(
        cls,
        arena: SecretArena,
        root: memoryview,
        data: bytes,
        *,
        nonces: Nonces,
        member_id: str = "",
        if_wrong: str = GIVE_ANOTHER,
    ) -> tuple[UnlockedKeyring, keyring.RootSlot]:
        """The keyring in the bytes of its file, and the slot that `root` opened.

        Raises StartError: for another root key (it names both fingerprints, and says `if_wrong`), for an altered or
        damaged file, or if it
        does not have the member.
        """
        body = keyring.parse_file(data)[0]
        unlocked = cls(arena, nonces, body, member_id)
        with _released_on_failure(unlocked):
            slot = unlocked._open_keyring_key(root, data, if_wrong)
            if member_id and body.member(member_id) is None:
                raise StartError(f"keyring.json has no member {member_id}: this host was removed, or has to join anew")
            try:
                unlocked._open_keys(body)
            except DecryptionError:
                raise StartError(f"a key of the keyring does not open; {keyring.WAY_OUT}") from None
        return unlocked, slot

    def _open_keyring_key(self, root: memoryview, data: bytes, if_wrong: str = GIVE_ANOTHER) -> keyring.RootSlot:
        """Opens the keyring key in a keyring file, and authenticates the file. Returns the slot that `root` opens."""
        body, body_bytes, tag = keyring.parse_file(data)
        fingerprint = roots.fingerprint(root)
        slot = body.slot_for(fingerprint)
        if slot is None:
            raise UnknownRootError(wrong_root_text(body, fingerprint, if_wrong))
        if not hmac.compare_digest(roots.commitment(root, slot.slot_id), slot.commitment):
            raise UnknownRootError(f"the keyring's slot does not belong to this root key; {keyring.WAY_OUT}")
        try:
            sealing = self._new_keyring_key(body.key_version)
            self._entries.open_slot(root, slot, body.key_version, sealing)
            aead.check_authentic(sealing, tag, labels.aad(labels.KEYRING, body_bytes))
        except DecryptionError:
            raise StartError(f"the keyring was altered or is damaged; {keyring.WAY_OUT}") from None
        return slot

    @property
    def audit(self) -> keyring.AuditState:
        """The audit state of this host's log."""
        return self.body.audit_of(self.member_id)

    @property
    def keyring_key(self) -> SecretSlot:
        """The key of the body's version, which seals the KEKs and the audit keys."""
        return self._keyring_keys[self.body.key_version]

    def _new_keyring_key(self, version: int) -> memoryview:
        slot = self._keyring_keys[version] = self._arena.allocate()
        return slot.view

    def expect(self, root: memoryview, data: bytes) -> None:
        """Opens the keyring key of a later keyring, for `advance`. Does nothing for a keyring that is not later. Raises
        StartError if this root key does not open it; then release everything.
        """
        later = keyring.parse_file(data)[0]
        if later.key_version > self.body.key_version:
            self._open_keyring_key(root, data)
            self._expected = later.key_version

    def advance(self, data: bytes) -> keyring.Body:
        """A later body of this keyring, from the bytes of its file, with its keys opened. Once it is durable, assign it
        to `body`; in any case call `settle`.

        Raises ReplicaRolledBackError for an older one, ReplicaForkedError for one of another keyring or history, and
        NeedsRootError.
        """
        try:
            body, body_bytes, tag = keyring.parse_file(data)
        except StartError:
            raise ReplicaForkedError("the keyring of the database is damaged or of an unknown format version") from None
        if body.keyring_id != self.body.keyring_id:
            raise ReplicaForkedError("the keyring of the database is of another key service")
        if body.key_version < self.body.key_version:
            raise ReplicaRolledBackError("the keyring of the database is from before the removal of a root key")
        if body.key_version not in self._keyring_keys:
            raise NeedsRootError
        try:
            sealing = self._keyring_keys[body.key_version].view
            aead.check_authentic(sealing, tag, labels.aad(labels.KEYRING, body_bytes))
        except DecryptionError:
            raise ReplicaForkedError("the keyring of the database was altered") from None
        if body.epoch < self.body.epoch:
            raise ReplicaRolledBackError(
                f"the keyring of the database has epoch {body.epoch}, before {self.body.epoch}"
            )
        if body.epoch == self.body.epoch and body != self.body:
            raise ReplicaForkedError(f"there are two keyrings of epoch {body.epoch}")
        if self.member_id and body.member(self.member_id) is None:
            raise ReplicaForkedError("this host was removed from the key service")
        try:
            self._open_keys(body)
        except DecryptionError:
            raise ReplicaForkedError("a key of the keyring of the database does not open") from None
        return body

    def _open_keys(self, body: keyring.Body) -> None:
        """Opens what is not open yet."""
        sealing, entries = self._keyring_keys[body.key_version].view, self._entries
        for kek in body.keks:
            if kek.state != "destroyed" and kek.version not in self._keks:
                target = self._keks[kek.version] = self._arena.allocate()
                entries.open(sealing, kek.wrapped, labels.KEK, kek.version, target)
        for key in body.audit_of(self.member_id).audit_keys:
            if key.version not in self._audit:
                keys = self._audit[key.version] = (self._arena.allocate(), self._arena.allocate())
                entries.open_audit_key(key, sealing, keys)
        if self._tombstone is None:
            self._tombstone = self._arena.allocate()
            entries.open(sealing, body.tombstone_log.wrapped_key, labels.TOMBSTONE_KEY, 1, self._tombstone)
        for slot in body.slots:
            if slot.slot_id not in self._slot_auth:
                auth = self._slot_auth[slot.slot_id] = self._arena.allocate()
                entries.open_auth(sealing, slot, auth)

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
        auth = self._slot_auth[slot_id] = self._arena.allocate()
        derived = slots.derived(root, auth.view, self.body.keyring_id, slot_id)
        slot = self._sealed_slot(derived, auth, provider, at=at)
        self.check_opens(root, slot)
        return msgspec.structs.replace(slot, tested_at=at, replaces=replaces, shares=shares)

    def invitation_key(self) -> bytes:
        """The public key that a new host seals the authentication key of its slot to. A removed root key ends it."""
        return slots.public_key(self.keyring_key.view, self.body.keyring_id, slots.INVITATION)

    def make_slot_for(self, newcomer: Newcomer, provider: str, *, at: str) -> keyring.RootSlot:
        """A slot for a root key of another host, not tested yet. Call `settle` once it is known which body stays.

        Raises DecryptionError if the newcomer was not invited with the present keyring key.
        """
        if newcomer.keyring_id != self.body.keyring_id:
            raise DecryptionError("the request is for another keyring")
        auth = self._slot_auth[newcomer.slot_id] = self._arena.allocate()
        slots.open_auth_into(self.keyring_key.view, newcomer, auth.view)
        return self._sealed_slot(newcomer, auth, provider, at=at)

    def _sealed_slot(self, derived: Newcomer, auth: SecretSlot, provider: str, *, at: str) -> keyring.RootSlot:
        slot = keyring.RootSlot(
            slot_id=derived.slot_id,
            fingerprint=derived.fingerprint,
            provider=provider,
            created_at=at,
            commitment=derived.commitment,
            tested_at=NEVER,
            public_key=derived.public_key,
            sealed=b"",
            mac=b"",
            wrapped_auth=b"",
        )
        return self._entries.slot(slot, self.body.key_version, self.keyring_key.view, auth.view)

    def check_opens(self, root: memoryview, slot: keyring.RootSlot) -> None:
        """Checks that the root key opens the slot and gives the present keyring key. Raises DecryptionError."""
        if not hmac.compare_digest(roots.commitment(root, slot.slot_id), slot.commitment):
            raise DecryptionError("the slot belongs to another root key")
        with self._arena.allocate() as opened:
            self._entries.open_slot(root, slot, self.body.key_version, opened.view)
            if not hmac.compare_digest(opened.view, self.keyring_key.view):
                raise DecryptionError("the slot does not hold the keyring key")

    def make_resealed(self, fill_random: FillRandom, *, without: Container[str]) -> root_slots.Resealed:
        """Everything that the keyring key seals, and the slots except those in `without`, under a fresh keyring key.

        That key is used as soon as `body` has its number. Call `settle` once it is known which body stays.
        """
        number = self.body.key_version + 1
        fill_random(self._new_keyring_key(number))
        opening, sealing, entries = self.keyring_key.view, self._keyring_keys[number].view, self._entries

        def resealed(audit: keyring.AuditState) -> keyring.AuditState:
            return entries.resealed_audit(audit, opening, sealing)

        return root_slots.Resealed(
            key_version=number,
            slots=tuple(
                entries.slot(slot, number, sealing, auth)
                for slot, auth in self.slot_auth_keys()
                if slot.slot_id not in without
            ),
            keks=tuple(
                kek if kek.state == "destroyed" else entries.kek(kek, sealing, self._keks[kek.version])
                for kek in self.body.keks
            ),
            audit_keys=resealed(self.body.audit_of("")).audit_keys,
            members=tuple(
                member if member.audit is None else msgspec.structs.replace(member, audit=resealed(member.audit))
                for member in self.body.members
            ),
            tombstone_log=entries.tombstone_log(self.body.tombstone_log, sealing, self.tombstone_key),
        )

    def make_resealed_for(self, later: UnlockedKeyring, fill_random: FillRandom) -> root_slots.Resealed:
        """Makes resealed slots like `make_resealed`, from the slots of `later`, a later state of this keyring."""
        resealed = self.make_resealed(fill_random, without=[slot.slot_id for slot in self.body.slots])
        number, resealed_slots = resealed.key_version, []
        for slot, key in later.slot_auth_keys():
            auth = self._arena.allocate()
            auth.view[:] = key
            if (former := self._slot_auth.get(slot.slot_id)) is not None:
                former.release()
            self._slot_auth[slot.slot_id] = auth
            resealed_slots.append(self._entries.slot(slot, number, self._keyring_keys[number].view, auth.view))
        return resealed._replace(slots=tuple(resealed_slots))

    def settle(self) -> None:
        """Zeroes every key that the body does not have, except the keyring key that `expect` has opened."""
        number = self.body.key_version
        for version in [one for one in self._keyring_keys if one != number and not number < one == self._expected]:
            self._keyring_keys.pop(version).release()
        for slot_id in self._slot_auth.keys() - {slot.slot_id for slot in self.body.slots}:
            self._slot_auth.pop(slot_id).release()
        for version in self._audit.keys() - {key.version for key in self.audit.audit_keys}:
            for slot in self._audit.pop(version):
                slot.release()
        for version in [version for version in self._keks if not self.body.has_kek(version)]:
            self._derived.forget(self._derived_of.pop(version, {}))
            self._keks.pop(version).release()

    def make_kek(self, fill_random: FillRandom, *, version: int, state: KekState, at: str) -> keyring.Kek:
        """A fresh random KEK version, in the arena. Call `settle` once it is known which body stays."""
        slot = self._keks[version] = self._arena.allocate()
        fill_random(slot.view)
        kek = keyring.Kek(version=version, state=state, created_at=at, wrapped=b"")
        return self._entries.kek(kek, self.keyring_key.view, slot)

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
        keys = self._audit[version] = (self._arena.allocate(), self._arena.allocate())
        entry = keyring.AuditKeyEntry(version, at, b"", b"", b"", since_seq, since_sig)
        sealing = self._keyring_keys[self.body.key_version if key_version is None else key_version].view
        return self._filled(entry, keys, fill_random, sealing)

    def make_member_audit(self, fill_random: FillRandom, *, at: str) -> keyring.AuditState:
        """For the log of a new member: its first audit key, which does not stay in the arena."""
        entry = keyring.AuditKeyEntry(1, at, b"", b"", b"")
        with self._arena.allocate() as key, self._arena.allocate() as seed:
            return keyring.AuditState((self._filled(entry, (key, seed), fill_random, self.keyring_key.view),))

    def _filled(
        self,
        entry: keyring.AuditKeyEntry,
        keys: tuple[SecretSlot, SecretSlot],
        fill_random: FillRandom,
        sealing: memoryview,
    ) -> keyring.AuditKeyEntry:
        """The entry with fresh keys."""
        for key in keys:
            fill_random(key.view)
        public = Ed25519PrivateKey.from_private_bytes(keys[1].view).public_key().public_bytes_raw()
        return self._entries.audit_key(msgspec.structs.replace(entry, public_key=public), sealing, keys)

    # --- using them --------------------------------------------------------------------------------------------------

    def slot_auth_keys(self) -> list[tuple[keyring.RootSlot, memoryview]]:
        return [(slot, self._slot_auth[slot.slot_id].view) for slot in self.body.slots]

    def encode(self, body: keyring.Body) -> bytes:
        """The file that holds `body`, authenticated under the keyring key of the body's version."""
        body_bytes = keyring.encode_body(body)
        key = self._keyring_keys[body.key_version].view
        tag = aead.authenticate(key, self._nonces(), labels.aad(labels.KEYRING, body_bytes))
        return keyring.encode_file(body_bytes, tag)

    def tag_of(self, label: bytes, data: bytes, *, key_version: int | None = None) -> bytes:
        """Authenticates data of this keyring under a keyring key; None: the one in use."""
        key = self._keyring_keys[self.body.key_version if key_version is None else key_version].view
        return aead.authenticate(key, self._nonces(), _labelled(self.body, label, data))

    def check_tag(self, label: bytes, tag: bytes, data: bytes, *, key_version: int | None = None) -> None:
        """Checks that `tag` is the tag that `tag_of` makes. Raises DecryptionError."""
        key = self._keyring_keys[self.body.key_version if key_version is None else key_version].view
        aead.check_authentic(key, tag, _labelled(self.body, label, data))

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
        if self._tombstone is None:
            raise StartError("the keyring was zeroed")
        return self._tombstone.view

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


def wrong_root_text(body: keyring.Body, candidate: str, advice: str) -> str:
    """The error text for a root key that does not open this keyring: the reason, and what to do."""
    expected = " or ".join(slot.fingerprint for slot in body.slots)
    former = [(old.fingerprint, old.rotated_at) for old in body.retired_roots]
    former += [(old.fingerprint, old.removed_at) for old in body.revoking]
    for fingerprint, at in former:
        if fingerprint == candidate:
            return (
                f"the root key {candidate} was removed or rotated away on {at}; this keyring opens under {expected}. "
                f"{advice}"
            )
    facts = f"wrong root key: this keyring opens under {expected}, the given one is {candidate}"
    return f"{facts}. Nothing was changed. {advice}"
