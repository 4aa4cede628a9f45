"""The providers of a root key: a key file, an inherited descriptor, a development key.

Owns: what the rest of the program may ask of a provider (`RootProvider`), and where a development key lies. A new
provider is a class here, or in a module of its own, and the flag that selects it (`minikms.cli.console.chosen_root`).
Invariants: `read` changes nothing, so it works beside a running daemon; only `prepare` makes or removes files, under
the lock of the data directory. A provider must never keep the key.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from minikms import api
from minikms.errors import StartError
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.roots.key_file import (
    make_key_file,
    read_key_descriptor,
    read_key_file,
    remove_leftover,
    replace_key,
)


class RootProvider(Protocol):
    """Where a root key comes from.

    `name` stands in `/status`, and in the slot of a keyring that is made under the key: 1 to 32 characters of a to z, 0
    to 9 and `-`.
    """

    name: ClassVar[str]

    @property
    def read_paths(self) -> tuple[str, ...]:
        """Files that the hardened process must still be able to read."""
        return ()

    @property
    def write_paths(self) -> tuple[str, ...]:
        """Directories that the hardened process must still be able to write in."""
        return ()

    @property
    def warning(self) -> str:
        """What an operator should change about this provider; empty when there is nothing."""
        return ""

    def prepare(self, arena: SecretArena, *, new_keyring: bool) -> None:
        """Called under the lock of the data directory, before `read`. `new_keyring`: no keyring exists yet.

        Raises StartError, saying what to do, and OSError.
        """
        return

    def read(self, arena: SecretArena) -> SecretSlot:
        """The root key. The caller releases the slot. Raises StartError, saying what to do."""
        ...


@dataclass(frozen=True)
class KeyFile(RootProvider):
    """The key file at `path`. `rewritable`: a rotation to a new root key also replaces the key in it."""

    name: ClassVar[str] = "file"
    path: Path
    rewritable: bool = False

    @property
    def read_paths(self) -> tuple[str, ...]:
        return (str(self.path),)

    @property
    def write_paths(self) -> tuple[str, ...]:
        return (str(self.path.resolve().parent),) if self.rewritable else ()

    def prepare(self, arena: SecretArena, *, new_keyring: bool) -> None:
        if self.rewritable:
            remove_leftover(self.path)

    def read(self, arena: SecretArena) -> SecretSlot:
        return read_key_file(self.path, arena)

    async def replace(self, root: SecretSlot, arena: SecretArena, executor: Executor) -> None:
        """Makes `root` the key in the file. `executor` waits for the disk.

        Raises OSError, and StartError when the file does not hold this key afterwards.
        """
        await replace_key(self.path, root, arena, executor)


@dataclass(frozen=True)
class KeyDescriptor(RootProvider):
    """An inherited pipe or memfd that holds a key from the environment. It can be read once."""

    name: ClassVar[str] = "environment"
    descriptor: int

    def read(self, arena: SecretArena) -> SecretSlot:
        return read_key_descriptor(self.descriptor, arena)


@dataclass(frozen=True)
class DevelopmentKey(RootProvider):
    """A key file beside the data directory, made together with the keyring."""

    name: ClassVar[str] = "dev"
    data_dir: str

    @property
    def path(self) -> Path:
        return api.development_key_path(self.data_dir)

    @property
    def write_paths(self) -> tuple[str, ...]:
        return (str(self.path.parent),)

    @property
    def warning(self) -> str:
        return (
            f"development key: the root key lies in {self.path}, beside the data it protects; for real data give "
            "--master-key-file"
        )

    def prepare(self, arena: SecretArena, *, new_keyring: bool) -> None:
        remove_leftover(self.path)
        if os.path.lexists(self.path):
            return
        if not new_keyring:
            raise StartError(
                f"the development key file {self.path} is missing, and a new one would not open this data directory: "
                "put it back, or start over with an empty data directory"
            )
        make_key_file(self.path, arena)

    def read(self, arena: SecretArena) -> SecretSlot:
        return read_key_file(self.path, arena)
