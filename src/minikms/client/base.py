"""What both clients have in common: their arguments, the choice of the endpoint, and their limits.

It must never import asyncio, or ssl for a client of a socket.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any, Final

from minikms.api import Verb
from minikms.client.calls import Attempts
from minikms.client.connecting import Endpoint, SocketEndpoint

POOL_CONNECTIONS_MAX: Final = 16
"""Of one client, beside the two connections that carry batches."""
TIMEOUT_S: Final = 10.0
WAIT_S: Final = 2.0
ROTATE_TIMEOUT_S: Final = 3600.0


class BaseClient:
    """What both clients are made of; `AsyncClient` describes the arguments. Raises ValueError for arguments that do not
    fit together.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        server_uids: Collection[int] | None = None,
        ca: str | os.PathLike[str] | None = None,
        cert: str | os.PathLike[str] | None = None,
        key: str | os.PathLike[str] | None = None,
        token_file: str | os.PathLike[str] | None = None,
        long_lived_cert: bool = False,
        timeout_s: float = TIMEOUT_S,
        wait_s: float = WAIT_S,
    ) -> None:
        self._timeout_s = timeout_s
        self._wait_s = wait_s
        self._endpoint: Endpoint
        if isinstance(address, str) and "://" in address:
            if server_uids is not None:
                raise ValueError("`server_uids` is for a socket: a gateway is known by its certificate")
            from minikms.client.tls import TlsEndpoint

            self._endpoint = TlsEndpoint(
                address, ca=ca, cert=cert, key=key, token_file=token_file, long_lived_cert=long_lived_cert
            )
        elif ca or cert or key or token_file or long_lived_cert:
            raise ValueError("`ca`, `cert`, `key`, `token_file` and `long_lived_cert` are for a URL, not for a socket")
        else:
            self._endpoint = SocketEndpoint(address, server_uids)
        self._start()

    def _start(self) -> None:
        """Begins without connections."""

    def _attempts(self, verb: Verb[Any, Any], now_s: float) -> Attempts:
        until_s, full_until_s = now_s + self._wait_s, now_s + self._timeout_s
        return Attempts(repeatable=verb.repeatable, until_s=until_s, full_until_s=full_until_s)

    @property
    def warnings(self) -> Sequence[str]:
        """What an operator should change about the client's certificate, key and token; known after a call."""
        return self._endpoint.warnings
