"""The provider that the server uses: miniKMS over its socket.

Invariants: no raw key is ever in this process; a request that arrives while miniKMS is away waits `WAIT_S` for it to
return, and one that miniKMS does not answer waits `TIMEOUT_S`; then it fails.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Final

from minikms.client import AsyncClient
from progressdb_server.kms.bridge import ClientProvider
from progressdb_server.kms.metrics import KmsMetrics
from progressdb_server.kms.provider import ProviderError

WAIT_S: Final = 5.0
TIMEOUT_S: Final = 8.0
"""Below the 10 s after which many HTTP clients give up by themselves, so that they still read the 503."""


class RemoteProvider(ClientProvider):
    """The provider of the daemon at `socket_path`; `server_uids` may serve it (default: this process's own and
    root)."""

    def __init__(self, socket_path: str | os.PathLike[str], *, server_uids: Collection[int] | None = None) -> None:
        self.metrics = KmsMetrics()
        super().__init__(
            AsyncClient(
                socket_path,
                server_uids=server_uids,
                timeout_s=TIMEOUT_S,
                wait_s=WAIT_S,
                on_exchange=self.metrics.exchanged,
            )
        )

    async def status(self) -> dict[str, object]:
        try:
            status = await super().status()
        except ProviderError:
            self.metrics.lost()
            raise
        self.metrics.seen(status)
        return status
