"""The application of a member that does not serve.

Owns: what a standby answers. Invariants: no key is used and no change is begun; what an operator, an auditor and the
replicator need is served as always, and so is a seal; `/ready` answers 503. It must never write a line for a refusal:
clients try each host.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from msgspec.json import Decoder

from minikms import api
from minikms.api.errors import StandbyError
from minikms.http import HttpRequest, Response, raised_response
from minikms.policy.principal import Principal, require
from minikms_daemon.server import strictjson
from minikms_daemon.server.admission import Session
from minikms_daemon.server.application import KeyApplication
from minikms_daemon.server.lagging import RefusingApplication
from minikms_daemon.service.encoding import Reply, json_answer

if TYPE_CHECKING:
    pass

Act = Callable[[Principal, HttpRequest], Reply | Awaitable[Reply]]


class StandbyApplication(RefusingApplication):
    """The engine's application in the place of `app`. `attended`: an auditor was attached; the first report of one is a
    change of the keyring, which waits until this host serves.
    """

    def __init__(self, app: KeyApplication, attended: Callable[[], bool]) -> None:
        super().__init__(app)
        self._attended = attended

    def _serves(self, request: HttpRequest) -> bool:
        first = request.head.path == api.REPORT_AUDIT_POSITION.path and not self._attended()
        return super()._serves(request) and not first

    def _refusal(self, session: Session | None) -> Response:
        return raised_response(StandbyError())


def sealed_acts(
    *,
    follow: Callable[[api.ReplicaFollowRequest], Awaitable[object]],
    grant: Callable[[api.ReplicaNextRequest], Awaitable[object]],
    answer: Callable[[], object],
) -> dict[str, dict[str, Act]]:
    """What a sealed member answers to its replicator, by path and method."""
    follows, grants = Decoder(api.ReplicaFollowRequest), Decoder(api.ReplicaNextRequest)
    acts: dict[str, dict[str, Act]] = {}

    async def answered(result: Awaitable[object]) -> Reply:
        return json_answer(await result)

    def of(verb: api.Verb[Any, Any], respond: Callable[[HttpRequest], Reply | Awaitable[Reply]]) -> None:
        def act(who: Principal, request: HttpRequest) -> Reply | Awaitable[Reply]:
            require(who, verb)
            return respond(request)

        acts[verb.path] = {verb.method: act}

    of(api.REPLICA_FOLLOW, lambda request: answered(follow(strictjson.decode(follows, request.body))))
    of(api.REPLICA_NEXT, lambda request: answered(grant(strictjson.decode(grants, request.body))))
    of(api.REPLICA_STATUS, lambda request: json_answer(answer()))
    return acts
