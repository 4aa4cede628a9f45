"""What the backup of the store is: as `api.described`, of the route in `api.store_backup`.

Owns: its description. The invariants are those of `api.described`.
"""

from __future__ import annotations

from typing import Final

from progressdb_server.api.description import Described, Taken
from progressdb_server.api.store_backup import REFUSAL, TAKEN, BackupRequest

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
        refusals={400: (REFUSAL, "invalid request"), 409: (TAKEN,)},
    ),
}
