"""The file `kms-index`: the key index of an orderly stop, for the next start (docs/spec/formats.md).

Owns: writing the file, and taking it at a start. Invariants: only the start that follows the stop believes it: it is
authenticated under the keyring key with the epoch of the stop, and each start raises the epoch before anything changes;
the header is authenticated before anything else of the file is read, and it has the length and the hash of the rest.
The index must never be the authority: the scan compares it with the key files while the daemon serves.
"""

from __future__ import annotations

import contextlib
import os
import struct
from hashlib import sha256
from sys import byteorder
from typing import Final

from minikms.api.errors import DecryptionError, StorageUnavailableError
from minikms.crypto import labels
from minikms.crypto.aead import OVERHEAD_BYTES
from minikms.custody.deks import DekStore
from minikms.keys.index import HASH_KEY_BYTES, KEY_BYTES, KeyIndex
from minikms.keys.unlocked import UnlockedKeyring
from minikms.platform.files import opened_file, replace_file_from

NAME: Final = "kms-index"
MAGIC: Final = f"minikms-index 1 {byteorder}".encode().ljust(24, b"\0")
KEYS_MAX: Final = 16_000_000
"""Keys of the largest index that is kept: 850 MB without threads."""
FILE_BYTES_MAX: Final = KEYS_MAX * 256

_HEADER: Final = struct.Struct(f">24sQQQQ{HASH_KEY_BYTES}s32s")


class NotKeptError(Exception):
    """There is no index that a start can believe. The text says why; it is empty where there is no file."""


def keep(directory_fd: int, store: DekStore, unlocked: UnlockedKeyring, index: KeyIndex) -> None:
    """Writes the index, durably, unless it has too many keys. Nothing may change a key any more. Blocks on the disk.
    Raises StorageUnavailableError.
    """
    if len(index) > KEYS_MAX:
        return
    columns = index.columns()
    digest = sha256()
    for column in columns:
        digest.update(column)
    header = _HEADER.pack(
        MAGIC, unlocked.body.epoch, store.changed_ns(), len(index), len(columns[-1]), index.hash_key, digest.digest()
    )
    replace_file_from(directory_fd, NAME, (header, unlocked.tag_of(labels.KEY_INDEX, header), *columns))


def take(directory_fd: int, store: DekStore, unlocked: UnlockedKeyring, *, epoch: int, threads: bool) -> KeyIndex:
    """The index that the last stop has kept; its file is removed. `epoch`: that of the keyring before this start.
    `threads`: whether the index has to have the thread of each key. Blocks on the disk. Raises NotKeptError.
    """
    try:
        with opened_file(NAME, dir_fd=directory_fd) as (fd, size), open(fd, "rb", closefd=False) as file:
            header, tag = file.read(_HEADER.size), file.read(OVERHEAD_BYTES)
            unlocked.check_tag(labels.KEY_INDEX, tag, header)
            magic, of_epoch, changed_ns, count, threads_bytes, hash_key, digest = _HEADER.unpack(header)
            if (magic, of_epoch, changed_ns) != (MAGIC, epoch, store.changed_ns()):
                raise NotKeptError("the keyring or the directory of the key files has changed since")
            if bool(threads_bytes) != (threads and count > 0):
                raise NotKeptError("of this start and the one before, only one has a policy file")
            if size != file.tell() + count * KEY_BYTES + threads_bytes or size > FILE_BYTES_MAX:
                raise NotKeptError("the file has the wrong length")
            sha = sha256()

            def read(length: int) -> bytes:
                part = file.read(length)
                sha.update(part)
                return part

            index = KeyIndex.of_columns(read, count, threads_bytes, hash_key)
            if sha.digest() != digest:
                raise NotKeptError("the file is damaged")
            return index
    except FileNotFoundError:
        raise NotKeptError("") from None
    except DecryptionError:
        raise NotKeptError("the file is of another keyring, or was altered") from None
    except (StorageUnavailableError, ValueError) as error:
        raise NotKeptError(str(error)) from None
    finally:
        with contextlib.suppress(OSError):  # the epoch has changed, so nobody believes it any more
            os.unlink(NAME, dir_fd=directory_fd)
