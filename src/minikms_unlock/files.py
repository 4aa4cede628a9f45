"""What the unlock service reads (docs/spec/unlock.md): its configuration, and the wrapped root key in its directory.

Owns: both formats, who may have written them, making them, and the checks before a root key is used. Invariants:
a wrapped key opens only by the provider that it and the configuration name, for the keyring that it names, and is used
only if root has pinned it; a file is whole or absent after a crash. Neither file is secret. It must never keep a key.
"""

from __future__ import annotations

import json
import os
import pwd
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec

from minikms import api
from minikms.api.base64 import decode_canonical, encode_text
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import KmsRefusedError, StartError
from minikms.client.connecting import overflow_uid
from minikms.platform.files import closed_after, open_directory, replace_file, sweep_temps
from minikms.platform.sync import sync_directory, sync_file
from minikms.platform.trusted_file import ROOT_UID, read_trusted
from minikms.processes.config_file import ConfigFiles, Uid, parse_toml
from minikms.roots.pin import PinFile
from minikms_tokens import open_wrapper
from minikms_tokens.wrapping import BLOB_BYTES_MAX

VERSION: Final = 1
FORMAT: Final = "minikms-unlock"
NAME: Final = "root.json"
SOURCE_CHARS_MAX: Final = 2048
FILE_BYTES_MAX: Final = 32 * 1024
_MODE: Final = 0o644


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`source`: the wrapping key. `user`: the only one that gets the root key, by name or number. `pin`: root's pin
    file. `directory`: of the wrapped root key, the service's own. Once read, both paths are absolute.
    """

    version: Literal[1]
    source: str
    user: str | Uid
    pin: str
    directory: str

    @property
    def uid(self) -> int:
        """The id of `user`."""
        try:
            uid = self.user if isinstance(self.user, int) else pwd.getpwnam(self.user).pw_uid
        except KeyError:
            raise StartError(f"there is no user {self.user}, which the configuration names") from None
        if uid == overflow_uid():
            raise StartError(f"the user {self.user} stands for many users: name the key service's own")
        return uid


class WrappedRoot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`wrapped`: base64 of what the provider has made of the root key, with the id of the keyring as context."""

    format: str
    version: int
    source: str
    keyring_id: str
    wrapped: str

    @property
    def blob(self) -> bytes:
        return decode_canonical(self.wrapped, BLOB_BYTES_MAX, "wrapped")


def default_config(source: str) -> Config:
    """The configuration of the package for this source."""
    config = Config(VERSION, source, "minikms", "/etc/progressdb/minikms.pin", "/var/lib/progressdb/unlock")
    _check(config)
    return config


def read_config(path: Path) -> Config:
    """Reads a valid configuration that only root and this user can have written."""
    files = ConfigFiles(path)
    config = parse_toml(files.content(), Config, str(path), _check)
    return msgspec.structs.replace(config, pin=str(files.path(config.pin)), directory=str(files.path(config.directory)))


def make_config(path: Path, config: Config) -> None:
    """A new file, whole and durable. Raises OSError, also for one that is there."""
    lines = [f"{name} = {json.dumps(value)}\n" for name, value in msgspec.structs.asdict(config).items()]
    new = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        new.unlink()
    with closed_after(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)) as descriptor:
        os.write(descriptor, "".join(lines).encode("ascii"))
        os.fchmod(descriptor, _MODE)  # the service reads it as another user, whatever the umask is
        sync_file(descriptor)
    os.link(new, path)
    new.unlink()
    sync_directory(path.parent)


def owner_of(directory: str) -> os.stat_result:
    try:
        return os.stat(directory)
    except OSError as error:
        raise StartError(
            f"{directory}, the directory of the unlock service: {error.strerror}. The package makes it; else: install "
            f"-d -m 700 -o minikms-unlock -g minikms-unlock {directory}"
        ) from None


def read_wrapped(config: Config) -> WrappedRoot:
    """Reads the wrapped root key of the configured source, which only root and the service can have written."""
    path = Path(config.directory, NAME)
    user = owner_of(config.directory).st_uid if os.geteuid() == ROOT_UID else os.geteuid()
    data = read_trusted(path, (ROOT_UID, user), what="wrapped root key", bytes_max=FILE_BYTES_MAX)
    try:
        wrapped = msgspec.json.decode(data, type=WrappedRoot)
        valid = bool(wrapped.blob) and (wrapped.format, wrapped.version) == (FORMAT, VERSION)
    except (*UNDECODABLE, KmsRefusedError):
        valid = False
    if not valid or len(data) > FILE_BYTES_MAX or api.KEYRING_ID_PATTERN.fullmatch(wrapped.keyring_id) is None:
        raise StartError(f"{path} is no wrapped root key of version {VERSION}, or is damaged: put a copy in its place")
    if wrapped.source != config.source:
        raise StartError(f"the wrapped root key {path} is by another source than the configuration names")
    return wrapped


def write_wrapped(config: Config, keyring_id: str, blob: bytes) -> None:
    """Durably. Root acts as the owner of the directory, so that it follows nothing that another user can change. Raises
    StorageUnavailableError, StartError.
    """
    content = WrappedRoot(FORMAT, VERSION, config.source, keyring_id, encode_text(blob))
    owner, before = owner_of(config.directory), (os.geteuid(), os.getegid())
    with closed_after(open_directory(config.directory)) as directory:
        os.setegid(owner.st_gid)
        os.seteuid(owner.st_uid)
        try:
            sweep_temps(directory)
            replace_file(directory, NAME, msgspec.json.encode(content) + b"\n")
        finally:
            os.seteuid(before[0])
            os.setegid(before[1])


def unwrap_into(config: Config, keyring_id: str | None, into: memoryview) -> None:
    """Writes the root key of a keyring into `into`, by a call to the provider, whose session ends with this process.
    `keyring_id`: None for that of the file. Raises StartError for a key that is another keyring's or not pinned, and
    TokenError.
    """
    wrapped = read_wrapped(config)
    if keyring_id not in (None, wrapped.keyring_id):
        raise StartError(f"the wrapped root key is of keyring {wrapped.keyring_id}, not of {keyring_id}")
    open_wrapper(config.source).unwrap(wrapped.blob, wrapped.keyring_id, into)
    PinFile(Path(config.pin)).check_opens(into, wrapped.keyring_id)


def _check(config: Config) -> None:
    if not (0 < len(config.source) <= SOURCE_CHARS_MAX and config.source.isascii() and config.source.isprintable()):
        raise StartError(f"source is 1 to {SOURCE_CHARS_MAX} printable ASCII characters")
