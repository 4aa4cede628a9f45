"""Keyrings for tests: unlocked ones in an arena of plain memory, and the changes that a daemon makes to them.

It asserts nothing. Times, nonces and ids are fixed or counted, so two runs make the same bodies.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from minikms.crypto.aead import NonceSource
from minikms.keys import keyring
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


def reopened(arena: SecretArena, unlocked: UnlockedKeyring, root: bytes = ROOT) -> tuple[UnlockedKeyring, keyring.Slot]:
    """The same from its file, under `root`."""
    return UnlockedKeyring.open(arena, memoryview(root), unlocked.encode(unlocked.body), nonces=NonceSource().next)


def begin(unlocked: UnlockedKeyring, root: bytes | None = None) -> Body:
    """Step 1 of a rotation, made current."""
    body = unlocked.body
    added = None
    if root is not None:
        added = unlocked.make_root(memoryview(root), "request", fill_random, slot_id=f"s{body.epoch + 1}", at=AT)
    version = max(kek.version for kek in body.keks) + 1
    kek = unlocked.make_kek(
        fill_random,
        version=version,
        state="pending",
        at=AT,
        key_version=added.link.version if added else None,
    )
    return adopt(unlocked, keyring.begin_rotation(body, kek=kek, root=added, stamp="20261124T150000", at=AT))


def promote(unlocked: UnlockedKeyring) -> Body:
    return adopt(unlocked, keyring.promote(unlocked.body, at=AT))


def rotate(unlocked: UnlockedKeyring, root: bytes | None = None) -> Body:
    begin(unlocked, root)
    return promote(unlocked)


def adopt(unlocked: UnlockedKeyring, body: Body) -> Body:
    """`body` becomes current, as it does once it is on disk."""
    unlocked.body = body
    unlocked.settle()
    return body
