"""What both clients have in common: their arguments, the choice of the endpoint, and their limits.

It must never import asyncio, or ssl for a client of a socket.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any, Final

from minikms.api import Verb
from minikms.client.addresses import Addresses, Rounds, split
from minikms.client.calls import Attempts
from minikms.client.connecting import SocketEndpoint

POOL_CONNECTIONS_MAX: Final = 16
"""The connections of one client, beside the two that carry batches and those of calls that make keys."""
CREATING_CONNECTIONS_MAX: Final = 48
"""The connections of one AsyncClient for calls that make keys. The service syncs new keys in groups, which are small if
few calls are under way. The connections close once idle.
"""
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
        each = split(address)
        self._proxied = isinstance(each[0], str) and "://" in each[0]
        if self._proxied:
            if server_uids is not None:
                raise ValueError("`server_uids` is for a socket: a gateway is known by its certificate")
            from minikms.client.tls import TlsEndpoint

            files: dict[str, Any] = {"ca": ca, "cert": cert, "key": key, "token_file": token_file}
            self._addresses = Addresses(
                [TlsEndpoint(str(url), **files, long_lived_cert=long_lived_cert) for url in each]
            )
        elif ca or cert or key or token_file or long_lived_cert:
            raise ValueError("`ca`, `cert`, `key`, `token_file` and `long_lived_cert` are for a URL, not for a socket")
        else:
            self._addresses = Addresses([SocketEndpoint(path, server_uids) for path in each])
        self._several = len(each) > 1
        self._start()

    def _start(self) -> None:
        """Begins without connections."""

    def _attempts(self, verb: Verb[Any, Any], timeout_s: float, now_s: float) -> Attempts:
        wait_s, full_s = self._wait_s, self._timeout_s
        if self._several:
            return Rounds(self._addresses, now_s, timeout_s, repeatable=verb.repeatable, wait_s=wait_s, full_s=full_s)
        first = self._addresses.first
        return Attempts(first, now_s, timeout_s, repeatable=verb.repeatable, wait_s=wait_s, full_s=full_s)

    @property
    def addresses(self) -> Sequence[str]:
        """All, in the order in which they were given."""
        return [endpoint.address for endpoint in self._addresses.endpoints]

    @property
    def address(self) -> str:
        """The address at which the next call begins: the one that served last, once one has."""
        return self._addresses.first.address

    @property
    def warnings(self) -> Sequence[str]:
        """What an operator should change about certificate, key, token and untrusted servers; known after a call."""
        return self._addresses.warnings
