"""A backup of the store by the running server: only it may take a checkpoint of what it has open. For admins only.

Owns: the shape of the request and of its answer. Invariants: a backup lies in the server's own directory of backups,
under a name and no path; none is overwritten; the answer comes once it was read back. What a backup is, is in the
store's room.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, Protocol

import msgspec

from progressdb_server.api import answer
from progressdb_server.api.answer import Answer
from progressdb_server.api.call import Call
from progressdb_server.api.errors import ApiError, bad_request
from progressdb_server.api.routes import ADMINS, Operation, Resource
from progressdb_server.store.backup import BackupError, Manifest

NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
REFUSAL: Final = "name must be 1 to 128 letters, digits, dots, underscores or hyphens, no dot first"
TAKEN: Final = "a backup of this name exists"


class BackupRequest(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class BacksUp(Protocol):
    async def back_up(self, path: str) -> Manifest: ...


_REQUEST: Final = msgspec.json.Decoder(BackupRequest)


class BackupRoutes:
    def __init__(self, store: BacksUp, directory: Path) -> None:
        self._store = store
        self._directory = directory

    async def create(self, call: Call) -> Answer:
        """A new directory of that name; answers once it was read back."""
        name = (await call.json(_REQUEST, "invalid request")).name
        if NAME.fullmatch(name) is None:
            raise bad_request(REFUSAL)
        path = (self._directory / name).absolute()
        if os.path.lexists(path):  # noqa: ASYNC240  one lookup, as short as the engine's own reads
            raise ApiError(409, TAKEN)
        try:
            made = await self._store.back_up(str(path))
        except BackupError as error:
            raise ApiError(500, str(error)) from error
        return answer.json({"name": name, "files": len(made.files), "bytes": made.bytes})


def resources(store: BacksUp, directory: Path) -> tuple[Resource, ...]:
    """The route of backups, which are made in `directory`."""
    return (Resource("/admin/store_backup", {"POST": Operation(BackupRoutes(store, directory).create, ADMINS)}),)
