"""The member in a daemon of one host: it always serves, and refuses a replicator and hosts.

Owns: what a process asks of its member. Invariant: it changes nothing. `minikms_daemon.replica.member` has the same for
one of several hosts.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Final

from msgspec import UNSET, UnsetType

from minikms import api
from minikms.api.errors import ConflictError
from minikms.audit import Event
from minikms.custody.vault import Permit
from minikms_daemon.service.base import VerbTable

if TYPE_CHECKING:
    from minikms.http import Application
    from minikms_daemon.server.admission import Session


NOT_REPLICATED: Final = "the key service has one host: to have several, stop the daemon and run `minikms replica init`"


class NoMember:
    """The member of a process, over all its seals. `asking`: the tasks of a replicator's requests. `parts`: the
    `minikms_daemon.server.parts.Parts` of an unsealed time, which have this member; `app`: their application.
    """

    asking: AbstractSet[object] = frozenset()

    @property
    def serves(self) -> bool:
        """Whether this host serves; the others stand by."""
        return True

    def opened(self, parts: Any) -> None:
        return

    def sealed(self, why: str = "") -> None:
        return

    async def note_seals(self, parts: Any) -> None:
        return

    def stand_by(self, why: str) -> None:
        return

    async def settled(self) -> None:
        return

    async def watch(self) -> None:
        return

    def leased(self, app: Application[Session]) -> Application[Session]:
        """`app`, behind the lease of this host if it needs one."""
        return app

    def standby(self, app: Any) -> Application[Session] | None:
        """What is served instead of `app` while this host does not serve; None where it always does."""
        return None

    def status(self) -> dict[str, object] | None:
        return None

    def conditions(self) -> Iterable[api.Condition]:
        return ()

    def ask_seal(self) -> int | UnsetType:
        return UNSET

    async def check_seal_known(self) -> None:
        return

    def sealed_acts(self) -> dict[str, dict[str, Any]]:
        return {}

    def add_verbs(self, table: VerbTable, parts: Any) -> None:
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
