"""The client libraries of miniKMS: `AsyncClient` for asyncio, `Client` for everything else.

Owns: how a program talks to the daemon. Each client has one method for each verb; `calls` encodes and decodes from the
entries of `minikms.api`, which is all of the key service that the room knows. Invariants: nothing is sent before the
server's uid was checked; every wait and every size is bounded; a request is repeated only if that is harmless. A client
must never answer with a default after a failure.
"""

from minikms.client import errors
from minikms.client.asynchronous import AsyncClient
from minikms.client.errors import KmsError, KmsRefusedError
from minikms.client.items import DecryptItem, EncryptItem, ReencryptItem
from minikms.client.synchronous import Client

__all__ = [
    "AsyncClient",
    "Client",
    "DecryptItem",
    "EncryptItem",
    "KmsError",
    "KmsRefusedError",
    "ReencryptItem",
    "errors",
]
