"""The replacement of `Unlocking` where the root key has another source: nobody is asked, and no lease ends."""

from __future__ import annotations

from typing import Final

from minikms.http import Application
from minikms_daemon.server.admission import Session

SEALED_TEXT: Final = (
    "the key service is sealed: it has no key until an operator unseals it with `minikms unseal`, and then it goes on "
    "by itself"
)


class NoUnlocking:
    """Has the methods of `Unlocking`."""

    asks = False

    def wait(self) -> None:
        return

    def served(self, asked_ns: int) -> None:
        return

    def stop(self) -> None:
        return

    def stop_waiting(self) -> None:
        return

    def leased(self, app: Application[Session]) -> Application[Session]:
        return app

    def why_sealed(self, whole: bool) -> str:
        return SEALED_TEXT

    def status(self) -> None:
        return
