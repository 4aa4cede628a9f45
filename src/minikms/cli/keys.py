"""`minikms keys`: list, show, retire and destroy data-encryption keys, through the running daemon.

Owns: flags and output. Invariants: an action that can't be undone is confirmed, or `--yes` was given; who destroys
several keys types their number; the receipt of a destruction is shown whole, and each key without a receipt is
named with the reason. It must never touch the file of a key.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple

from cyclopts import App, Parameter, validators

from minikms import api
from minikms.api.printable import clean
from minikms.cli.console import (
    DAEMON_WAIT_SECONDS,
    DaemonFlags,
    Json,
    Yes,
    chosen_server_uids,
    chosen_socket,
    complain,
)
from minikms.commands.output import (
    Facts,
    confirm,
    print_json,
    print_result,
    print_table,
    progress_bar,
    terminal,
)
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, CommandError

if TYPE_CHECKING:
    from minikms.client import Client

SHOWN_COUNT: Final = 100
DESTROYED_AT_ONCE: Final = 32
"""Requests in flight, which share the waits for the disk."""
_AGE: Final = re.compile(r"([0-9]{1,6})([dhm])", re.ASCII)
_AGE_SECONDS: Final = {"d": 86_400, "h": 3_600, "m": 60}

app = App(name="keys", help="List, show, retire and destroy keys.", version_flags=[])
app.command("minikms.cli.receipt:show", name="receipt", help="Print the receipt of a destroyed key.")

KeyId = Annotated[str, Parameter(help="The key's id: k_…")]


@app.command(name="list")
def list_keys(
    *,
    thread: Annotated[str | None, Parameter(help="Only this thread's.")] = None,
    state: Annotated[Literal["active", "retired"] | None, Parameter(help="Only in this state.")] = None,
    limit: Annotated[
        int, Parameter(help="How many at most; 0: all.", validator=validators.Number(gte=0))
    ] = SHOWN_COUNT,
    daemon: DaemonFlags = DaemonFlags(),
    json: Json = False,
) -> None:
    """List keys, oldest first."""
    keys: list[api.KeyAnswer] = []
    more = indexing = False
    with daemon.client() as kms:
        for answer in _pages(kms, thread, state, limit):
            indexing = indexing or answer.indexing
            keys += answer.keys
            more = limit > 0 and (len(keys) > limit or (len(keys) == limit and answer.next_cursor is not None))
            if limit and len(keys) >= limit:
                break
    keys = keys[:limit] if limit else keys
    if json:
        print_json({"keys": keys, "complete": not (more or indexing)})
        return
    if keys:
        print_table(
            ("key", "thread", "purpose", "state", "KEK", "created"),
            ((key.key_id, key.thread_id, key.purpose, key.state, key.kek_version, key.created_at) for key in keys),
            right=("KEK",),
        )
    notes = terminal(errors=True)
    if not keys:
        notes.print("no keys")
    if more:
        notes.print(f"These are the first {len(keys)}; more with --limit N, all with --limit 0.", soft_wrap=True)
    if indexing:
        notes.print("The daemon has just started and is still reading files: some keys may be missing.", soft_wrap=True)


def _pages(kms: Client, thread: str | None, state: api.State | None, limit: int) -> Iterator[api.KeyListAnswer]:
    cursor: str | None = None
    size = min(limit or api.LIST_KEYS_COUNT_MAX, api.LIST_KEYS_COUNT_MAX)
    while True:
        answer = kms.list_keys(thread_id=thread, state=state, cursor=cursor, limit=size)
        yield answer
        cursor = answer.next_cursor
        if cursor is None:
            return


@app.command(name="show")
def show_key(key_id: KeyId, *, daemon: DaemonFlags = DaemonFlags(), json: Json = False) -> None:
    """Show the thread, state and KEK version of one key."""
    with daemon.client() as kms:
        _print_key(kms.get_key(key_id), json=json)


@app.command
def retire(key_id: KeyId, *, daemon: DaemonFlags = DaemonFlags(), yes: Yes = False, json: Json = False) -> None:
    """Retire a key: it only decrypts from then on. Data encrypted under it stays readable."""
    with daemon.client() as kms:
        before = kms.get_key(key_id)
        if before.state == "active":
            confirm(f"Retire {key_id} of thread {before.thread_id}? It will never encrypt again.", yes=yes)
        _print_key(kms.retire_key(key_id), json=json)


@app.command
def destroy(
    *key_ids: Annotated[str, Parameter(name="KEY-ID", help="The ids of retired keys: k_…")],
    thread: Annotated[str | None, Parameter(help="Instead of ids: the retired keys of this thread.")] = None,
    state: Annotated[
        Literal["retired"] | None, Parameter(help="Instead of ids: all retired keys; no others can be destroyed.")
    ] = None,
    older_than: Annotated[
        str | None, Parameter(help="Of those, the keys made before this time: 90d, 12h, 30m.")
    ] = None,
    daemon: DaemonFlags = DaemonFlags(),
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Destroy retired keys permanently. Data encrypted under them can never be decrypted again. Keep the receipts.

    miniKMS does not know which backups of a message server's store need a key: see `progressdb backup list` first.

    With several keys, one that can't be destroyed does not stop the others: it is named with the reason, and the exit
    status is 1.
    """
    by_filter = thread is not None or state is not None or older_than is not None
    if bool(key_ids) == by_filter:
        raise CommandError("name the keys, or choose them with --thread, --state or --older-than")
    if len(key_ids) == 1:
        _destroy_one(key_ids[0], daemon, yes=yes, json=json)
        return EXIT_GOOD
    keys = list(dict.fromkeys(key_ids))
    made_before = None if older_than is None else time.time() - _age_seconds(older_than)
    with daemon.client() as kms:
        if by_filter:
            keys = _retired_keys(kms, thread, made_before)
            if not keys and thread is not None and older_than is None:
                _refuse_active(kms, thread)
        else:
            kms.health()  # ends the command if the daemon is away or is another user's, before anything is destroyed
    if keys:
        confirm(
            f"Destroy {len(keys):,} retired keys? What they encrypted can never be read again.",
            number=len(keys),
            yes=yes,
        )
    outcome = _Outcome([], [], [])
    try:
        _destroy_all(keys, outcome, daemon, bar=not json)
    finally:
        _print_outcome(outcome, json=json)
    return EXIT_FAILED if outcome.failed or outcome.not_tried else EXIT_GOOD


