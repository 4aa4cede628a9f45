"""An opened DEK: what a record is encrypted, decrypted or authenticated with.

Owns: the associated data of records under the key, and what its state and purpose allow. Invariants: the key is in the
arena, and zeroed by `release`; a retired key only decrypts; a key of purpose `mac` only makes MACs. No I/O.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from minikms.api.errors import KeyRetiredError, WrongPurposeError, WrongThreadError
from minikms.crypto import labels
from minikms.crypto.records import RecordKey, RecordKeys
from minikms.keys.dek import DekRecord, DekState
from minikms.memory.arena import SecretSlot


class OpenDek(RecordKey):
    """A DEK in the arena, with everything that its use needs. `release` zeroes it."""

    __slots__ = ("aad_if_none", "aad_prefix", "key_id", "purpose", "state", "thread_id")

    def __init__(self, record: DekRecord, slot: SecretSlot, keys: RecordKeys) -> None:
        super().__init__(slot, keys)
        self.key_id = record.id
        self.thread_id = record.thread_id
        self.purpose = record.purpose
        self.state: DekState = record.state
        self.aad_prefix = labels.record_aad_prefix(key_id=record.id, thread_id=record.thread_id)
        self.aad_if_none = labels.record_aad(self.aad_prefix, b"")

    def __repr__(self) -> str:
        return f"<OpenDek {self.key_id} {self.state}>"

    def record_aad(self, caller_aad: bytes) -> bytes:
        """The associated data of a record under this key."""
        return labels.record_aad(self.aad_prefix, caller_aad)

    def check_thread(self, thread_id: str) -> None:
        """Checks that the key belongs to the thread. Raises WrongThreadError."""
        if thread_id != self.thread_id:
            raise WrongThreadError("the key belongs to another thread")

    def check_encrypts(self) -> None:
        """Checks that the key is active. Raises KeyRetiredError."""
        if self.state != "active":
            raise KeyRetiredError(f"key {self.key_id} is retired: it only decrypts; use the thread's current key")

    def mac(self, plaintext: bytes, caller_aad: bytes) -> bytes:
        """The MAC of the plaintext. Raises WrongPurposeError unless the purpose of the key is `mac`."""
        if self.purpose != "mac":
            raise WrongPurposeError("MACs are made under keys of purpose mac")
        return super().mac(plaintext, caller_aad)

    def _other_cipher(self, prefix: bytes) -> AESGCM:
        """On the way of each record to its first cipher of a turn. Raises WrongPurposeError for a key of MACs."""
        if self.purpose == "mac":
            raise WrongPurposeError("a key of purpose mac neither encrypts nor decrypts")
        return super()._other_cipher(prefix)
