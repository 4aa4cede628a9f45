"""The root key source `passphrase:`: Argon2id (RFC 9106) of a passphrase that a person types.

Owns: the configuration file (docs/spec/unlock.md), its bounds, and the derivation. Invariants: salt and parameters come
from the configuration only, which nobody but root and this user could have written. They are bounded: nobody can
weaken a new passphrase below the lower bounds. The upper bounds, 4 GiB of memory and 64 passes, can still cost
minutes, or more memory than a small machine has. The derived key is written into the arena. It must never keep a
passphrase or a key.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from minikms.api.errors import StartError
from minikms.memory import SLOT_BYTES
from minikms.platform.sync import sync_file
from minikms.processes.config_file import ConfigFiles, parse_toml

VERSION: Final = 1
PASSPHRASE_BYTES_MIN: Final = 16
"""The length of a new passphrase. A holder of the keyring file can try passphrases."""
PASSPHRASE_BYTES_MAX: Final = 400
"""So that the library's copy of it is shorter than `_FREED_BLOCK_BYTES_MAX`."""
SALT_CHARS_MIN: Final = 16
SALT_CHARS_MAX: Final = 64
MEMORY_KIB_MIN: Final = 64 * 1024
MEMORY_KIB_MAX: Final = 4 * 1024 * 1024
ITERATIONS_MIN: Final = 3
"""With the least memory: the second recommended option of RFC 9106, section 4."""
ITERATIONS_MAX: Final = 64
LANES_MAX: Final = 16

_SALT: Final = re.compile(rf"[0-9A-Za-z]{{{SALT_CHARS_MIN},{SALT_CHARS_MAX}}}", re.ASCII)
_FREED_BLOCK_BYTES_MAX: Final = 2048
_FREED_BLOCKS_COUNT: Final = 32
"""The number of blocks of one size: more than the C library keeps for the next requests of their size."""
_CONFIG_MODE: Final = 0o644
_CONFIG: Final = """\
# How `minikms-unlock` derives a root key from a passphrase. This is no secret, and without it the passphrase opens
# nothing: keep a copy of this file with the passphrase. Never change it: make another file instead.
version = {version}

[passphrase]
salt = "{salt}"
memory_kib = {memory_kib}
iterations = {iterations}
lanes = {lanes}
"""


@dataclass(frozen=True)
class Parameters:
    """The parameters of Argon2id. The salt is text, whose ASCII bytes are used."""

    salt: str
    memory_kib: int = 512 * 1024
    iterations: int = 3
    lanes: int = 4


def make_config(path: Path) -> Parameters:
    """Writes the parameters for a new passphrase, with a random salt. Raises OSError, also for a file that exists."""
    parameters = Parameters(secrets.token_hex(16))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _CONFIG_MODE)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(_CONFIG.format(version=VERSION, **vars(parameters)))
        file.flush()
        sync_file(descriptor)
    return parameters


def read_config(path: Path) -> Parameters:
    """Reads the parameters; an error says what is wrong with the file."""
    if not os.path.lexists(path):
        raise StartError(f"there is no {path}. For a new passphrase, make it with `minikms-unlock init-passphrase`")
    return _parameters(parse_toml(ConfigFiles(path).content(), dict[str, Any], str(path)), path)


def _parameters(document: dict[str, Any], path: Path) -> Parameters:
    if document.get("version") != VERSION or isinstance(document["version"], bool):
        raise StartError(f"{path} must begin with version = {VERSION}")
    table = document.get("passphrase")
    names = tuple(Parameters.__dataclass_fields__)
    if set(document) != {"version", "passphrase"} or not isinstance(table, dict) or set(table) != set(names):
        raise StartError(f"{path} must have the table [passphrase] with exactly {', '.join(names)}")
    if not isinstance(table["salt"], str) or _SALT.fullmatch(table["salt"]) is None:
        raise StartError(f"{path}: salt must be {SALT_CHARS_MIN} to {SALT_CHARS_MAX} letters and digits")
    for name, least, most in (
        ("memory_kib", MEMORY_KIB_MIN, MEMORY_KIB_MAX),
        ("iterations", ITERATIONS_MIN, ITERATIONS_MAX),
        ("lanes", 1, LANES_MAX),
    ):
        value = table[name]
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise StartError(f"{path}: {name} must be a number from {least} to {most}")
    return Parameters(**table)


def derive_into(passphrase: memoryview, parameters: Parameters, root: memoryview) -> None:
    """Writes the root key of the passphrase into `root`. Raises StartError when the machine lacks the memory.

    The library passes the passphrase to OpenSSL in a block of its heap, which it frees with its content.
    """
    try:
        _argon2id(parameters).derive_into(passphrase, root)  # type: ignore[arg-type]  # any buffer of bytes
    except MemoryError:
        raise StartError(
            f"the derivation needs {parameters.memory_kib // 1024} MiB of memory, which this machine does not give"
        ) from None
    finally:
        _overwrite_freed_blocks()


def _overwrite_freed_blocks() -> None:
    """Overwrites what the C library has freed: it takes blocks of every size, all before the first one is given back.
    One block of the same size is not enough, since the library may take another one that was freed before.
    """
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = (ctypes.c_size_t,)
    library.free.argtypes = (ctypes.c_void_p,)
    blocks: list[int] = []
    for size in range(16, _FREED_BLOCK_BYTES_MAX + 1, 16):
        for _ in range(_FREED_BLOCKS_COUNT):
            if address := library.malloc(size):
                ctypes.memset(address, 0, size)
                blocks.append(address)
    for address in blocks:
        library.free(address)


def _argon2id(parameters: Parameters) -> Argon2id:
    return Argon2id(
        salt=parameters.salt.encode("ascii"),
        length=SLOT_BYTES,
        iterations=parameters.iterations,
        lanes=parameters.lanes,
        memory_cost=parameters.memory_kib,
    )
