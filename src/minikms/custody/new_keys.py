"""New keys, made in groups: the creates of one step of the event loop share the cipher of the KEK and one record write.

Owns: the making and wrapping of new keys. Invariants:
- New keys are wrapped under the keyring's current wrapping KEK, which is taken in the step of the event loop in which
  they are wrapped. A rotation waits for the group that took the older version (`GroupCommit.group_ended`).
- A key is answered only after `Changes.create` made it durable; then the index has it.
- The cipher of the KEK, which has key schedules on the heap, is closed in the step in which it was made. Then the used
  part of the stack is overwritten.
- `Wanted.permit` is called in the step in which the key is made. A refusal is an error of its own key.

It runs in the event loop's thread; only waits for the disk run elsewhere. An unwrapped key must never leave the arena,
nor stay in it while the group waits for the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from minikms import api
from minikms.api.errors import KmsRefusedError, StorageUnavailableError
from minikms.crypto.aead import NonceSource
from minikms.custody.journal_format import Change
from minikms.custody.keyring_file import StoredKeyring
from minikms.custody.replication import Changes
from minikms.keys import dek
from minikms.keys.dek import KEY_ID_RANDOM_BYTES, UNIX_MS_MAX, DekRecord, key_id_unix_ms, make_key_id
from minikms.keys.index import KeyIndex
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random
from minikms.platform.clock import now_ns, rfc3339
from minikms.platform.group_commit import GroupCommit

GROUP_KEYS_MAX: Final = 128
"""Keys that one step of the event loop makes: about 3 ms."""


class Wanted(NamedTuple):
    """A key to make. `permit` is called before, and raises to refuse it. The new id sorts after `later_than`."""

    thread_id: str
    purpose: api.Purpose
    permit: Callable[[], None]
    replaces: str = ""
    later_than: str = ""
    number: int = 0


@dataclass(eq=False, repr=False, kw_only=True)
class NewKeys:
    """Makes the keys of a data directory."""

    arena: SecretArena
    unlocked: UnlockedKeyring
    stored: StoredKeyring
    changes: Changes
    nonces: NonceSource
    index: KeyIndex

    def __post_init__(self) -> None:
        self.groups = GroupCommit(self._make_group, items_max=GROUP_KEYS_MAX)

    async def make(self, wanted: Wanted) -> DekRecord:
        """A new key, durable on return. Raises the errors of its permit and of the journal, and ArenaFullError."""
        return await self.groups.submit(wanted)

    async def _make_group(self, wanted: list[Wanted]) -> list[DekRecord | KmsRefusedError]:
        new_keys = self._make_all(wanted, self.stored.body.wrapping_kek.version)
        keys = [Change(each.id, b"", dek.encode(each)) for each in new_keys if isinstance(each, DekRecord)]
        if keys:
            await self.changes.create(keys)
        for each in new_keys:
            if isinstance(each, DekRecord):
                self.index.put(each)
        return new_keys

    def _make_all(self, wanted: Sequence[Wanted], version: int) -> list[DekRecord | KmsRefusedError]:
        """Fresh wrapped keys, each made in the same slot of the arena, or the refusals."""
        created_ns = now_ns()
        at = rfc3339(created_ns)
        first_ms = created_ns // 1_000_000
        random = os.urandom(KEY_ID_RANDOM_BYTES * len(wanted))
        outcomes: list[DekRecord | KmsRefusedError] = []
        with self.arena.allocate() as slot, self.unlocked.kek_cipher(version) as kek:
            for number, one in enumerate(wanted):
                try:
                    one.permit()
                    id_ms = _id_ms(one, first_ms)
                except KmsRefusedError as error:
                    outcomes.append(error)
                    continue
                key_id = make_key_id(id_ms, random[number * KEY_ID_RANDOM_BYTES :][:KEY_ID_RANDOM_BYTES])
                fill_random(slot.view)
                record = dek.new(
                    key_id=key_id,
                    thread_id=one.thread_id,
                    purpose=one.purpose,
                    created_at=at,
                    kek=kek,
                    kek_version=version,
                    dek=slot.view,
                    nonce=self.nonces.next(),
                    replaces=one.replaces,
                    number=one.number,
                )
                outcomes.append(record)
        return outcomes


def _id_ms(wanted: Wanted, first_ms: int) -> int:
    """The Unix milliseconds of the key's id. Raises StorageUnavailableError."""
    id_ms = first_ms
    if wanted.later_than:
        id_ms = max(id_ms, key_id_unix_ms(wanted.later_than) + 1)
    if id_ms > UNIX_MS_MAX:
        raise StorageUnavailableError("no key can be made: the newest key id is the last one there is")
    return id_ms
