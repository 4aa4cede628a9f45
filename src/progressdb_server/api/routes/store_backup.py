"""Backups of the store, made by the running server: only it can take a checkpoint of the store it has open.

Owns: the JSON of the requests and responses, for admins only. Invariants: a backup lies in the server's own directory
of backups, and a request gives its name and no path; no backup is overwritten; the response is sent after the backup
was read back. Nothing here deletes a backup: an operator does, and then has its entry in the register removed. The
backup itself is made by `store.backup`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import msgspec

from minikms.platform.logs import Log
from progressdb_server.api.gate.errors import bad_request
from progressdb_server.api.gate.keys import ADMINS
from progressdb_server.api.gate.request import ApiRequest
from progressdb_server.api.gate.response import ApiResponse, JsonList, json_response
from progressdb_server.api.openapi.description import (
    DISK,
    INTEGER,
    TEXT,
    JsonBody,
    Operation,
    list_of,
    object_of,
)
from progressdb_server.store.backup import Backups
from progressdb_server.store.model import (
    BackupBusyError,
    BackupError,
    BackupExistsError,
    BackupNotFoundError,
    BackupOfDatabaseError,
    BackupThereError,
)

NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
INVALID_NAME: Final = "name must be 1 to 128 letters, digits, dots, underscores or hyphens, no dot first"
INVALID_REQUEST: Final = "invalid request"
_NOT_BEGUN: Final = (BackupExistsError, BackupBusyError, BackupOfDatabaseError)

_log: Final = Log()


class BackupBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str


_DECODER: Final = msgspec.json.Decoder(BackupBody)


class BackupHandlers:
    """Backups are made in `directory`."""

    def __init__(self, backups: Backups, directory: Path) -> None:
        self._backups = backups
        self._directory = directory

    @Operation(
        "POST",
        "/admin/store_backup",
        roles=ADMINS,
        response=object_of(name=TEXT, files=INTEGER, bytes=INTEGER),
        body=JsonBody(BackupBody, {"name": {"type": "string", "pattern": f"^{NAME.pattern}$"}}),
        needs=DISK,
        raises=(INVALID_NAME, INVALID_REQUEST, *_NOT_BEGUN, BackupError),
    )
    async def create(self, request: ApiRequest) -> ApiResponse:
        """Back up the store while the server runs. Back up the key service after it, not before."""
        name = (await request.json(_DECODER, INVALID_REQUEST)).name
        if NAME.fullmatch(name) is None:
            raise bad_request(INVALID_NAME)
        try:
            copy = await self._backups.back_up(str((self._directory / name).absolute()))
        except _NOT_BEGUN:
            raise
        except BackupError as error:  # its text names files of this machine: it is logged and not sent
            _log.error("backup_failed", request_id=request.request_id, reason=str(error))
            raise
        return json_response({"name": name, "files": len(copy.files), "bytes": copy.bytes})

    @Operation(
        "GET",
        "/admin/store_backups",
        roles=ADMINS,
        response=list_of(
            "backups",
            object_of(
                name=TEXT,
                path=TEXT,
                created_ns=INTEGER,
                gone={
                    "type": "boolean",
                    "description": "Whether no file exists at the path, or it is a backup of a database.",
                },
            ),
        ),
        needs=DISK,
    )
    async def list_registered(self, request: ApiRequest) -> JsonList:
        """List the registered backups of the store, oldest first. The keys that they need are not destroyed."""
        return JsonList(b'{"backups":[', self._pages())

    async def _pages(self) -> AsyncIterator[list[dict[str, object]]]:
        async for known in self._backups.registered():
            yield [{"name": known.name, "path": known.path, "created_ns": known.created_ns, "gone": known.gone}]

    @Operation(
        "DELETE",
        "/admin/store_backups/{name}",
        roles=ADMINS,
        response=object_of(name=TEXT, forgotten=INTEGER),
        needs=DISK,
        raises=(BackupNotFoundError, BackupThereError),
    )
    async def forget(self, request: ApiRequest) -> ApiResponse:
        """Remove a backup from the register. Delete the backup and all its copies first, because the server may then
        destroy keys that only they need."""
        name = request.path_params["name"]
        forgotten = await self._backups.forget(name)
        _log.warning("backup_forgotten", paths=[known.path for known in forgotten])
        return json_response({"name": name, "forgotten": len(forgotten)})
