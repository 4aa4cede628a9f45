"""The format version of a store directory.

Invariants: a directory is used only by a version that knows its format; an empty one is claimed before anything else
is put there. A store whose records are in plaintext, as a benchmark makes it (progressdb_server/unencrypted.py), has a
format of its own, which only a server without encryption takes; and that takes no other.
"""

from __future__ import annotations

from typing import Final

import msgspec

from progressdb_server.store import keyspace
from progressdb_server.store.engine import Engine, Reader

FORMAT: Final = 1
UNENCRYPTED: Final = "unencrypted-1"
"""Text, which no version takes for one of its numbers."""


class FormatError(Exception):
    """The directory is no store, one of a newer version, or one of the other kind; the text says what to do."""


class _Format(msgspec.Struct):
    format: int | str


def check(reader: Reader, *, encrypted: bool = True) -> None:
    """Raises FormatError."""
    raw = reader.get(keyspace.FORMAT)
    if raw is None:
        raise FormatError("the directory holds no ProgressDB store")
    try:
        found = msgspec.json.decode(raw, type=_Format).format
    except msgspec.DecodeError as error:
        raise FormatError("the store's format record is damaged: restore a backup") from error
    if encrypted and isinstance(found, str):
        raise FormatError(
            "nothing in this store is encrypted, for it was made by `progressdb --kms none`: use another directory, "
            "and delete this one when the benchmark is over"
        )
    if not encrypted and isinstance(found, int):
        raise FormatError(
            "the store is encrypted, and `--kms none` would put plaintext into it: leave the flag out, or for a "
            "benchmark give --db a new directory"
        )
    if found not in (FORMAT, UNENCRYPTED):
        raise FormatError(
            f"the store has format {found}, this version reads format {FORMAT}: start the version that wrote it, "
            "or a newer one"
        )


def claim(engine: Engine, *, encrypted: bool = True) -> None:
    """Raises FormatError for a directory that is neither empty nor a store of this format and kind."""
    if engine.get(keyspace.FORMAT) is None:
        if engine.scan(b"", b"\xff" * 4, limit=1):
            raise FormatError("the directory holds something else than a ProgressDB store")
        engine.write([(keyspace.FORMAT, msgspec.json.encode(_Format(FORMAT if encrypted else UNENCRYPTED)))])
        engine.sync()
    check(engine, encrypted=encrypted)
