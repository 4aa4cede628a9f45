"""The replacement of `Unlocking` where the root key has another source: nobody is asked, and no lease ends."""

from __future__ import annotations

from minikms.http import Application
from minikms.seal_files import SEALED_TEXT
from minikms_daemon.server.admission import Session


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