def _destroy_one(key_id: str, daemon: DaemonFlags, *, yes: bool, json: bool) -> None:
    with daemon.client() as kms:
        if not yes:
            key = kms.get_key(key_id)
            confirm(
                f"Destroy {key_id} ({key.state}, thread {key.thread_id})? What it encrypted can never be read again.",
                yes=yes,
            )
        receipt = kms.destroy_key(key_id)
    facts = [
        ("key", receipt.key_id),
        ("state", receipt.state),
        ("destroyed at", receipt.destroyed_at),
        ("tombstone", f"{receipt.tombstone}, tag {receipt.tombstone_tag}"),
        ("epoch", receipt.epoch),
        ("backups removed", receipt.backups_removed),
        ("archives that may still hold it", ", ".join(receipt.archives) or "none known"),
    ]
    print_result(receipt, Facts(facts), json=json)


class _KeyFailure(NamedTuple):
    key_id: str
    code: str
    error: str


class _Outcome(NamedTuple):
    """The outcome of destroying several keys. `not_tried`: the keys that were left when the daemon went away."""

    destroyed: list[api.DestroyKeyAnswer]
    failed: list[_KeyFailure]
    not_tried: list[str]


def _refuse_active(kms: Client, thread: str) -> None:
    """Refuses a thread with an active key: the caller probably means that one. Raises CommandError."""
    active = [key.key_id for key in kms.list_keys(thread_id=thread, state="active").keys]
    if active:
        do = f"retire it first: minikms keys retire {active[0]}"
        raise CommandError(f"the key of this thread is active; {do}", EXIT_FAILED)


