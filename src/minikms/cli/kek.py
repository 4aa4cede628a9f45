"""`minikms rotate-kek`, `minikms kek list` and `minikms kek prune`, through the running daemon.

Owns: flags and the progress bar. Invariants: a new root key comes from a private file only (`minikms.cli.key_text`);
a rotation goes on in the daemon when this command is interrupted. It must never report a rotation as done before
`/status` does.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, Parameter

from minikms.api.errors import KmsError
from minikms.cli.console import DaemonFlags, Json, Yes, complain
from minikms.cli.key_text import key_text
from minikms.commands.output import (
    Progress,
    Table,
    confirm,
    counted,
    print_result,
    progress_bar,
)
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, CommandError

if TYPE_CHECKING:
    from minikms import api
    from minikms.client import Client

POLL_SECONDS: Final = 0.1

app = App(name="kek", help="List key-encryption keys (KEKs), and destroy those that nothing needs.", version_flags=[])


def rotate_kek(
    *,
    new_master_key_file: Annotated[
        Path | None, Parameter(help="Also change the root key, to the one in this file: 64 hex characters, mode 0600.")
    ] = None,
    priority: Annotated[
        Literal["low", "normal", "high"] | None,
        Parameter(
            help="Of the rotation against requests: low delays them least, high rotates fastest. Without the flag: "
            "normal. It also changes the priority of a rotation that runs."
        ),
    ] = None,
    daemon: DaemonFlags = DaemonFlags(),
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Make a new KEK and wrap every key under it, while the daemon serves.

    With --new-master-key-file that key becomes the root key in the same step. Interrupting this command does not
    interrupt the rotation. Run it again to watch one that is running, with the same file if it changes the root.
    Exit status: 0 done, 1 refused or keys are left that can't be read, 2 the daemon or the file is missing.
    """
    with daemon.client() as kms, key_text(new_master_key_file) as text:
        before = kms.status()
        count = sum(before.keys.by_state.values())
        what = "Change the root key, rotate the KEK" if text else "Rotate the KEK"
        confirm(f"{what} and rewrap {counted(count, 'key')}? The daemon goes on serving.", yes=yes)
        rotation = kms.rotate_kek(new_kek_hex=text, wait=False, priority=priority)
        after = _wait(kms, rotation.kek_version, bar=not json)
        active = [root for root in kms.list_roots().roots if root.state == "active"]
    unreadable = after.keys.unreadable
    rewrapped = rotation.rewrapped if rotation.status == "ok" else sum(after.keys.by_state.values())
    page = {"status": "ok", "kek_version": rotation.kek_version, "rewrapped": rewrapped, "unreadable": unreadable}
    print_result(page, _done_lines(rotation.kek_version, active, new_file=new_master_key_file), json=json)
    if unreadable:
        complain(
            f"{unreadable} key files can't be read and stay under an older KEK, which is kept for them: "
            "`minikms doctor` lists them; restore them from a backup"
        )
    return EXIT_FAILED if unreadable else EXIT_GOOD


def _done_lines(version: int, roots: list[api.RootAnswer], *, new_file: Path | None) -> Iterator[str]:
    """The lines about a rotation that is done. `roots`: the root keys that open the keyring."""
    yield f"KEK version {version} is active, and every readable key is wrapped under it."
    yield "The one before it stays until nothing needs it: minikms kek prune --backups"
    if new_file is None:
        return
    replaced = {root.replaces for root in roots if root.replaces}
    if replaced:
        yield f"Both root keys open the keyring. Start the daemon once with --master-key-file {new_file}:"
        yield "from then on only the new one does. Keep a copy of it elsewhere."
    elif len(roots) == 1:
        yield "Only the new root key opens the keyring now. Keep a copy of it elsewhere."
    else:
        yield "The new root key opens the keyring in place of the former one. Keep a copy of it elsewhere."
    others = len(roots) - 1 - len(replaced)
    if others > 0:
        yield f"{others} other root key(s) open it too, as before: minikms root list"


def _wait(kms: Client, version: int, *, bar: bool) -> api.StatusAnswer:
    """The status at the end of the rotation to `version`, and of one that follows the removal of the former root key.

    Raises CommandError when an older KEK is active then.
    """
    with progress_bar("rewrapping", visible=bar) as progress:
        while (rotation := (status := kms.status()).rotation) is not None:
            if rotation.last_error and sys.stderr.isatty():
                print(f"the daemon tries again after: {rotation.last_error}", file=sys.stderr)
            progress(rotation.rewrapped, rotation.total)
            time.sleep(POLL_SECONDS)
    active = [kek.version for kek in status.keks if kek.state == "active"]
    if len(active) != 1 or active[0] < version:
        raise CommandError(
            f"KEK version {version} was requested, but {active} is active: an older keyring was put back meanwhile; "
            "see `minikms audit tail`",
            EXIT_FAILED,
        )
    return status


def _report(kms: Client, progress: Progress, ended: threading.Event) -> None:
    """Shows how far a prune is, until it has `ended`."""
    with contextlib.suppress(KmsError):
        while not ended.wait(POLL_SECONDS):
            if (pruning := kms.status().pruning) is not None:
                progress(pruning.read, pruning.total)


@app.command(name="list")
def list_keks(*, daemon: DaemonFlags = DaemonFlags(), json: Json = False) -> None:
    """List the KEK versions and how many keys each wraps."""
    from msgspec.structs import asdict

    with daemon.client() as kms:
        status = kms.status()
    wrapped = status.keys.by_kek_version
    keks = [(kek, wrapped.get(str(kek.version), 0)) for kek in status.keks]
    page = {"keks": [{**asdict(kek), "keys": count} for kek, count in keks], "complete": not status.keys.indexing}
    table = Table(
        ("version", "state", "created", "keys"),
        ((kek.version, kek.state, kek.created_at, f"{count:,}") for kek, count in keks),
        right=("version", "keys"),
    )
    print_result(page, table, json=json)


@app.command
def prune(
    *,
    backups: Annotated[
        bool, Parameter(help="First remove all backups of key files that rotations made.", show_default=False)
    ] = False,
    backups_before: Annotated[
        str | None, Parameter(help="First remove those older than this, as 20261124T150000 (UTC).")
    ] = None,
    daemon: DaemonFlags = DaemonFlags(),
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Destroy the retired KEKs that no key file and no backup of one needs. They can't be made again.

    Exit status: 0 none is left, 1 some are kept, with the reason of each.
    """
    with daemon.client() as kms:
        confirm("Destroy the retired KEKs that nothing in the data directory needs?", yes=yes)
        with progress_bar("reading keys", visible=not json) as progress, daemon.client() as other:
            ended = threading.Event()
            reporting = threading.Thread(target=_report, args=(other, progress, ended))
            if sys.stderr.isatty():
                reporting.start()
            try:
                done = kms.prune_kek(backups=backups, backups_before=backups_before)
            finally:
                ended.set()
                if reporting.ident is not None:
                    reporting.join()
    lines = [
        f"destroyed: {', '.join(f'version {number}' for number in done.destroyed) or 'none'}",
        f"backups of key files removed: {done.backups_removed:,}",
        *(f"kept: version {kek.version}: {kek.why}" for kek in done.kept),
    ]
    print_result(done, lines, json=json)
    return EXIT_FAILED if done.kept else EXIT_GOOD
