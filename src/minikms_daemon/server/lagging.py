"""The application while the auditor lags: more lines than `--refuse-when-unshipped` allows are on the disk, and the
auditor has not reported them.

Owns: whether it lags, and what is served meanwhile; a standby serves the same. Invariants: no key is used and none is
changed; what an operator needs to see and end the lag is served as always, and so is a seal; before the first report
since the start nothing counts as taken, so a restart is no way around the bound. It must never write a line for each
refusal: each line makes the lag larger.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from minikms import api
from minikms.api.errors import AuditLaggingError
from minikms.http import HttpRequest, Response, raised_response
from minikms_daemon.server.admission import AdmittingApplication, Session
from minikms_daemon.server.application import KeyApplication
from minikms_daemon.service.encoding import Reply

if TYPE_CHECKING:
    pass

SERVED: Final = (
    api.STATUS,
    api.METRICS,
    api.SEAL,
    api.UNSEAL,
    api.UNSEAL_STATUS,
    api.REPORT_AUDIT_POSITION,
    api.RELOAD_POLICY,  # a policy may lack the grant of the auditor
    api.REPLICA_FOLLOW,
    api.REPLICA_NEXT,
    api.REPLICA_STATUS,
    api.PROMOTE_REPLICA,
)
"""The verbs that a standby serves too."""


_SERVED: Final = frozenset((verb.method, verb.path) for verb in SERVED)


class RefusingApplication(AdmittingApplication, ABC):
    """The engine's application in the place of `app`, which gets the verbs of SERVED only: see `minikms.http`."""

    def __init__(self, app: KeyApplication) -> None:
        super().__init__(admission=app.admission, meters=app.meters)
        self._app = app

    def handle(self, session: Session, request: HttpRequest) -> Reply | Awaitable[Reply]:
        if self._serves(request):
            return self._app.handle(session, request)
        who = self.admission.caller(session, request.head, lambda: self._refusal(None))
        return who if isinstance(who, Response) else self._refusal(session)

    def commit(self) -> bool | None:
        return self._app.commit()

    def _serves(self, request: HttpRequest) -> bool:
        return (request.head.method, request.head.path) in _SERVED

    @abstractmethod
    def _refusal(self, session: Session | None) -> Response:
        """The answer to every other verb; without a `session`, to `/ready`."""


class LaggingApplication(RefusingApplication):
    """`lag`: durable lines that the auditor has not reported. `lines_max`: its bound."""

    def __init__(self, app: KeyApplication, lag: Callable[[], int], lines_max: int) -> None:
        super().__init__(app)
        self._lag = lag
        self._lines_max = lines_max
        self._text = (
            f"more than {lines_max:,} lines of the audit log wait for the auditor, so no key is used: see that "
            "minikms-auditor runs, and what `minikms-auditor status` says; requests work again once it has taken them"
        )

    @property
    def why(self) -> str:
        """Why verbs are refused now; empty if the auditor does not lag."""
        return self._text if self._lag() > self._lines_max else ""

    def _refusal(self, session: Session | None) -> Response:
        if session is not None:
            self.admission.lagging(session)
        return raised_response(AuditLaggingError(self._text))
