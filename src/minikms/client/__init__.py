"""The client libraries of miniKMS: `AsyncClient` for asyncio, `Client` for everything else.

Owns: how a program talks to the daemon. Invariants: only the wire contract `minikms.api` is known here; nothing is
sent before the server's uid was checked; every wait and every size is bounded; only what is harmless is repeated. It
must never answer with a default after a failure.
"""

from minikms.client import errors
from minikms.client.asynchronous import AsyncClient
from minikms.client.errors import KmsError, KmsRefusedError
from minikms.client.synchronous import Client
from minikms.client.verbs import DecryptItem, EncryptItem, ReencryptItem

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
