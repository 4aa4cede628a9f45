"""The state of a replicated data directory: how many changes, which key files, all of them authenticated.

Owns: the sum over all key files, the encoding of the state with its tag (docs/spec/replica.md). Invariants: the sum
depends on which contents there are, not on their order; a member accepts a state only under the tag of the keyring
that came with it. No I/O. It must never decide whether a key is opened.

The sum is MSet-Add-Hash (Clarke et al., ASIACRYPT 2003): the HMACs of the entries, added modulo 2^256, so that one
change costs two HMACs however many keys there are.
"""

from __future__ import annotations

import hmac
from typing import Final, NamedTuple, Self

from minikms.api.errors import DecryptionError
from minikms.crypto import labels
from minikms.keys.unlocked import UnlockedKeyring

SUM_BYTES: Final = 32
_MODULUS: Final = 1 << (8 * SUM_BYTES)
_FIELD_BYTES: Final = 8
STATE_BYTES: Final = 4 * _FIELD_BYTES + SUM_BYTES


class EntrySum(NamedTuple):
    """Over this number of `files`."""

    files: int = 0
    value: int = 0

    def changed(self, *, added: int = 0, new: int = 0, old: int = 0) -> Self:
        """With `added` more files; `new` and `old`: the sums of `entry` over what came and went."""
        return self.__class__(self.files + added, (self.value + new - old) % _MODULUS)


def entry(unlocked: UnlockedKeyring, key_id: str, content: bytes) -> int:
    """The term of one key file."""
    data = labels.aad(labels.REPLICA_ENTRY, unlocked.body.keyring_id.encode(), key_id.encode(), content)
    return int.from_bytes(hmac.digest(unlocked.tombstone_key, data, "sha256"), "big")


class SignedState(NamedTuple):
    """After change `number`, which a member made in `term`. `epoch`: of the keyring after this change; a keyring of
    another epoch does not belong to the state.
    """

    term: int
    number: int
    epoch: int
    entries: EntrySum

    def signed(self, unlocked: UnlockedKeyring, key_version: int) -> bytes:
        """Its encoding, then the tag under the keyring key of the keyring that belongs to it."""
        data = self._encoded()
        return data + unlocked.tag_of(labels.REPLICA_STATE, data, key_version=key_version)

    def _encoded(self) -> bytes:
        numbers = b"".join(map(labels.number, (self.term, self.number, self.epoch, self.entries.files)))
        return numbers + self.entries.value.to_bytes(SUM_BYTES, "big")


def read_state(unlocked: UnlockedKeyring, signed: bytes, key_version: int | None = None) -> SignedState:
    """`key_version`: of the keyring key; None: the one in use. Raises DecryptionError unless the tag is of it."""
    data, tag = signed[:STATE_BYTES], signed[STATE_BYTES:]
    if len(data) != STATE_BYTES:
        raise DecryptionError("the state of the replicated directory has the wrong length")
    unlocked.check_tag(labels.REPLICA_STATE, tag, data, key_version=key_version)
    term, number, epoch, files = (
        int.from_bytes(data[at : at + _FIELD_BYTES], "big") for at in range(0, 4 * _FIELD_BYTES, _FIELD_BYTES)
    )
    return SignedState(term, number, epoch, EntrySum(files, int.from_bytes(data[4 * _FIELD_BYTES :], "big")))
