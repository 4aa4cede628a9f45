"""`minikms status` and `minikms ready`: the state of the running daemon.

Owns: the page for a person, and `--watch`; the probe for a program. Invariants: everything shown comes from the
daemon's answer; exit status 1 when the daemon can't do its work; a probe prints nothing when the answer is yes, and
needs no role. It must never interpret a missing figure as a good one.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from minikms.api.printable import clean
from minikms.cli.console import Json, ServerUid, Socket, complain, daemon_client
from minikms.commands.output import byte_count, condition_lines, duration, print_json, terminal
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, INTERVAL_SECONDS, Interval, Watch, found_serving
from minikms.conditions import FAILING, reported

if TYPE_CHECKING:
    from rich.console import Group

    from minikms import api

ANSWER_SECONDS: Final = 3.0
"""A daemon that works answers at once."""


def status(
    *,
    socket: Socket = None,
    server_uid: ServerUid = None,
    watch: Watch = False,
    interval: Interval = INTERVAL_SECONDS,
    json: Json = False,
) -> int:
    """Show the state of the running daemon. Exit status: 0 it works, 1 it can't work, 2 it does not answer."""
    with daemon_client(socket, server_uid, timeout_s=ANSWER_SECONDS) as kms:
        while True:
            if (serving := found_serving(kms)) is not None:
                complain(f"this is the status of {serving}")
            answer = kms.status()
            if watch and not json and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")  # the next page takes the place of the one before
            if json:
                print_json(answer)
            else:
                terminal().print(page(answer), soft_wrap=True)
                for text in kms.warnings:
                    complain(text)
            if not watch:
                failing = any(condition.severity == FAILING for condition in reported(answer))
                return EXIT_FAILED if failing or answer.status != "ok" else EXIT_GOOD
            sys.stdout.flush()
            time.sleep(interval)


def ready(
    *,
    socket: Socket = None,
    server_uid: ServerUid = None,
    live: Annotated[
        bool, Parameter(help="Ask only whether it answers, as a sealed one does.", show_default=False)
    ] = False,
    json: Json = False,
) -> int:
    """Check that the running daemon serves, as the probe of a container does.

    It needs no role: the users of the daemon may ask, and the daemon's own user. With --live every user may.
    Exit status: 0 yes, 1 it is sealed, can't write its audit log, or waits for its auditor, 2 it does not answer.
    """
    with daemon_client(socket, server_uid, timeout_s=ANSWER_SECONDS) as kms:
        if live:
            kms.health()
        else:
            kms.ready()
    if json:
        print_json({"status": "ok"})
    return EXIT_GOOD


def page(answer: api.StatusAnswer) -> Group:
    from rich.console import Group
    from rich.text import Text

    well, sealed = answer.status == "ok", answer.status == "sealed"
    why = f"{answer.status} ({answer.reason})" if answer.reason else answer.status
    process = f"process {answer.pid}, uid {answer.uid}, " if answer.pid else ""
    lines = [
        Text(
            f"{'ok' if well else clean(why)}: {process}up {duration(answer.uptime_seconds)}"
            + ("" if sealed else f", epoch {answer.epoch}"),
            style="green" if well else "bold red",
        )
    ]
    if not answer.pid:  # a gateway tells no more
        lines.append(Text(f"  {'keyring':<10} {clean(answer.keyring_id)}"))
        return Group(*lines, *(Text("  " + clean(line)) for line in condition_lines(reported(answer))))
    unlocked = [
        ("keyring", answer.keyring_id),
        ("root key", _root(answer)),
        ("KEK", ", ".join(f"version {kek.version} {kek.state}" for kek in answer.keks if kek.state != "destroyed")),
        ("rotation", _rotation(answer.rotation)),
        ("keys", _keys(answer.keys)),
        ("audit", _audit(answer.audit)),
        ("auditor", _auditor(answer.audit.position)),
    ]
    facts = [
        *([] if sealed else unlocked),  # a sealed daemon knows none of them
        ("memory", _memory(answer.memory)),
        ("hardening", ", ".join(one.measure for one in answer.hardening if one.in_force)),
        ("policy", _policy(answer.policy)),
        ("replica", _replica(answer.replica)),
        ("requests", f"{answer.http.requests:,}, {answer.http.connections} connections"),
    ]
    lines += [Text(f"  {name:<10} {clean(value)}") for name, value in facts if value]
    lines += [Text("  " + clean(line), style="yellow") for line in condition_lines(reported(answer))]
    return Group(*lines)


def _root(answer: api.StatusAnswer) -> str:
    root = answer.root
    others = [fingerprint for fingerprint in root.slots if fingerprint != root.fingerprint]
    return f"{root.fingerprint} ({root.provider})" + (f"; also opens: {', '.join(others)}" if others else "")


def _rotation(rotation: api.RotationStatus | None) -> str:
    if rotation is None:
        return ""
    total = "?" if rotation.total is None else f"{rotation.total:,}"
    failing = f"; last error: {rotation.last_error}" if rotation.last_error else ""
    versions = f"KEK {rotation.from_version} to {rotation.to_version}"
    return f"{versions}, {rotation.rewrapped:,} of {total} keys{failing}"


def _keys(keys: api.KeysStatus) -> str:
    counts = [f"{count:,} {state}" for state, count in keys.by_state.items()] or ["none"]
    if keys.destroyed:
        counts.append(f"{keys.destroyed:,} destroyed")
    if keys.unreadable:
        counts.append(f"{keys.unreadable:,} UNREADABLE")
    return ", ".join(counts) + (" (still counting)" if keys.indexing else "")


def _audit(audit: api.AuditStatus) -> str:
    head = audit.head
    state = "" if audit.writable else f"; CAN'T BE WRITTEN: {audit.unavailable_reason}"
    return f"line {head.seq:,}, head {head.seq}:{head.sig}{state}"


def _auditor(position: api.PositionStatus | None) -> str:
    if position is None:
        return ""
    age = position.age_seconds
    reported = "no report since the start" if age is None else f"reported {duration(age)} ago"
    return f"{position.origin}: line {position.seq:,}, {position.lag_lines:,} behind, {reported}"


def _memory(memory: api.MemoryStatus) -> str:
    locked = byte_count(memory.locked_bytes)
    return f"{memory.keys_in_memory:,} keys open, {locked} locked ({memory.arena})"


def _policy(policy: api.PolicyStatus | None) -> str:
    if policy is None:
        return ""
    exhausted = f"; {policy.budgets_exhausted} budgets used up" if policy.budgets_exhausted else ""
    failing = "; THE LAST RELOAD FAILED" if policy.last_error else ""
    age = duration(policy.age_seconds)
    return f"generation {policy.generation}, read {age} ago, SHA-256 {policy.sha256}{exhausted}{failing}"


def _replica(replica: api.ReplicaStatus | None) -> str:
    if replica is None:
        return ""
    heard = (
        "no replicator" if replica.heard_seconds is None else f"replicator {duration(int(replica.heard_seconds))} ago"
    )
    lag = f", {replica.lag_changes:,} changes behind" if replica.lag_changes else ""
    serving = f"; {replica.serving} serves" if replica.serving not in ("", replica.member_id) else ""
    why = f": {replica.why}" if replica.why else ""
    at = f"{replica.member_id} {replica.mode}, term {replica.term}, change {replica.number:,}"
    return f"{at}{lag}, {heard}{serving}{why}"
