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

from minikms.logs import structlog
from progressdb_server.api.http.errors import bad_request
from progressdb_server.api.http.keys import ADMINS
from progressdb_server.api.http.request import Request
from progressdb_server.api.http.response import JsonList, Response, json_response
from progressdb_server.api.openapi.description import (
    DISK,
    INTEGER,
    TEXT,
    JsonBody,
    list_of,
    object_of,
)
from progressdb_server.api.routes.errors import (
    BACKUP_BUSY,
    BACKUP_EXISTS,
    BACKUP_FAILED,
    BACKUP_NOT_FOUND,
    BACKUP_STILL_THERE,
)
from progressdb_server.api.routes.table import Operation
from progressdb_server.store.model import BackupBusyError, BackupError, BackupExistsError, BackupRegister

NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
INVALID_NAME: Final = "name must be 1 to 128 letters, digits, dots, underscores or hyphens, no dot first"
INVALID_REQUEST: Final = "invalid request"

_log: Final = structlog.get_logger("progressdb.api")


class BackupBody(msgspec.Struct, forbid_unknown_fields=True):
    name: str


_DECODER: Final = msgspec.json.Decoder(BackupBody)


class BackupHandlers:
    def __init__(self, store: BackupRegister, directory: Path) -> None:
        self._store = store
        self._directory = directory

    async def create(self, request: Request) -> Response:
        """Back up into a new directory of that name; responds after reading it back."""
        name = (await request.json(_DECODER, INVALID_REQUEST)).name
        if NAME.fullmatch(name) is None:
            raise bad_request(INVALID_NAME)
        try:
            made = await self._store.back_up(str((self._directory / name).absolute()))
        except (BackupExistsError, BackupBusyError):
            raise
        except BackupError as error:  # its text names files of this machine: it is logged and not sent
            _log.error("backup_failed", request_id=request.request_id, reason=str(error))
            raise
        return json_response({"name": name, "files": len(made.files), "bytes": made.bytes})

    async def list_registered(self, request: Request) -> JsonList:
        """The registered backups, oldest first. Their keys are not destroyed."""
        return JsonList(b'{"backups":[', self._pages())

    async def _pages(self) -> AsyncIterator[list[dict[str, object]]]:
        async for page in self._store.backups():
            yield [
                {"name": known.name, "path": known.path, "created_ns": known.created_ns, "gone": known.gone}
                for known in page
            ]

    async def forget(self, request: Request) -> Response:
        """Remove a deleted backup from the register. Keys that only it needed can be destroyed from then on."""
        name = request.path_params["name"]
        forgotten = await self._store.forget_backup(name)
        _log.warning("backup_forgotten", paths=[known.path for known in forgotten])
        return json_response({"name": name, "forgotten": len(forgotten)})


# --- operations -------------------------------------------------------------------------------------------------
def operations(store: BackupRegister, directory: Path) -> tuple[Operation, ...]:
    """Backups are made in `directory`."""
    backups = BackupHandlers(store, directory)
    return (
        Operation(
            "POST",
            "/admin/store_backup",
            backups.create,
            roles=ADMINS,
            tag="operators",
            summary="Back up the store while the server runs. Back up the key service after it, not before",
            response=object_of(name=TEXT, files=INTEGER, bytes=INTEGER),
            body=JsonBody(BackupBody, {"name": {"type": "string", "pattern": f"^{NAME.pattern}$"}}),
            errors={
                400: (INVALID_NAME, INVALID_REQUEST),
                409: (BACKUP_EXISTS, BACKUP_BUSY),
                500: (BACKUP_FAILED,),
            },
            needs=DISK,
        ),
        Operation(
            "GET",
            "/admin/store_backups",
            backups.list_registered,
            roles=ADMINS,
            tag="operators",
            summary="List the registered backups of the store, oldest first. The keys that they need are not destroyed",
            response=list_of(
                "backups",
                object_of(
                    name=TEXT,
                    path=TEXT,
                    created_ns=INTEGER,
                    gone={"type": "boolean", "description": "Whether no file exists at the path."},
                ),
            ),
            needs=DISK,
        ),
        Operation(
            "DELETE",
            "/admin/store_backups/{name}",
            backups.forget,
            roles=ADMINS,
            tag="operators",
            summary="Remove a backup from the register. Delete the backup and all its copies first, because "
            "the server may then destroy keys that only they need",
            response=object_of(name=TEXT, forgotten=INTEGER),
            errors={404: (BACKUP_NOT_FOUND,), 409: (BACKUP_STILL_THERE,)},
            needs=DISK,
        ),
    )
