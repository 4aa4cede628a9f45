"""miniKMS: a local, hardened key service. Start reading at `minikms.service`.

`minikms.Client` and `minikms.AsyncClient` are the libraries; they load when they are first asked for, so that the
daemon never imports them and the command starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minikms.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from minikms import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
