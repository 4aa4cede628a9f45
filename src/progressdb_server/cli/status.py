"""`progressdb status`: the server and its key service on one page.

Owns: what is asked of whom, and the page. Invariant: exit status 0 only when both answer and can work.
"""

from __future__ import annotations

import json
from typing import Any, Final

from minikms.client import Client, KmsError
from progressdb_server.cli.admin_client import Administrator, ServerAwayError, ServerRefusedError
from progressdb_server.config import Config

KMS_WAIT_S: Final = 0.5


def status(config: Config, *, as_json: bool) -> int:
    """Prints it. 0: both are well, 1: one can't work or refuses, 2: the server does not answer."""
    administrator = Administrator(config)
    told: dict[str, Any] = {"server": {"url": administrator.url}, "key_service": {"socket": str(config.kms_socket)}}
    exit_status = 0
    try:
        told["server"] |= administrator.call("GET", "/healthz")
        told["server"] |= administrator.call("GET", "/admin/stats")
    except ServerAwayError as error:
        told["server"] |= {"status": "away", "error": str(error)}
        exit_status = 2
    except ServerRefusedError as error:
        told["server"]["error"] = str(error)
        exit_status = 1
    if config.kms.provider == "local":
        told["key_service"] |= {"status": "ok", "local": True}
    else:
        exit_status = max(exit_status, _ask_key_service(config, told["key_service"]))
    if as_json:
        print(json.dumps(told, indent=2))
    else:
        _print(told)
    return exit_status


def _ask_key_service(config: Config, told: dict[str, Any]) -> int:
    try:
        with Client(config.kms_socket, server_uids=config.kms.server_uids or None, wait_s=KMS_WAIT_S) as kms:
            answer: dict[str, Any] = kms.status()
    except (KmsError, ValueError) as error:
        told |= {"status": "away", "error": str(error)}
        return 1
    wanted = ("status", "pid", "uptime_seconds", "epoch", "keyring_id", "keys", "warnings")
    told |= {name: answer[name] for name in wanted if name in answer}
    return 0 if answer.get("status") == "ok" else 1


def _print(told: dict[str, Any]) -> None:
    server, kms = told["server"], told["key_service"]
    print(f"server       {server.get('status', 'refuses')}: {server['url']}")
    if "threads" in server:
        print(f"  holds      {server['threads']:,} threads, {server['messages']:,} messages")
    if "error" in server:
        print(f"  error      {server['error']}")
    print(f"key service  {kms['status']}: {kms['socket']}")
    if "epoch" in kms:
        counts = ", ".join(f"{count:,} {state}" for state, count in kms["keys"]["by_state"].items()) or "none"
        print(f"  keys       {counts}; epoch {kms['epoch']}, keyring {kms['keyring_id']}")
    if "error" in kms:
        print(f"  error      {kms['error']}")
    for warning in kms.get("warnings", ()):
        print(f"  warning    {warning}")