def _age_seconds(text: str) -> int:
    match = _AGE.fullmatch(text)
    if match is None:
        raise CommandError("--older-than takes a number of days, hours or minutes: 90d, 12h, 30m")
    return int(match[1]) * _AGE_SECONDS[match[2]]


def _retired_keys(kms: Client, thread: str | None, made_before: float | None) -> list[str]:
    """The ids of all retired keys, or of those that were chosen. Raises CommandError while some may be missing."""
    keys: list[str] = []
    for page in _pages(kms, thread, "retired", 0):
        if page.indexing:
            raise CommandError("the daemon has just started and is still reading files; try again soon", EXIT_FAILED)
        for key in page.keys:
            if made_before is None or datetime.fromisoformat(key.created_at).timestamp() < made_before:
                keys.append(key.key_id)
    return keys


def _destroy_all(key_ids: Sequence[str], outcome: _Outcome, daemon: DaemonFlags, *, bar: bool) -> None:
    """Destroys the keys, several at a time, and adds each to the outcome. A key that fails stops no other; once the
    daemon does not answer, the rest is not tried.
    """
    import asyncio

    from minikms.api.errors import KmsError, KmsRefusedError
    from minikms.client import AsyncClient

    server_uids = chosen_server_uids(daemon.server_uid)
    left = list(reversed(key_ids))

    async def work(client: AsyncClient) -> None:
        while left:
            key_id = left.pop()
            try:
                outcome.destroyed.append(await client.destroy_key(key_id))
            except KmsRefusedError as error:
                outcome.failed.append(_KeyFailure(key_id, error.code, error.message))
            except KmsError as error:
                outcome.failed.append(_KeyFailure(key_id, "", f"{error}; it may be destroyed: repeat the command"))
                outcome.not_tried.extend(reversed(left))
                left.clear()
            except asyncio.CancelledError:
                outcome.failed.append(_KeyFailure(key_id, "", "interrupted; it may be destroyed: repeat the command"))
                outcome.not_tried.extend(reversed(left))
                left.clear()
                raise
            progress(len(outcome.destroyed) + len(outcome.failed), len(key_ids))

    async def destroy_all() -> None:
        async with AsyncClient(
            chosen_socket(daemon.socket), server_uids=server_uids, wait_s=DAEMON_WAIT_SECONDS
        ) as client:
            await asyncio.gather(*(work(client) for _ in range(min(DESTROYED_AT_ONCE, len(key_ids)))))

    with progress_bar("destroying keys", visible=bar) as progress:
        asyncio.run(destroy_all())


def _print_outcome(outcome: _Outcome, *, json: bool) -> None:
    if json:
        print_json(
            {
                "destroyed": outcome.destroyed,
                "failed": [failure._asdict() for failure in outcome.failed],
                "not_tried": outcome.not_tried,
            }
        )
        return
    if outcome.destroyed:
        print_table(
            ("destroyed", "backups removed", "archives that may still hold it"),
            (
                (receipt.key_id, receipt.backups_removed, ", ".join(receipt.archives) or "none known")
                for receipt in outcome.destroyed
            ),
            right=("backups removed",),
        )
    for failure in outcome.failed:
        complain(f"{clean(failure.key_id)} has no receipt: {clean(failure.error)}")
    for key_id in outcome.not_tried:
        complain(f"{key_id} was not tried")
    terminal(errors=True).print(
        f"{len(outcome.destroyed):,} destroyed, {len(outcome.failed):,} failed, {len(outcome.not_tried):,} not tried",
        soft_wrap=True,
    )


def _print_key(key: api.KeyAnswer, *, json: bool) -> None:
    facts = [
        ("key", key.key_id),
        ("thread", key.thread_id),
        ("purpose", key.purpose),
        ("state", key.state),
        ("KEK version", key.kek_version),
        ("created", key.created_at),
    ]
    print_result(key, Facts(facts), json=json)
