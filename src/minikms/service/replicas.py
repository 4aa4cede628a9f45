"""The verbs that change which hosts have the keys.

Owns: the invitation of a host, its addition and its removal. Invariants: each is one change of the keyring, and none is
made where the key service is not replicated. It must never decide which host serves: that is `minikms.daemon.replica`.
"""

from __future__ import annotations

from typing import Final

from minikms import api
from minikms.api.errors import ConflictError
from minikms.audit import Event
from minikms.custody.vault import Permit, Vault
from minikms.service.base import VerbTable
from minikms.service.keks import KekVerbs
from minikms.service.root_removal import RootRemoval

NOT_REPLICATED: Final = "this key service is not replicated: begin with `minikms replica init` on this host"


class ReplicaVerbs:
    """`removal` removes the root key of a host that goes; then a KEK rotation follows, which `keks` runs."""

    def __init__(self, *, vault: Vault, table: VerbTable, keks: KekVerbs, removal: RootRemoval) -> None:
        self._vault = vault
        self._keks = keks
        self._removal = removal
        table.later(api.INVITE_REPLICA, self.invite)
        table.later(api.ADD_REPLICA, self.add, durable=True)
        table.later(api.REMOVE_REPLICA, self.remove, durable=True)

    async def invite(self, request: api.Request, event: Event, permit: Permit) -> api.ReplicaInvitation:
        raise ConflictError(NOT_REPLICATED)

    async def add(self, request: api.AddReplicaRequest, event: Event, permit: Permit) -> api.ReplicaAnswer:
        raise ConflictError(NOT_REPLICATED)

    async def remove(self, request: api.MemberRequest, event: Event, permit: Permit) -> api.ReplicaAnswer:
        raise ConflictError(NOT_REPLICATED)
