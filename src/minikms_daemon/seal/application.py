"""The application of a sealed daemon, which has no key.

Owns: what a sealed daemon answers. `/health`, `/ready`, `/status` and `/unseal` are served, the reports of an auditor,
what a replicator asks, and `/seal`, so that it can be repeated; everything else gets 503 `sealed` with `Retry-After`.
Invariants: callers and roles are those of the unsealed daemon; nothing is audited, because there is no audit key
(attempts to unseal are recorded by `minikms_daemon.seal.unseal`); the text of a given key goes into the arena before
anything else reads the body. It must never use a key.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from msgspec import UNSET
from msgspec.json import Decoder

from minikms import api
from minikms.api.errors import InvalidRequestError, SealedError
from minikms.crypto.aead import scrub
from minikms.http import HttpRequest, Response, raised_response
from minikms.memory.arena import SecretArena, SecretSlot
from minikms.policy.principal import Principal, require
from minikms.seal_files import SEALED_TEXT
from minikms_daemon.seal.unseal import Unsealing
from minikms_daemon.server import strictjson
from minikms_daemon.server.admission import AdmittingApplication, Session, require_short_body
from minikms_daemon.server.application import Seal
from minikms_daemon.server.keybody import SecretText, take_key, take_text
from minikms_daemon.server.status import reduced, without_policy_error
from minikms_daemon.service.encoding import Reply, json_answer

if TYPE_CHECKING:
    pass

_decode_unseal: Final = Decoder(api.UnsealRequest)
_decode_report: Final = Decoder(api.ReportAuditPositionRequest)

Answer = Reply | Awaitable[Reply]


def sealed_response(why: str = SEALED_TEXT) -> Response:
    """The answer to a verb."""
    return raised_response(SealedError(why))


@dataclass(eq=False, repr=False, kw_only=True)
class SealedApplication(AdmittingApplication):
    """The engine's application while the daemon is sealed: see `minikms.http`. `why`: as a sentence, with the error of
    the unlock service or (False) without it. `more`: what a member answers, by path and method.
    """

    arena: SecretArena
    unsealing: Unsealing
    seal: Seal
    why: Callable[[bool], str]
    status: Callable[[], dict[str, object]]
    report_audit_position: Callable[[api.ReportAuditPositionRequest], Awaitable[Reply]]
    more: Mapping[str, dict[str, Callable[[Principal, HttpRequest], Answer]]]

    def __post_init__(self) -> None:
        self._acts: dict[str, dict[str, Callable[[Principal, HttpRequest], Answer]]] = {
            api.STATUS.path: {"GET": self._status},
            api.SEAL.path: {"POST": self._seal},
            api.UNSEAL.path: {"GET": self._unseal_status, "POST": self._unseal},
            api.REPORT_AUDIT_POSITION.path: {"POST": self._report_audit_position},
            **self.more,
        }

    # --- the engine's side -------------------------------------------------------------------------------------------

    def handle(self, session: Session, request: HttpRequest) -> Answer:
        head = request.head
        who = self.admission.caller(session, head, lambda: sealed_response(self.why(True)))
        if isinstance(who, Response):
            return who
        act = self._acts.get(head.path, {}).get(head.method)
        return sealed_response(self.why(not who.via)) if act is None else act(who, request)

    def commit(self) -> bool:
        """There are no lines to write."""
        scrub()
        if self.meters is not None:
            self.meters.end_turn()
        return True

    # --- the calls that are served -----------------------------------------------------------------------------------

    def _status(self, who: Principal, request: HttpRequest) -> Answer:
        require(who, api.STATUS)
        status = self.status()
        if who.via:
            status = reduced(status)
        elif who.scope is not None and who.scope.everywhere("monitor") is None:
            status = without_policy_error(status)
        return json_answer(status)

    def _unseal_status(self, who: Principal, request: HttpRequest) -> Answer:
        require(who, api.UNSEAL_STATUS)
        return json_answer(self.unsealing.status())

    def _seal(self, who: Principal, request: HttpRequest) -> Answer:
        require(who, api.SEAL)
        return self.seal(who)

    def _report_audit_position(self, who: Principal, request: HttpRequest) -> Answer:
        require(who, api.REPORT_AUDIT_POSITION)
        return self.report_audit_position(strictjson.decode(_decode_report, request.body))

    def _unseal(self, who: Principal, request: HttpRequest) -> Answer:
        require(who, api.UNSEAL)
        require_short_body(request)
        with contextlib.ExitStack() as undo:
            root = take_key(request.body, self.arena, "root_hex", last=False)
            if root is not None:
                undo.callback(root.release)
            share = take_text(request.body, self.arena, "share", api.SHARE_BYTES_MAX)
            if share is not None:
                undo.callback(share.release)
            _check_one(strictjson.decode(_decode_unseal, request.body))
            undo.pop_all()
        return self._unseal_and_release(who, share if root is None else root)

    async def _unseal_and_release(self, who: Principal, secret: SecretSlot | SecretText | None) -> Reply:
        try:
            return await self.unsealing.unseal(who, secret)
        finally:
            if secret is not None:
                secret.release()


def _check_one(request: api.UnsealRequest) -> None:
    count = sum(value is not UNSET for value in (request.root_hex, request.share, request.from_source))
    if count != 1 or request.from_source is False:
        raise InvalidRequestError("give exactly one of root_hex, share, and from_source, which is true")
