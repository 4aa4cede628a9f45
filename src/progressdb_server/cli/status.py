"""`progressdb status`: the server and its key service on one page.

Owns: the questions to both, and the page. Invariant: the exit status is 0 only if both respond and can work.
"""

from __future__ import annotations

import json as encoder
from typing import Any, Final

from minikms.client import Client, KmsError
from progressdb_server.cli.admin_client import AdminClient, AdminError, UnreachableError
from progressdb_server.cli.flags import Addr, ConfigFile, Db, Json, load_config
from progressdb_server.config import Config

KMS_WAIT_S: Final = 0.5


def status(*, addr: Addr = None, db: Db = None, config: ConfigFile = None, json: Json = False) -> int:
    """Show the server and its key service on one page. The configuration must be the one of the server.

    Exit status: 0 both work, 1 one cannot do its work, 2 the server does not answer.
    """
    chosen = load_config(addr=addr, db=db, config=config).config
    client = AdminClient.from_config(chosen)
    page: dict[str, Any] = {"server": {"url": client.url}, "key_service": {"socket": str(chosen.kms_socket)}}
    exit_status = 0
    try:
        page["server"] |= client.call("GET", "/healthz")
        page["server"] |= client.call("GET", "/admin/stats")
    except UnreachableError as error:
        page["server"] |= {"status": "away", "error": str(error)}
        exit_status = 2
    except AdminError as error:
        page["server"]["error"] = str(error)
        exit_status = 1
    if chosen.kms.provider == "local":
        page["key_service"] |= {"status": "ok", "local": True}
    else:
        exit_status = max(exit_status, _ask_key_service(chosen, page["key_service"]))
    if json:
        print(encoder.dumps(page, indent=2))
    else:
        _print(page)
    return exit_status


def _ask_key_service(config: Config, section: dict[str, Any]) -> int:
    """Fill in the section of the key service. Returns the exit status that it gives."""
    try:
        with Client(config.kms_socket, server_uids=config.kms.server_uids or None, wait_s=KMS_WAIT_S) as kms:
            answer: dict[str, Any] = kms.status()
    except (KmsError, ValueError) as error:
        section |= {"status": "away", "error": str(error)}
        return 1
    wanted = ("status", "pid", "uptime_seconds", "epoch", "keyring_id", "keys", "warnings")
    section |= {name: answer[name] for name in wanted if name in answer}
    return 0 if answer.get("status") == "ok" else 1


def _print(page: dict[str, Any]) -> None:
    server, kms = page["server"], page["key_service"]
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
