"""The pin file: which root keys may open which keyring, as root has decided.

A writer of the data directory could put a keyring of his own there, with a root key of his own. The pin file
lies outside the data directory and belongs to root. It names the keyring, and each root key by HMAC(root key, label),
which only the holder of the root key can make and which reveals nothing about it. Beside each stands the fingerprint,
which shows which root keys of the keyring are pinned.

Owns: the format of the file (docs/spec/formats.md), its checks, and adding and removing a pin. Invariants: a file that
another user than root could have written, directly or through a directory above it, is refused; so is a damaged one.
The file is rewritten in place, because the daemon's Landlock rule is bound to its inode. A crash can leave a damaged
file, which is refused until a pin is added again; then it names that root key only, which the result says. It must
never hold or compare a root key itself.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final, Literal

import msgspec

from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import NotPinnedError, StartError, UnknownRootError
from minikms.crypto import roots
from minikms.platform.files import closed_after
from minikms.platform.sync import sync_directory, sync_file
from minikms.platform.trusted_file import ROOT_UID, read_trusted

FORMAT: Final = "minikms-pin"
VERSION: Final = 1
FILE_BYTES_MAX: Final = 16 * 1024
PINS_COUNT_MAX: Final = 64
_MODE: Final = 0o644


class Pins(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content. `pins`: of each root key, 64 hexadecimal characters, by its fingerprint."""

    format: str
    version: int
    keyring_id: str
    pins: dict[str, str]

    def names(self, root: memoryview) -> bool:
        return self.pins.get(roots.fingerprint(root)) == roots.pin(root)


class DamagedPinError(StartError):
    """The pin file belongs to root alone, and its content can't be read."""


