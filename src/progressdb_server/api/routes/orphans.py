"""Orphaned keys for operators: list them, retire them.

Owns: the two operations. What an orphan is, is in `jobs.orphans`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from progressdb_server.api.http.keys import ADMINS
from progressdb_server.api.http.request import Request
from progressdb_server.api.http.response import JsonList, Response, json_response
from progressdb_server.api.openapi.description import INTEGER, TEXT, list_of, object_of, texts
from progressdb_server.api.routes.table import Operation
from progressdb_server.jobs.orphans import OrphanedKeys


class OrphanHandlers:
    def __init__(self, orphans: OrphanedKeys) -> None:
        self._orphans = orphans

    async def found(self, request: Request) -> JsonList:
        return JsonList(b'{"keys":[', self._pages())

    async def _pages(self) -> AsyncIterator[list[dict[str, str]]]:
        async for page in self._orphans.find():
            yield [{"key_id": key.key_id, "thread_id": key.thread_id, "created_at": key.created_at} for key in page]

    async def retire(self, request: Request) -> Response:
        done = await self._orphans.retire()
        return json_response(done._asdict())


def operations(orphans: OrphanedKeys) -> tuple[Operation, ...]:
    handlers = OrphanHandlers(orphans)
    return (
        Operation(
            "GET",
            "/admin/orphaned_keys",
            handlers.found,
            roles=ADMINS,
            tag="operators",
            summary="Active keys of the key service that no thread of this store names",
            response=list_of("keys", texts("key_id", "thread_id", "created_at")),
        ),
        Operation(
            "POST",
            "/admin/orphaned_keys/retire",
            handlers.retire,
            roles=ADMINS,
            tag="operators",
            summary="Retire them, if only this server makes keys of threads there; `why` says why some are left",
            response=object_of(retired=INTEGER, left=INTEGER, why=TEXT),
        ),
    )
