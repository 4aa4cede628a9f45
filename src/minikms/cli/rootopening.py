"""The root key of an offline command, in this process's arena.

Owns: where an offline command finds the root key (a file, the descriptor that `rootkey` moved the environment's into,
or the development key beside the data directory), and the keyring opened under it. Invariants: raw keys lie in an arena
only, which is zeroed when the command ends; reading takes no lock and changes nothing. It must never make a key.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from minikms.cli.console import DEV_KEY_SUFFIX, CommandError, chosen_key_file
from minikms.crypto.aead import NonceSource, scrub_stack
from minikms.errors import StartError
from minikms.keys.unlocked import UnlockedKeyring
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.roots.key_file import read_key_descriptor, read_key_file

ARENA_SLOTS: Final = 512
"""Root and keyring key, KEK versions, two slots an audit key version, and one for the key at hand."""


class Source(NamedTuple):
    """At most one of the two."""

    file: Path | None
    descriptor: int | None


def chosen_source(key_file: Path | None, descriptor: int | None, data_dir: str | None) -> Source | None:
    """Where the root key is; None when it is nowhere. Raises CommandError when it is given twice."""
    file = chosen_key_file(key_file)
    if file is not None and descriptor is not None:
        raise CommandError("both a master key and a master key file are given; unset one of the two variables")
    if file is None and descriptor is None and data_dir is not None:
        beside = Path(os.path.abspath(data_dir) + DEV_KEY_SUFFIX)
        file = beside if beside.exists() else None
    return None if file is None and descriptor is None else Source(file, descriptor)


def needed_source(key_file: Path | None, descriptor: int | None, data_dir: str | None) -> Source:
    """The same. Raises CommandError when there is none."""
    source = chosen_source(key_file, descriptor, data_dir)
    if source is None:
        raise CommandError("give the root key, as for the daemon: --master-key-file FILE")
    return source


@contextmanager
def opened_root(source: Source) -> Iterator[tuple[SecretArena, SecretSlot]]:
    """An arena that holds the root key. Raises StartError."""
    with SecretArena(ARENA_SLOTS) as arena:
        root = (
            read_key_descriptor(source.descriptor, arena)
            if source.descriptor is not None
            else read_key_file(_file(source), arena)
        )
        try:
            yield arena, root
        finally:
            root.release()
            scrub_stack()


def _file(source: Source) -> Path:
    if source.file is None:
        raise StartError("there is no root key")
    return source.file


@contextmanager
def opened_keyring(arena: SecretArena, root: SecretSlot, data: bytes) -> Iterator[UnlockedKeyring]:
    """A keyring file's content, authenticated and opened. Raises StartError, naming both fingerprints."""
    unlocked, _ = UnlockedKeyring.open(arena, root.view, data, nonces=NonceSource().next)
    try:
        yield unlocked
    finally:
        unlocked.release()
