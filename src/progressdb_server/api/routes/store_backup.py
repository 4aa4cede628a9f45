"""The backups of the store by the running server: only it may take a checkpoint of what it has open. For admins only.

Owns: the shapes of the requests and of their answers. Invariants: a backup lies in the server's own directory of
backups, under a name and no path; none is overwritten; the answer comes once it was read back. Nothing here deletes a
backup: what is forgotten is the entry of one that an operator has deleted. What a backup is, is in the store's room.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec
import structlog

from progressdb_server.api.http import response
from progressdb_server.api.http.errors import ApiError, bad_request, not_found
from progressdb_server.api.http.request import Call
from progressdb_server.api.http.response import Answer, JsonList
from progressdb_server.api.routes.table import ADMINS, Operation, Resource
from progressdb_server.store.model import (
    BackupBusyError,
    BackupError,
    BackupExistsError,
    BackupNotFoundError,
    BackupRegister,
    BackupThereError,
)

NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
REFUSAL: Final = "name must be 1 to 128 letters, digits, dots, underscores or hyphens, no dot first"
TAKEN: Final = "a backup of this name exists"
BUSY: Final = "another backup is being made: wait for its end"
FAILED: Final = "the backup failed and nothing of it is left; the log says why under the request's id"
UNKNOWN: Final = "no backup of this name is registered"
THERE: Final = "the backup is still there: delete it first, and every copy of it"

_log: Final = structlog.get_logger("progressdb.api")


class BackupRequest(msgspec.Struct, forbid_unknown_fields=True):
    name: str


_REQUEST: Final = msgspec.json.Decoder(BackupRequest)


class BackupRoutes:
    def __init__(self, store: BackupRegister, directory: Path) -> None:
        self._store = store
        self._directory = directory

    async def create(self, call: Call) -> Answer:
        """A new directory of that name; answers once it was read back."""
        name = (await call.json(_REQUEST, "invalid request")).name
        if NAME.fullmatch(name) is None:
            raise bad_request(REFUSAL)
        try:
            made = await self._store.back_up(str((self._directory / name).absolute()))
        except BackupExistsError as error:
            raise ApiError(409, TAKEN) from error
        except BackupBusyError as error:
            raise ApiError(409, BUSY) from error
        except BackupError as error:  # its text names files of this machine
            _log.error("backup_failed", request_id=call.request_id, reason=str(error))
            raise ApiError(500, FAILED) from error
        return response.json({"name": name, "files": len(made.files), "bytes": made.bytes})

    async def listed(self, call: Call) -> JsonList:
        """Those that count when a key is to be destroyed, oldest first."""
        return JsonList(b'{"backups":[', self._pages())

    async def _pages(self) -> AsyncIterator[list[dict[str, object]]]:
        async for page in self._store.backups():
            yield [
                {"name": known.name, "path": known.path, "created_ns": known.created_ns, "gone": known.gone}
                for known in page
            ]

    async def forget(self, call: Call) -> Answer:
        """From here on it keeps no key from being destroyed."""
        name = call.parameters["name"]
        try:
            return response.json({"name": name, "forgotten": await self._store.forget_backup(name)})
        except BackupNotFoundError as error:
            raise not_found(UNKNOWN) from error
        except BackupThereError as error:
            raise ApiError(409, THERE) from error


def resources(store: BackupRegister, directory: Path) -> tuple[Resource, ...]:
    """The routes of backups, which are made in `directory`."""
    routes = BackupRoutes(store, directory)
    return (
        Resource("/admin/store_backup", {"POST": Operation(routes.create, ADMINS)}),
        Resource("/admin/store_backups", {"GET": Operation(routes.listed, ADMINS)}),
        Resource("/admin/store_backups/{name}", {"DELETE": Operation(routes.forget, ADMINS)}),
    )
