"""The providers of a root key: a key file, a credential, an inherited descriptor, a development key; and their names.

Owns: what the rest of the program may ask of a provider (`RootProvider`), where a development key lies, and which
provider a source has. A new provider is a class here, or in a module of its own, and its name in `provider_of` and in
the sets `REPLACEABLE` or `KEPT_BY_PEOPLE`. Invariants: `read` changes nothing, so it works beside a running daemon;
only `prepare` makes or removes files, under the lock of the data directory. A provider must never keep the key.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

from minikms import api
from minikms.api.errors import StartError, StartLaterError
from minikms.keys.unlocked import GIVE_ANOTHER
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.roots.key_file import (
    FileOwner,
    make_key_file,
    read_key_descriptor,
    read_key_file,
    remove_leftover,
)
from minikms.roots.sources import Source

if TYPE_CHECKING:
    from minikms.processes.handover import Purpose


class RootAwayError(StartLaterError):
    """There is no root key now, and it is not known whether the provider would refuse it."""


class RootRefusedError(StartLaterError):
    """The provider itself has refused the root key, as the unlock service says."""


class RootProvider(Protocol):
    """A source of a root key.

    `name` stands in `/status`, and in the slot of a keyring that is made under the key: 1 to 32 characters of a to z, 0
    to 9 and `-`.
    """

    name: ClassVar[str]
    reads_again: ClassVar[bool] = True
    """Whether `read` may be called again after it has returned a key or failed."""
    if_wrong: ClassVar[str] = GIVE_ANOTHER
    """What to do if the key does not open the keyring."""

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

    async def ask(self, purpose: Purpose, arena: SecretArena) -> GivenKey | None:
        """The root key of a service that is asked, whose slot the caller releases; None for every other provider."""
        return None

    def discard(self) -> None:
        """Instead of `read`, where that is possible once only: the root key can't be read after this."""
        return


@dataclass(frozen=True)
class KeyFile(RootProvider):
    """The key file at `path`. `rewritable`: a rotation to a new root key also replaces the key in it. `any_owner`: root
    names the file and vouches for it, so it may belong to another user. `shared`: an owner whose group may read it.
    """

    name: ClassVar[str] = "file"
    path: Path
    rewritable: bool = False
    any_owner: bool = False
    shared: FileOwner | None = None

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
        return read_key_file(self.path, arena, any_owner=self.any_owner, shared=self.shared)


@dataclass(frozen=True)
class Credential(RootProvider):
    """A credential of the service manager. systemd gives it to this user, or to root with an ACL for this user: mode
    0440 is then the mask of the ACL.
    """

    name: ClassVar[str] = "systemd-credential"
    path: Path

    @property
    def read_paths(self) -> tuple[str, ...]:
        return (str(self.path),)

    def read(self, arena: SecretArena) -> SecretSlot:
        return read_key_file(self.path, arena, shared=FileOwner(0, 0))


@dataclass(frozen=True)
class KeyDescriptor(RootProvider):
    """An inherited pipe or memfd that holds a key from the environment. It can be read once."""

    name: ClassVar[str] = "environment"
    reads_again: ClassVar[bool] = False  # `read` closes the descriptor, and its number may be another file's by then
    descriptor: int

    def read(self, arena: SecretArena) -> SecretSlot:
        return read_key_descriptor(self.descriptor, arena)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.descriptor)  # without reading it: that could wait for whoever writes


@dataclass(frozen=True)
class GivenKey(RootProvider):
    """A root key that a caller gave. Who reads it releases `slot`; the caller may too. It never makes a keyring."""

    name: ClassVar[str] = "request"
    reads_again: ClassVar[bool] = False
    slot: SecretSlot
    asked_ns: int | None = None
    """When a service was asked for it (`clock.boot_ns`)."""

    def prepare(self, arena: SecretArena, *, new_keyring: bool) -> None:
        if new_keyring:
            raise StartError("there is no keyring, and a root key that a request gives makes none: run `minikms init`")

    def read(self, arena: SecretArena) -> SecretSlot:
        return self.slot


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


UNLOCK: Final = "unlock"
"""The name of the provider that is asked."""
REPLACEABLE: Final = frozenset(("file", "systemd-credential", "environment", "request", "dev"))
"""Names of the providers whose root key an operator can exchange for one in a request: a file or a variable."""
KEPT_BY_PEOPLE: Final = frozenset(("shares", "passphrase"))
"""Names of the providers whose root keys are kept by people."""

# --- the provider of a source ---------------------------------------------------------------------------------------

CREDENTIALS_VARIABLE: Final = "CREDENTIALS_DIRECTORY"
"""The variable in which systemd names the directory of a unit's credentials (systemd.exec(5))."""
_CREDENTIAL: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._@:-]{1,255}", re.ASCII)
FD_MAX: Final = 2**20
FD_DIGITS_MAX: Final = 7


def provider_of(source: Source, *, data_dir: str | None = None) -> RootProvider:
    """The provider of a source that asks nobody. `data_dir`: what `dev:` lies beside. Raises StartError."""
    if source.name == "file" and source.argument:
        return KeyFile(Path(source.argument))
    if source.name == "fd" and source.argument.isascii() and source.argument.isdigit():
        if len(source.argument) <= FD_DIGITS_MAX and int(source.argument) <= FD_MAX:
            return KeyDescriptor(int(source.argument))
    elif source.name == "dev" and not source.argument and data_dir is not None:
        return DevelopmentKey(data_dir)
    elif source.name == "systemd-credential":
        return Credential(_credential_path(source.argument))
    elif source.name in ("unlock", "shares", "passphrase") or (source.name == "dev" and not source.argument):
        raise StartError(f"this command takes no root key from {source.name}: give file:PATH or fd:NUMBER")
    raise StartError(f"the source {source.name}: is not complete; examples: file:/etc/minikms/root.key, fd:3, dev:")


def _credential_path(name: str) -> Path:
    directory = os.environ.get(CREDENTIALS_VARIABLE)
    if _CREDENTIAL.fullmatch(name) is None:
        raise StartError("the name of a credential is that of LoadCredential= in the unit, without a path")
    if not directory:
        raise StartError(f"there are no credentials: {CREDENTIALS_VARIABLE} is set in a service of systemd only")
    return Path(directory, name)
