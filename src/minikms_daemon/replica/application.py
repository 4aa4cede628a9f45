"""The application of a member that does not serve.

Owns: what a standby answers. Invariants: no key is used and no change is begun; what an operator, an auditor and the
replicator need is served as always, and so is a seal; `/ready` answers 503. It must never write a line for a refusal:
clients try each host.
"""

from __future__ import annotations

from collections.abc import Callable

from minikms import api
from minikms.api.errors import StandbyError
from minikms.http import Request, Response, raised_response
from minikms.policy import Meters
from minikms_daemon.server.admission import Admission, Session
from minikms_daemon.server.application import Application
from minikms_daemon.server.lagging import RefusingApplication


class StandbyApplication(RefusingApplication):
    """The engine's application in the place of `app`. `attended`: an auditor was attached; the first report of one is a
    change of the keyring, which waits until this host serves.
    """

    def __init__(
        self, app: Application, *, admission: Admission, meters: Meters | None, attended: Callable[[], bool]
    ) -> None:
        super().__init__(app, admission=admission, meters=meters)
        self._attended = attended

    def _serves(self, request: Request) -> bool:
        first = request.head.path == api.REPORT_AUDIT_POSITION.path and not self._attended()
        return super()._serves(request) and not first

    def _refusal(self, session: Session | None) -> Response:
        return raised_response(StandbyError())
