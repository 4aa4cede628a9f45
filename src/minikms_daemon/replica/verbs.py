"""The replacement of `ReplicaMember` in a daemon of one host: it always serves, and refuses a replicator and hosts.

It must never change anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api.errors import ConflictError
from minikms.audit import Event
from minikms.custody.vault import Permit
from minikms_daemon.service.base import VerbTable

if TYPE_CHECKING:
    from minikms.http import Application
    from minikms.policy.meters import Meters
    from minikms_daemon.server.admission import Admission, Session
    from minikms_daemon.server.application import KeyApplication
    from minikms_daemon.server.parts import Parts


NOT_REPLICATED: Final = "the key service has one host: to have several, stop the daemon and run `minikms replica init`"


class NoMember:
    """Has the methods of `ReplicaMember`."""

    serves = True
    asking: frozenset[object] = frozenset()

    def opened(self, parts: Parts) -> None:
        return

    def sealed(self, why: str = "") -> None:
        return

    async def note_seals(self, parts: Parts) -> None:
        return

    def stand_by(self, why: str) -> None:
        return

    async def settled(self) -> None:
        return

    async def watch(self) -> None:
        return

    def leased(self, app: Application[Session]) -> Application[Session]:
        return app

    def standby(self, app: KeyApplication, admission: Admission, meters: Meters | None) -> None:
        return

    def status(self) -> None:
        return

    def conditions(self) -> tuple[()]:
        return ()

    def ask_seal(self) -> UnsetType:
        return UNSET

    async def check_seal_known(self) -> None:
        return

    def sealed_acts(self) -> dict[str, dict[str, Any]]:
        return {}

    def add_verbs(self, table: VerbTable, **parts: object) -> None:
        table.later(api.REPLICA_FOLLOW, self._refuse, audited=False)
        table.later(api.REPLICA_NEXT, self._refuse, audited=False)
        table.later(api.PROMOTE_REPLICA, self._refuse)
        table.now(api.INVITE_REPLICA, self._refuse_now)
        table.later(api.ADD_REPLICA, self._refuse, durable=True)
        table.later(api.REMOVE_REPLICA, self._refuse, durable=True)
        table.now(api.REPLICA_STATUS, lambda request, event: api.ReplicaStatusAnswer(enabled=False))

    async def _refuse(self, request: api.Request, event: Event, permit: Permit) -> bytes:
        raise ConflictError(NOT_REPLICATED)

    def _refuse_now(self, request: api.Request, event: Event) -> bytes:
        raise ConflictError(NOT_REPLICATED)
