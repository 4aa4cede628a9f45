"""The file `kms-replica.json`: the mark of a member of a replicated key service.

Owns: its content, its tag, reading and replacing it. Invariants: its presence makes a directory that of a member. A
mark without a tag has seen no change. The tag is under the tombstone key, which a removal of a root key keeps, so the
mark is authentic whichever of keyring and mark a crash has left behind. Before `check`, nobody may rely on a number.
"""

from __future__ import annotations

import hmac
import os
from typing import Final, NamedTuple

import msgspec

from minikms import api
from minikms.api.decoding import UNDECODABLE
from minikms.api.errors import StartError, StartLaterError, StorageUnavailableError
from minikms.crypto import labels
from minikms.keys import keyring
from minikms.keys.unlocked import UnlockedKeyring
from minikms.platform.files import read_file_bounded, replace_file

NAME: Final = "kms-replica.json"
FORMAT: Final = "minikms-replica"
VERSION: Final = 1
FILE_BYTES_MAX: Final = 4096


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`term` and `number`: of the last change that the directory has as a whole. `seals`: the count of seals that this
    member has obeyed. `begins`: it may fill an empty database.
    """

    format: str = FORMAT
    version: int = VERSION
    member_id: str
    name: str
    term: int = 0
    number: int = 0
    seals: int = 0
    begins: bool = False


class StoredMark(NamedTuple):
    """`content`: the exact bytes of the mark, which `tag` authenticates; no tag: not yet."""

    mark: Mark
    content: bytes
    tag: bytes

    def check(self, unlocked: UnlockedKeyring) -> Mark:
        """The mark. Raises StartError unless it is of this keyring."""
        authentic = hmac.compare_digest(self.tag, _tag(unlocked, self.content)) if self.tag else self.mark.number == 0
        if not authentic:
            raise StartError(f"{NAME} was altered, or belongs to another keyring: let this host join anew")
        return self.mark


_file_decoder = msgspec.json.Decoder(keyring.File)
_mark_decoder = msgspec.json.Decoder(Mark)


def read(directory_fd: int) -> StoredMark | None:
    """The mark, not yet authenticated; None without the file. Raises StartError, StartLaterError."""
    return _read(NAME, directory_fd)


def member_id(directory: str) -> str:
    """Whose directory it is; empty if it is not that of a member. Raises as `read`."""
    stored = _read(os.path.join(directory, NAME))
    return "" if stored is None else stored.mark.member_id


def _read(path: str, dir_fd: int | None = None) -> StoredMark | None:
    try:
        data = read_file_bounded(path, FILE_BYTES_MAX, dir_fd=dir_fd)
    except StorageUnavailableError as error:
        raise StartLaterError(f"{NAME} can't be read: {error}") from None
    if data is None:
        return None
    try:
        file = _file_decoder.decode(data)
        content = bytes(file.body)
        mark = _mark_decoder.decode(content)
    except UNDECODABLE:
        mark = None
    if mark is None or not _agrees(mark):
        raise StartError(f"{NAME} is damaged, or of an unknown format version: let this host join anew")
    return StoredMark(mark, content, file.tag)


def write(directory_fd: int, mark: Mark, unlocked: UnlockedKeyring | None) -> None:
    """Replaces the file, durably. Blocks on the disk. `unlocked`: None before the member has a keyring.

    Raises StorageUnavailableError.
    """
    replace_file(directory_fd, NAME, encode(mark, unlocked))


def encode(mark: Mark, unlocked: UnlockedKeyring | None) -> bytes:
    """The content of the file. For a daemon, in the thread that uses keys."""
    content = msgspec.json.encode(mark)
    return keyring.encode_file(content, b"" if unlocked is None else _tag(unlocked, content))


def _tag(unlocked: UnlockedKeyring, content: bytes) -> bytes:
    data = labels.aad(labels.REPLICA_MARK, unlocked.body.keyring_id.encode(), content)
    return hmac.digest(unlocked.tombstone_key, data, "sha256")


def _agrees(mark: Mark) -> bool:
    return (
        (mark.format, mark.version) == (FORMAT, VERSION)
        and api.MEMBER_ID_PATTERN.fullmatch(mark.member_id) is not None
        and api.MEMBER_NAME_PATTERN.fullmatch(mark.name) is not None
        and all(0 <= number <= api.REPLICA_NUMBER_MAX for number in (mark.term, mark.number, mark.seals))
    )