class PinFile:
    """The file at `path`, which is read again at each check."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] = ()
        self._pinned: frozenset[str] = frozenset()

    def check_opens(self, root: memoryview, keyring_id: str | None) -> None:
        """Before a keyring is opened. `keyring_id`: as the keyring says, None if there is none. Raises StartError."""
        pins = self.read()
        if keyring_id != pins.keyring_id:
            state = "there is no keyring" if keyring_id is None else f"the keyring is {keyring_id}"
            raise StartError(
                f"the pin file {self.path} is for keyring {pins.keyring_id}, but {state}. If the data directory was "
                "replaced on purpose, remove the pin file and run `minikms pin add` again, as root"
            )
        if not pins.names(root):
            raise UnknownRootError(
                f"the pin file {self.path} does not name the root key {roots.fingerprint(root)}. If it is yours, run "
                "as root: minikms pin add SOURCE"
            )

    def check_new(self, root: memoryview) -> None:
        """Before a root key is added to the keyring. Raises NotPinnedError."""
        try:
            pinned = self.read().names(root)
        except StartError:
            raise NotPinnedError(
                "the pin file can't be read, is damaged, or could have been written by another user than root: run "
                "`minikms pin add SOURCE` as root, which says which"
            ) from None
        if not pinned:
            raise NotPinnedError(
                f"the pin file does not name the root key {roots.fingerprint(root)}: first run, as root, "
                "`minikms pin add SOURCE`"
            )

    def check_host(self, fingerprint: str, digest: str) -> None:
        """Before a host is added, whose root key is not here. `digest`: of its request. Raises NotPinnedError."""
        try:
            pinned = self.read().pins.get(fingerprint) == digest
        except StartError:
            pinned = False
        if not pinned:
            raise NotPinnedError(
                f"the pin file does not name this request of the host with the root key {fingerprint}: first run, as "
                "root, `minikms pin add-host REQUEST`"
            )

    def pinned(self) -> frozenset[str]:
        """The fingerprints of the root keys that it names; none while it can't be read. For `/status`: the file is
        read only when it was changed.
        """
        try:
            status = os.stat(self.path)
        except OSError:
            return frozenset()
        seen = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
        if seen != self._seen:
            try:
                self._pinned = frozenset(self.read().pins)
            except StartError:
                self._pinned = frozenset()
            self._seen = seen
        return self._pinned

    def digest(self) -> str:
        """SHA-256 of the fingerprints that it names, to be compared with that of another host."""
        return hashlib.sha256("\n".join(sorted(self.pinned())).encode()).hexdigest()

    def read(self) -> Pins:
        """Reads the pins. A file that is missing, damaged, or not root's alone is a StartError."""
        data = read_trusted(self.path, (ROOT_UID,), what="pin file", bytes_max=FILE_BYTES_MAX)
        return self._parsed(data)

    def exists(self) -> bool:
        """Whether there is a file that names root keys: False for a damaged one. Raises StartError as `read`."""
        if not os.path.lexists(self.path):
            return False
        try:
            self.read()
        except DamagedPinError:
            return False
        return True

    def add(self, root: memoryview, keyring_id: str) -> Literal["new", "known", "replaced"]:
        """Adds a pin, durably, and makes the file if there is none. `known`: it was there. `replaced`: the file was
        damaged, and has only this pin now. Raises StartError, OSError.
        """
        return self._add(roots.fingerprint(root), roots.pin(root), keyring_id)

    def add_host(self, fingerprint: str, digest: str, keyring_id: str) -> None:
        """Names the request of a host, whose root key can then be added to the keyring, and opens it on that host only.
        Raises StartError, also when there is no pin file, and OSError.
        """
        self.read()
        self._add(fingerprint, digest, keyring_id)

    def _add(self, fingerprint: str, pin: str, keyring_id: str) -> Literal["new", "known", "replaced"]:
        before, damaged = None, False
        if os.path.lexists(self.path):
            try:
                before = self.read()
            except DamagedPinError:
                damaged = True
        if before is not None and before.keyring_id != keyring_id:
            raise StartError(
                f"the pin file {self.path} is for keyring {before.keyring_id}, and the data directory has {keyring_id}"
            )
        pins = {} if before is None else before.pins
        if pins.get(fingerprint) == pin:
            return "known"
        if len(pins) >= PINS_COUNT_MAX:
            raise StartError(
                f"the pin file {self.path} names {PINS_COUNT_MAX} root keys already: remove the unused ones"
            )
        pins[fingerprint] = pin
        self._write(msgspec.json.encode(Pins(FORMAT, VERSION, keyring_id, pins)) + b"\n")
        self.read()
        return "replaced" if damaged else "new"

    def remove(self, root: memoryview) -> bool:
        """Removes a pin, durably; whether it was there. Raises StartError, also for the last one, and OSError."""
        pins = self.read()
        if not pins.names(root):
            return False
        del pins.pins[roots.fingerprint(root)]
        if not pins.pins:
            raise StartError(
                f"the pin file {self.path} names only this root key, and without it none would open the keyring: add "
                "another one first"
            )
        self._write(msgspec.json.encode(pins) + b"\n")
        self.read()
        return True

    def _write(self, data: bytes) -> None:
        with closed_after(
            os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
        ) as descriptor:
            os.fchmod(descriptor, _MODE)  # the daemon reads it as another user, whatever the umask was
            written = os.pwrite(descriptor, data, 0)
            if written != len(data):
                raise StartError(f"the pin file {self.path} could not be written whole: free space, and run this again")
            os.ftruncate(descriptor, written)
            sync_file(descriptor)
        sync_directory(self.path.parent)

    def _parsed(self, data: bytes) -> Pins:
        try:
            pins = msgspec.json.decode(data, type=Pins)
        except UNDECODABLE:
            raise DamagedPinError(
                f"the pin file {self.path} is damaged: run `minikms pin add` again for each root key"
            ) from None
        if (pins.format, pins.version) != (FORMAT, VERSION) or len(data) > FILE_BYTES_MAX:
            raise StartError(f"{self.path} is not a pin file of version {VERSION}")
        return pins
