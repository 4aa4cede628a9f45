"""`minikms keys`: list, show, retire and destroy data-encryption keys, through the running daemon.

Owns: flags and output. Invariants: an action that can't be undone is confirmed, or `--yes` was given; the receipt of a
destruction is shown whole. It must never touch the file of a key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import App, Parameter, validators

from minikms import api
from minikms.cli.console import (
    EXIT_GOOD,
    Json,
    ServerUid,
    Socket,
    Yes,
    confirm,
    daemon_client,
    print_facts,
    print_json,
    print_table,
    terminal,
)

if TYPE_CHECKING:
    from minikms.client import Client

SHOWN_COUNT: Final = 100

app = App(name="keys", help="List, show, retire and destroy keys.", version_flags=[])

KeyId = Annotated[str, Parameter(help="The key's id: k_…")]


@app.command(name="list")
def list_keys(
    *,
    thread: Annotated[str | None, Parameter(help="Only this thread's.")] = None,
    state: Annotated[api.State | None, Parameter(help="Only in this state.")] = None,
    limit: Annotated[
        int, Parameter(help="How many at most; 0: all.", validator=validators.Number(gte=0))
    ] = SHOWN_COUNT,
    socket: Socket = None,
    server_uid: ServerUid = None,
    json: Json = False,
) -> int:
    """List keys, oldest first."""
    shown: list[api.KeyAnswer] = []
    more = indexing = False
    with daemon_client(socket, server_uid) as kms:
        for answer in _pages(kms, thread, state, limit):
            indexing = indexing or answer.indexing
            shown += answer.keys
            more = limit > 0 and (len(shown) > limit or (len(shown) == limit and answer.next_cursor is not None))
            if limit and len(shown) >= limit:
                break
    shown = shown[:limit] if limit else shown
    if json:
        print_json({"keys": shown, "complete": not (more or indexing)})
        return EXIT_GOOD
    if shown:
        print_table(
            ("key", "thread", "purpose", "state", "KEK", "created", "uses"),
            (
                (key.key_id, key.thread_id, key.purpose, key.state, key.kek_version, key.created_at, key.uses_max)
                for key in shown
            ),
            right=("KEK", "uses"),
        )
    notes = terminal(errors=True)
    if not shown:
        notes.print("no keys")
    if more:
        notes.print(f"These are the first {len(shown)}; more with --limit N, all with --limit 0.", soft_wrap=True)
    if indexing:
        notes.print("The daemon has just started and is still reading files: some keys may be missing.", soft_wrap=True)
    return EXIT_GOOD


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
def show_key(key_id: KeyId, *, socket: Socket = None, server_uid: ServerUid = None, json: Json = False) -> int:
    """Show the thread, state, KEK version and uses of one key."""
    with daemon_client(socket, server_uid) as kms:
        _print_key(kms.get_key(key_id), json=json)
    return EXIT_GOOD


@app.command
def retire(
    key_id: KeyId, *, socket: Socket = None, server_uid: ServerUid = None, yes: Yes = False, json: Json = False
) -> int:
    """Retire a key: it only decrypts from then on. What it encrypted stays readable."""
    with daemon_client(socket, server_uid) as kms:
        before = kms.get_key(key_id)
        if before.state == "active":
            confirm(f"Retire {key_id} of thread {before.thread_id}? It will never encrypt again.", yes=yes)
        _print_key(kms.retire_key(key_id), json=json)
    return EXIT_GOOD


@app.command
def destroy(
    key_id: KeyId, *, socket: Socket = None, server_uid: ServerUid = None, yes: Yes = False, json: Json = False
) -> int:
    """Destroy a retired key permanently. Data encrypted under it can never be decrypted again. Keep the receipt."""
    with daemon_client(socket, server_uid) as kms:
        if not yes:
            key = kms.get_key(key_id)
            confirm(
                f"Destroy {key_id} ({key.state}, thread {key.thread_id})? What it encrypted can never be read again.",
                yes=yes,
            )
        receipt = kms.destroy_key(key_id)
    if json:
        print_json(receipt)
        return EXIT_GOOD
    print_facts(
        [
            ("key", receipt.key_id),
            ("state", receipt.state),
            ("backups removed", receipt.backups_removed),
            ("archives that may still hold it", ", ".join(receipt.archives) or "none known"),
        ]
    )
    return EXIT_GOOD


def _print_key(key: api.KeyAnswer, *, json: bool) -> None:
    if json:
        print_json(key)
        return
    print_facts(
        [
            ("key", key.key_id),
            ("thread", key.thread_id),
            ("purpose", key.purpose),
            ("state", key.state),
            ("KEK version", key.kek_version),
            ("created", key.created_at),
            ("uses, at most", f"{key.uses_max:,}"),
        ]
    )
