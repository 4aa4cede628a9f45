"""What the backups of the store are: as `api.described`, of the routes in `api.store_backup`.

Owns: their descriptions. The invariants are those of `api.described`.
"""

from __future__ import annotations

from typing import Final

from progressdb_server.api.openapi.description import DISK, Described, Taken, listed
from progressdb_server.api.routes.store_backup import BUSY, FAILED, REFUSAL, TAKEN, THERE, UNKNOWN, BackupRequest

BACKUP_DESCRIBED: Final[dict[str, Described]] = {
    "POST /admin/store_backup": Described(
        tag="operators",
        summary="Back up the store beside running writes; back up the key service after it",
        answer={
            "type": "object",
            "properties": {"name": {"type": "string"}, "files": {"type": "integer"}, "bytes": {"type": "integer"}},
            "required": ["name", "files", "bytes"],
        },
        body=Taken(BackupRequest, {"name": {"type": "string", "pattern": "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$"}}),
        refusals={400: (REFUSAL, "invalid request"), 409: (TAKEN, BUSY), 500: (FAILED,)},
        needs=DISK,
    ),
    "GET /admin/store_backups": Described(
        tag="operators",
        summary="The store's backups that count when an old key is to be destroyed, oldest first",
        answer=listed(
            "backups",
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "path": {"type": "string"},
                    "created_ns": {"type": "integer"},
                    "gone": {"type": "boolean", "description": "Nothing is found at its path."},
                },
                "required": ["name", "path", "created_ns", "gone"],
            },
        ),
        needs=DISK,
    ),
    "DELETE /admin/store_backups/{name}": Described(
        tag="operators",
        summary="Forget a backup that was deleted, with every copy of it: it keeps no old key any more",
        answer={
            "type": "object",
            "properties": {"name": {"type": "string"}, "forgotten": {"type": "integer"}},
            "required": ["name", "forgotten"],
        },
        refusals={404: (UNKNOWN,), 409: (THERE,)},
        needs=DISK,
    ),
}
