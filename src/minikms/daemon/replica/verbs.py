"""What a daemon that is no member answers to a replicator.

Owns: these answers. It must never change anything.
"""

from __future__ import annotations

from minikms import api
from minikms.api.errors import ConflictError
from minikms.audit import Event
from minikms.custody.vault import Permit
from minikms.service.base import VerbTable
from minikms.service.replicas import NOT_REPLICATED


class NoMember:
    """Of a daemon whose key service has one host."""

    def add_verbs(self, table: VerbTable) -> None:
        table.later(api.REPLICA_FOLLOW, self._refuse, audited=False)
        table.later(api.REPLICA_NEXT, self._refuse, audited=False)
        table.later(api.PROMOTE_REPLICA, self._refuse)
        table.now(api.REPLICA_STATUS, lambda request, event: api.ReplicaStatusAnswer(enabled=False))

    async def _refuse(self, request: api.Request, event: Event, permit: Permit) -> bytes:
        raise ConflictError(NOT_REPLICATED)
