"""Keyrings for tests: unlocked ones in an arena of plain memory, and the changes that a daemon makes to them.

It asserts nothing. Times, nonces and ids are fixed or counted, so two runs make the same bodies.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from minikms.crypto.aead import NonceSource
from minikms.keys import keyring, root_slots
from minikms.keys.keyring import Body
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, fill_random

AT = "2026-11-24T15:00:00Z"
LATER = "2026-11-25T15:00:00Z"
ROOT = bytes(range(32))
NEW_ROOT = bytes(range(100, 132))


@contextmanager
def arena(slots: int = 512) -> Iterator[SecretArena]:
    with SecretArena(slots, force_fallback=True) as made:
        yield made


def fresh(arena: SecretArena, root: bytes = ROOT) -> UnlockedKeyring:
    """As a first start makes it."""
    return UnlockedKeyring.create(
        arena,
        memoryview(root),
        keyring_id="kr_" + os.urandom(8).hex(),
        provider="file",
        nonces=NonceSource().next,
        fill_random=fill_random,
        at=AT,
    )


def reopened(
    arena: SecretArena, unlocked: UnlockedKeyring, root: bytes = ROOT
) -> tuple[UnlockedKeyring, keyring.RootSlot]:
    """The same from its file, under `root`."""
    return UnlockedKeyring.open(arena, memoryview(root), unlocked.encode(unlocked.body), nonces=NonceSource().next)


def begin(unlocked: UnlockedKeyring, root: bytes | None = None) -> Body:
    """Step 1 of a rotation, made current. A new root key replaces the newest one."""
    body = unlocked.body
    added = None
    if root is not None:
        slot_id = root_slots.next_slot_id(body)
        added = unlocked.make_slot(memoryview(root), "request", slot_id=slot_id, at=AT, replaces=body.slots[-1].slot_id)
    version = max(kek.version for kek in body.keks) + 1
    kek = unlocked.make_kek(fill_random, version=version, state="pending", at=AT)
    return adopt(unlocked, keyring.begin_rotation(body, kek=kek, slot=added, stamp="20261124T150000", at=AT))


def add(unlocked: UnlockedKeyring, root: bytes, provider: str = "file", shares: keyring.ShareSet | None = None) -> str:
    """Adds a root key; the id of its slot."""
    slot_id = root_slots.next_slot_id(unlocked.body)
    slot = unlocked.make_slot(memoryview(root), provider, slot_id=slot_id, at=AT, shares=shares)
    adopt(unlocked, root_slots.add_slot(unlocked.body, slot, at=AT))
    return slot_id


def remove(unlocked: UnlockedKeyring, *slot_ids: str, proved: str = "", at: str = AT) -> Body:
    """Removes slots, with a fresh keyring key and a fresh audit key."""
    resealed = unlocked.make_resealed(fill_random, without=slot_ids)
    version = unlocked.audit.current.version + 1
    key = unlocked.make_audit_key(fill_random, version=version, at=at, key_version=resealed.key_version)
    return adopt(
        unlocked, root_slots.remove_slots(unlocked.body, resealed, unlocked.member_id, key, at=at, proved=proved)
    )


def promote(unlocked: UnlockedKeyring) -> Body:
    """As a rotation that could read every file."""
    return adopt(unlocked, keyring.end_revocation(keyring.promote(unlocked.body, at=AT), at=AT))


def rotate(unlocked: UnlockedKeyring, root: bytes | None = None) -> Body:
    begin(unlocked, root)
    return promote(unlocked)


def adopt(unlocked: UnlockedKeyring, body: Body) -> Body:
    """`body` becomes current, as it does once it is on disk."""
    unlocked.body = body
    unlocked.settle()
    return body
