"""The configuration file of a process beside the key service, in TOML, and the files that it names.

Owns: reading them as policy files are read, so that only root and the user of the process can have written them; and
the form of a listener's address. Invariants: what is read is bounded; paths are relative to the
directory of the configuration. It must never open a socket, or keep what a file held.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import msgspec

from minikms.api import SOCKET_PATH_BYTES_MAX
from minikms.api.errors import KmsRefusedError, StartError
from minikms.platform.trusted_file import ROOT_UID, read_trusted

CONFIG_BYTES_MAX: Final = 64 * 1024
LINE_DOTS_MAX: Final = 256
"""The dots in one line: for a key of n parts the parser takes n^2 steps."""
PEM_BYTES_MAX: Final = 256 * 1024
_ADDRESS: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", re.ASCII)
Uid = Annotated[int, msgspec.Meta(ge=0, lt=2**32 - 1)]
"""A user; the greatest number is -1, which is none."""
T = TypeVar("T")


class ConfigFiles:
    """The configuration at `config_path`, and the files that it names."""

    def __init__(self, config_path: Path) -> None:
        self.config_path = config_path.absolute()

    def path(self, text: str) -> Path:
        """The absolute path of a file that the configuration names."""
        return self.config_path.parent / text

    def read(self, text: str, what: str, bytes_max: int) -> bytes:
        """The content of such a file. Raises StartError, whose text calls it `what`."""
        path = self.path(text)
        content = read_trusted(path, (ROOT_UID, os.geteuid()), what=what, bytes_max=bytes_max)
        if len(content) > bytes_max:
            raise StartError(f"the {what} {path} is larger than {bytes_max} bytes")
        return content

    def check_private(self, text: str, what: str = "private key") -> None:
        """Checks that only its owner, root or a group of this process can read such a file."""
        self.read(text, what, PEM_BYTES_MAX)
        path = self.path(text)
        if path.stat().st_mode & stat.S_IRWXO:
            raise StartError(f"other users can read the {what} {path}: chmod o-rwx it")

    def content(self) -> bytes:
        """The content of the configuration itself."""
        return self.read(str(self.config_path), "configuration", CONFIG_BYTES_MAX)


def parse_toml(content: bytes, kind: type[T], place: str, check: Callable[[T], None] = lambda _: None) -> T:
    """A configuration of the type `kind`, of which `check` raises nothing. Raises StartError, which calls the file
    `place`.
    """
    try:
        text = content.decode("utf-8")
        if any(line.count(".") > LINE_DOTS_MAX for line in text.splitlines()):
            raise StartError(f"{place}: a line has more than {LINE_DOTS_MAX} dots")
        parsed = tomllib.loads(text)
        if has_nul(parsed):
            raise StartError(f"{place}: a text has the character NUL")
        config = msgspec.convert(parsed, kind, strict=True)
    except msgspec.ValidationError as error:
        raise StartError(f"{place}: {error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise StartError(f"{place} is not TOML in UTF-8: {error}") from None
    try:
        check(config)
    except KmsRefusedError as error:
        raise StartError(f"{place}: {error}") from None
    return config


def has_nul(value: object) -> bool:
    """Whether a text in it has the character NUL, which no path may have, and no other setting needs."""
    if isinstance(value, dict):
        return any(has_nul(each) for each in value.values())
    if isinstance(value, list):
        return any(has_nul(each) for each in value)
    return isinstance(value, str) and "\0" in value


def check_socket(text: str, name: str = "kms_socket") -> None:
    """Checks that `text` can be the path of a Unix socket."""
    if not 0 < len(os.fsencode(text)) <= SOCKET_PATH_BYTES_MAX:
        raise StartError(f"{name} is a path of 1 to {SOCKET_PATH_BYTES_MAX} bytes")


def address(text: str) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8443` or `[::1]:8443`. Raises StartError."""
    wrong = StartError(f"{text!r} is no address and port, such as 127.0.0.1:8443 or [::1]:8443")
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 2**16:
        raise wrong
    try:
        return str(ipaddress.ip_address(match[1] or match[2])), int(match[3])
    except ValueError:
        raise wrong from None


def check_metrics(text: str) -> None:
    """Checks that `text` is an address of this host, or empty: no listener."""
    if text and not ipaddress.ip_address(address(text)[0]).is_loopback:
        raise StartError("metrics must be an address of this host, such as 127.0.0.1:9103")
