"""The format version of a store directory.

Invariant: a directory is used only by a version that knows its format; an empty one is claimed before anything else
is put there.
"""

from __future__ import annotations

from typing import Final

import msgspec

from progressdb_server.store import keyspace
from progressdb_server.store.engine import Engine, Reader

FORMAT: Final = 1


class FormatError(Exception):
    """The directory is no store, or one of a newer version; the text says what to do."""


class _Format(msgspec.Struct):
    format: int


def check(reader: Reader) -> None:
    """Raises FormatError."""
    raw = reader.get(keyspace.FORMAT)
    if raw is None:
        raise FormatError("the directory holds no ProgressDB store")
    try:
        found = msgspec.json.decode(raw, type=_Format).format
    except msgspec.DecodeError as error:
        raise FormatError("the store's format record is damaged: restore a backup") from error
    if found != FORMAT:
        raise FormatError(
            f"the store has format {found}, this version reads format {FORMAT}: start the version that wrote it, "
            "or a newer one"
        )


def claim(engine: Engine) -> None:
    """Raises FormatError for a directory that is neither empty nor a store of this format."""
    if engine.get(keyspace.FORMAT) is None:
        if engine.scan(b"", b"\xff" * 4, limit=1):
            raise FormatError("the directory holds something else than a ProgressDB store")
        engine.write([(keyspace.FORMAT, msgspec.json.encode(_Format(FORMAT)))])
        engine.sync()
    check(engine)
