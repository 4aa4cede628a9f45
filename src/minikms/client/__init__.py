"""The client libraries of miniKMS: `AsyncClient` for asyncio, `Client` for everything else.

Owns: how a program talks to the daemon. Each client has one method for each verb; `calls` encodes and decodes from the
entries of `minikms.api`, which is all of the key service that the room knows. `AsyncClient` loads when it is first
asked for, because asyncio would lengthen the start of each command by a sixth. Invariants: nothing is sent before the
server's uid was checked; every wait and every size is bounded; a request is repeated only if that is harmless. A client
must never answer with a default after a failure.
"""

from typing import TYPE_CHECKING

from minikms.api.errors import KmsError, KmsRefusedError
from minikms.client.items import DecryptItem, EncryptItem, MacItem, ReencryptItem
from minikms.client.synchronous import Client

if TYPE_CHECKING:
    from minikms.client.asynchronous import AsyncClient

__all__ = [
    "AsyncClient",
    "Client",
    "DecryptItem",
    "EncryptItem",
    "KmsError",
    "KmsRefusedError",
    "MacItem",
    "ReencryptItem",
]


def __getattr__(name: str) -> object:
    if name == "AsyncClient":
        from minikms.client.asynchronous import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
