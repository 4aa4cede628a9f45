"""`minikms status`: what the running daemon says of itself.

Owns: the pages for a person, and `--watch`. Invariants: everything shown was answered by the daemon; exit status 1
when the daemon can't do its work. It must never interpret a missing figure as a good one.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Final

from cyclopts import Parameter, validators

from minikms.cli import console
from minikms.cli.console import EXIT_GOOD, EXIT_WANTING, Json, ServerUid, Socket, daemon_client

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

INTERVAL_SECONDS: Final = 2.0
Status = dict[str, Any]


def status(
    *,
    socket: Socket = None,
    server_uid: ServerUid = None,
    watch: Annotated[
        bool, Parameter(name=("--watch", "-w"), help="Go on until interrupted.", negative=(), show_default=False)
    ] = False,
    interval: Annotated[
        float, Parameter(help="Seconds between two looks.", validator=validators.Number(gte=0.1))
    ] = INTERVAL_SECONDS,
    json: Json = False,
) -> int:
    """Show what the running daemon says of itself. Exit status: 0 well, 1 it can't work, 2 it does not answer."""
    with daemon_client(socket, server_uid) as kms:
        told: Status = kms.status()
        if watch and not json and sys.stdout.isatty():
            return _watch(kms.status, told, interval)
        while True:
            if json:
                console.print_json(told)
            else:
                console.console().print(page(told), soft_wrap=True)
            if not watch:
                return EXIT_GOOD if told["status"] == "ok" else EXIT_WANTING
            sys.stdout.flush()
            time.sleep(interval)
            told = kms.status()


def _watch(ask: Any, told: Status, interval: float) -> int:
    from rich.live import Live

    with Live(page(told), console=console.console(), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(page(ask()), refresh=True)


def page(told: Status) -> Group:
    """The whole page."""
    from rich.console import Group
    from rich.text import Text

    well = told["status"] == "ok"
    lines = [
        Text(
            f"{'well' if well else told['status']}: process {told['pid']}, uid {told['uid']}, "
            f"up {console.duration(told['uptime_seconds'])}, epoch {told['epoch']}",
            style="green" if well else "bold red",
        )
    ]
    facts = [
        ("keyring", told["keyring_id"]),
        ("root key", _root(told)),
        ("KEK", ", ".join(f"version {kek['version']} {kek['state']}" for kek in told["keks"] if _is_live(kek))),
        ("rotation", _rotation(told["rotation"])),
        ("keys", _keys(told["keys"])),
        ("audit", _audit(told["audit"])),
        ("memory", _memory(told["memory"])),
        ("hardening", _hardening(told["hardening"])),
        ("requests", f"{told['http']['requests']:,}, {told['http']['connections']} connections"),
    ]
    lines += [Text(f"  {name:<10} {console.clean(value)}") for name, value in facts if value]
    lines += [_warning(f"not in force: {m['measure']}: {m['why']}") for m in told["hardening"] if not m["in_force"]]
    lines += [_warning(f"warning: {text}") for text in told["warnings"]]
    return Group(*lines)


def _warning(text: str) -> Text:
    from rich.text import Text

    return Text("  " + console.clean(text), style="yellow")


def _is_live(kek: Status) -> bool:
    return bool(kek["state"] != "destroyed")


def _root(told: Status) -> str:
    root = told["root"]
    others = [fingerprint for fingerprint in root["slots"] if fingerprint != root["fingerprint"]]
    return f"{root['fingerprint']} ({root['provider']})" + (f"; also opens: {', '.join(others)}" if others else "")


def _rotation(rotation: Status | None) -> str:
    if rotation is None:
        return ""
    total = "?" if rotation["total"] is None else f"{rotation['total']:,}"
    failing = f"; last error: {rotation['last_error']}" if rotation["last_error"] else ""
    versions = f"KEK {rotation['from_version']} to {rotation['to_version']}"
    return f"{versions}, {rotation['rewrapped']:,} of {total} keys{failing}"


def _keys(keys: Status) -> str:
    counts = [f"{count:,} {state}" for state, count in keys["by_state"].items()] or ["none"]
    if keys["destroyed"]:
        counts.append(f"{keys['destroyed']:,} destroyed")
    if keys["unreadable"]:
        counts.append(f"{keys['unreadable']:,} UNREADABLE")
    return ", ".join(counts) + (" (still counting)" if keys["indexing"] else "")


def _audit(audit: Status) -> str:
    head = audit["head"]
    state = "" if audit["writable"] else f"; CAN'T BE WRITTEN: {audit['unavailable_reason']}"
    return f"line {head['seq']:,}, head {head['seq']}:{head['sig']}{state}"


def _memory(memory: Status) -> str:
    locked = console.byte_count(memory["locked_bytes"])
    return f"{memory['keys_in_memory']:,} keys open, {locked} locked ({memory['arena']})"


def _hardening(measures: list[Status]) -> str:
    return ", ".join(measure["measure"] for measure in measures if measure["in_force"])
