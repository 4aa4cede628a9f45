"""`progressdb status`: the server and its key service on one page.

Owns: the questions to both, and the page. Invariant: the exit status is 0 only if both respond and can work: the server
takes writes, it reaches its key service, and the key service reports no fault.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from minikms import api
from minikms.api import Condition
from minikms.api.errors import KmsError
from minikms.client import Client
from minikms.commands.output import condition_lines, counted, print_result
from minikms.commands.usage import INTERVAL_SECONDS, Interval, Watch, found_serving, found_socket
from minikms.conditions import FAILING, reported
from progressdb_server.cli.admin_client import AdminClient, AdminError, UnreachableError
from progressdb_server.cli.flags import ConfiguredUrl, Json, StoreFlags
from progressdb_server.config import Config

KMS_WAIT_S: Final = 0.5
KMS_TIMEOUT_S: Final = 3.0
"""A key service that hangs must not make this command hang."""


_NOT_WORKING: Final = {"writes": "it takes no writes", "key_service": "its key service does not work"}


def status(
    *,
    url: ConfiguredUrl = None,
    flags: StoreFlags = StoreFlags(),
    watch: Watch = False,
    interval: Interval = INTERVAL_SECONDS,
    json: Json = False,
) -> int:
    """Show the server and its key service on one page. The configuration must be the one of the server.

    Without a configuration the server's directory is `data` if that is there, else that of the package. With --url the
    key service is looked for where `minikms` does.

    Exit status: 0 both work, 1 one cannot do its work, 2 the server does not answer.
    """
    config = flags.load_for_server(url)
    if not _knows_key_service(config) and (found := found_socket(None)):
        config = replace(config, kms=replace(config.kms, socket=found))
    while True:
        page, exit_status = _ask(config, url)
        if watch and not json and sys.stdout.isatty():
            print("\x1b[H\x1b[2J", end="")  # the next page takes the place of the one before
        print_result(page, _lines(page), json=json)
        if not watch:
            return exit_status
        sys.stdout.flush()
        time.sleep(interval)


def _ask(config: Config, url: str | None) -> tuple[dict[str, Any], int]:
    """The page, and the exit status that it gives."""
    client = AdminClient.from_config(config, url)
    place = {"url": config.kms.url} if config.kms.url else {"socket": str(config.kms_socket)}
    page: dict[str, Any] = {"server": {"url": client.url}, "key_service": place}
    exit_status = 0
    try:
        page["server"] |= client.call("GET", "/healthz")
        exit_status = _ask_readiness(client, page["server"])
        page["server"] |= client.call("GET", "/admin/stats")
    except UnreachableError as error:
        page["server"] |= {"status": "away", "error": str(error)}
        exit_status = 2
    except AdminError as error:
        page["server"]["error"] = str(error)
        exit_status = 1
    if not _knows_key_service(config):
        del page["key_service"]["socket"]
        page["key_service"]["status"] = "not asked: give --db or MINIKMS_SOCKET"
    elif config.kms.provider == "local":
        page["key_service"] |= {"status": "ok", "local": True}
    else:
        exit_status = max(exit_status, _ask_key_service(config, page["key_service"]))
    return page, exit_status


def _knows_key_service(config: Config) -> bool:
    return bool(config.kms.url or config.kms.socket or config.storage.db_path)


def _ask_readiness(client: AdminClient, section: dict[str, Any]) -> int:
    """Fill in what the server can't do now. Returns the exit status that it gives. Raises AdminError."""
    answer = client.call("GET", "/admin/readiness")
    wrong = [f"{what}: {answer[member]}" for member, what in _NOT_WORKING.items() if answer[member]]
    section["conditions"] = answer.get("conditions", [])
    if answer["notices"]:
        section["notices"] = answer["notices"]
    if wrong or answer["damage"]:
        section |= {
            "status": "not ready" if wrong else "damaged",
            "problems": [*wrong, *filter(None, [answer["damage"]])],
        }
    return 1 if wrong else 0


def _ask_key_service(config: Config, section: dict[str, Any]) -> int:
    """Fill in the section of the key service. Returns the exit status that it gives."""
    section["exclusive"] = config.kms_is_exclusive
    try:
        with Client(**config.kms_client, timeout_s=KMS_TIMEOUT_S, wait_s=KMS_WAIT_S) as kms:
            if (serving := found_serving(kms)) is not None:
                section["serving"] = serving
            answer = kms.status()
    except (KmsError, ValueError) as error:
        section |= {"status": "away", "error": str(error)}
        return 1
    wanted = ["status", "uptime_seconds"] if config.kms.url else ["status", "pid", "uptime_seconds", "warnings"]
    if answer.status != api.CODE_SEALED:  # it knows neither keys nor epoch
        wanted += ["epoch", "keyring_id"] if config.kms.url else ["epoch", "keyring_id", "keys"]
    section |= {name: msgspec.to_builtins(getattr(answer, name)) for name in wanted}
    conditions = reported(answer)
    section["conditions"] = msgspec.to_builtins(conditions)
    if kms.warnings:
        section["warnings"] = [*section.get("warnings", ()), *kms.warnings]
    failing = any(condition.severity == FAILING for condition in conditions)
    return 1 if failing or answer.status != "ok" else 0


def _lines(page: dict[str, Any]) -> Iterator[str]:
    server, kms = page["server"], page["key_service"]
    yield f"server       {server.get('status', 'refuses')}: {server['url']}"
    if "threads" in server:
        yield f"  holds      {counted(server['threads'], 'thread')}, {counted(server['messages'], 'message')}"
    conditions = conditions_of(server)
    yield from (f"  {line}" for line in condition_lines(conditions))
    if "error" in server:
        yield f"  error      {server['error']}"
    place = kms.get("serving") or kms.get("url") or kms.get("socket")
    yield f"key service  {kms['status']}" + (f": {place}" if place else "")
    if "epoch" in kms:
        counts = "not shown"  # a gateway does not tell
        if "keys" in kms:
            counts = ", ".join(f"{count:,} {state}" for state, count in kms["keys"]["by_state"].items()) or "none"
        yield f"  keys       {counts}; epoch {kms['epoch']}, keyring {kms['keyring_id']}"
    if "error" in kms:
        yield f"  error      {kms['error']}"
    own = [condition for condition in conditions_of(kms) if condition not in conditions]
    yield from (f"  {line}" for line in condition_lines(own))


def conditions_of(section: dict[str, Any]) -> list[Condition]:
    """What the server or the key service says to be wrong, as a section of the page keeps it."""
    return msgspec.convert(section.get("conditions", []), list[Condition])
