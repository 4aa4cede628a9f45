"""What clients ask of the server and of their token: health, seal status, lookup-self, a login.

Owns: these answers. Invariant: no token is made: a login answers the token that it was shown, until the time that the
token itself names. It must never say more of a caller than its own name and times.
"""

from __future__ import annotations

import time
from typing import Any, Final

import msgspec

import minikms
from minikms.api.errors import SealedError
from minikms.http import Response
from minikms_gateway.transit.keyring import TransitCaller
from minikms_gateway.transit.wire import Short, TransitBody, VaultError, envelope

LOGIN_BYTES_MAX: Final = 16 * 1024
"""The size of the body of a login, which arrives before anybody is known: twice the longest token."""


class Login(TransitBody):
    jwt: str | None = None
    role: Short | None = None


async def health(caller: TransitCaller, _name: str, _body: TransitBody) -> bytes | Response:
    sealed = await _sealed(caller)
    data = {
        "initialized": True,
        "sealed": sealed,
        "standby": False,
        "performance_standby": False,
        "replication_performance_mode": "disabled",
        "replication_dr_mode": "disabled",
        "server_time_utc": int(time.time()),
        "version": minikms.__version__,
    }
    return Response(503 if sealed else 200, msgspec.json.encode(data))


async def seal_status(caller: TransitCaller, _name: str, _body: TransitBody) -> bytes:
    sealed = await _sealed(caller)
    return msgspec.json.encode(
        {
            "type": "minikms",
            "initialized": True,
            "sealed": sealed,
            "t": 1,
            "n": 1,
            "progress": 0,
            "nonce": "",
            "version": minikms.__version__,
            "migration": False,
            "recovery_seal": False,
            "storage_type": "minikms",
        }
    )


async def _sealed(caller: TransitCaller) -> bool:
    try:
        await caller.ready()
    except SealedError:
        return True
    return False


async def lookup_self(caller: TransitCaller, _name: str, _body: TransitBody) -> bytes:
    issued_at, until = caller.lifetime()
    data: dict[str, Any] = {
        "accessor": "",
        "creation_time": int(issued_at),
        "creation_ttl": max(0, int(until - issued_at)),
        "display_name": caller.who,
        "entity_id": "",
        "explicit_max_ttl": 0,
        "id": "",
        "meta": None,
        "num_uses": 0,
        "orphan": True,
        "path": "auth/jwt/login",
        "policies": ["default"],
        "renewable": False,
        "ttl": max(0, int(until - time.time())),
        "type": "batch",
    }
    return envelope(data)


async def login(caller: TransitCaller, _name: str, body: Login) -> bytes:
    """The gateway has verified the token already: it is the credential of this request."""
    _, until = caller.lifetime()
    auth: dict[str, Any] = {
        "client_token": body.jwt,
        "accessor": "",
        "policies": ["default"],
        "token_policies": ["default"],
        "metadata": {"role": body.role or ""},
        "lease_duration": max(0, int(until - time.time())),
        "renewable": False,
        "entity_id": "",
        "token_type": "batch",
        "orphan": True,
    }
    return envelope(None, auth=auth)


async def renew_self(_caller: TransitCaller, _name: str, _body: TransitBody) -> bytes:
    raise VaultError("lease is not renewable")
