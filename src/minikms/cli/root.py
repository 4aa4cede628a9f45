"""`minikms root list`, `root add`, `root test` and `root remove`, through the running daemon.

Owns: flags and output. Invariants: a root key comes from a private file, an inherited descriptor or typed shares
(`minikms.cli.key_text`), or is made in shares (`minikms.cli.recovery`); removing one asks first. It must never say that
a removed root key opens nothing before the daemon says that its revocation has ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from minikms.cli.console import DaemonFlags, Json, Yes, complain
from minikms.cli.recovery import SharesDir, add_shares, check_can_hand_out, check_can_pin
from minikms.commands.output import Table, confirm, print_result
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, CommandError, RootSource

if TYPE_CHECKING:
    from minikms import api

app = App(name="root", help="List, add, test and remove root keys, while the daemon serves.", version_flags=[])

Source = Annotated[
    RootSource,
    Parameter(
        show_choices=False,
        help="Where the root key is: file:PATH or fd:NUMBER; shares:3/5 makes one that any 3 of 5 shares give.",
    ),
]
Slot = Annotated[str, Parameter(help="The slot of the root key, as `minikms root list` shows it.")]


@app.command(name="list")
def list_roots(*, daemon: DaemonFlags = DaemonFlags(), json: Json = False) -> None:
    """List the root keys that open the keyring, and the removed ones whose revocation has not ended."""
    with daemon.client() as kms:
        answer = kms.list_roots()
    rows = (
        (root.slot_id, root.fingerprint, root.provider, root.state, root.created_at, root.tested_at, _notes(root))
        for root in answer.roots
    )
    titles = ("slot", "fingerprint", "provider", "state", "created", "tested", "")
    print_result(answer, Table(titles, rows), json=json)


def _notes(root: api.RootAnswer) -> str:
    notes = []
    if root.in_use:
        notes.append("the daemon was started under it")
    if root.replaces:
        notes.append(f"replaces {root.replaces} once the daemon was started under it")
    if root.shares is not None:
        notes.append(f"{root.shares.threshold} of {root.shares.count} shares, set {root.shares.set_id}")
    if root.pinned is False:
        notes.append("NOT PINNED: as root, minikms pin add SOURCE")
    if root.state == "revoking":
        notes.append(f"removed {root.removed_at}; opens DEKs until the KEK rotation has ended")
    return "; ".join(notes)


@app.command
def add(
    source: Source,
    *,
    shares_dir: SharesDir = None,
    pin: Annotated[
        Path | None, Parameter(help="With shares:3/5 and as root: name the new root key in this pin file first.")
    ] = None,
    daemon: DaemonFlags = DaemonFlags(),
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Add a root key that opens the keyring beside the others. It is proved to open it before it is stored.

    Shares are shown once, on the terminal, or written to files of --shares-dir.
    """
    from minikms.cli.key_text import source_text

    counts = _share_counts(source)
    if counts is not None:
        _add_in_shares(counts, shares_dir, pin, daemon, yes=yes, json=json)
        return
    if shares_dir is not None or pin is not None:
        raise CommandError(
            "--shares-dir and --pin go with shares: say how many with the source shares:3/5. For another source, run "
            "`minikms pin add SOURCE` first"
        )
    with source_text(source) as (text, provider), daemon.client() as kms:
        added = kms.add_root(text, provider=provider)
    said = f"Slot {added.slot_id}: the root key {added.fingerprint} opens the keyring too. Keep a copy elsewhere."
    print_result(added, said, json=json)


def _share_counts(source: str) -> tuple[int, int] | None:
    """Threshold and number of `shares:3/5`; None for another source. Raises InvalidRequestError."""
    from minikms.roots.recovery_shares import parse_counts

    name, _, counts = source.partition(":")
    return parse_counts(counts) if name == "shares" else None


def _add_in_shares(
    counts: tuple[int, int],
    directory: Path | None,
    pin: Path | None,
    daemon: DaemonFlags,
    *,
    yes: bool,
    json: bool,
) -> None:
    check_can_hand_out(directory)
    if pin is not None:
        check_can_pin(pin)
    with daemon.client() as kms:
        added, shares = add_shares(kms, counts, directory, pin, yes=yes)
    lines = [
        f"Slot {added.slot_id}: any {shares.threshold} of {shares.count} shares of the set {shares.set_id} open the "
        "keyring."
    ]
    if directory is not None:
        lines.append(f"They are in {directory}, one file a share: give each to another person, and remove it here.")
    lines.append(f"Test them from time to time: minikms root test {added.slot_id} --root shares:")
    print_result(added, lines, json=json)


@app.command
def test(
    slot: Slot,
    *,
    root: Annotated[str, Parameter(help="Where the root key is: file:PATH or fd:NUMBER; shares: asks for shares.")],
    daemon: DaemonFlags = DaemonFlags(),
    json: Json = False,
) -> int:
    """Prove that a root key opens the keyring. A root key can be removed only if another one was tested recently.

    Exit status: 0 it opens the keyring, 1 it does not, or the pin file of the daemon does not name it.
    """
    from minikms.cli.key_text import source_text

    with source_text(root) as (text, _), daemon.client() as kms:
        tested = kms.test_root(slot, text)
    said = f"The root key {tested.fingerprint} opens slot {tested.slot_id}: tested at {tested.tested_at}."
    print_result(tested, said, json=json)
    if tested.pinned is False:
        complain("it is not pinned, so no start or unseal accepts it: as root, minikms pin add SOURCE")
    return EXIT_FAILED if tested.pinned is False else EXIT_GOOD


@app.command
def remove(slot: Slot, *, daemon: DaemonFlags = DaemonFlags(), yes: Yes = False, json: Json = False) -> None:
    """Remove a root key. Keyring key and audit key are replaced at once, and a rotation of the KEK follows by itself.

    Until that has ended, `minikms root list` shows the root key as `revoking`.
    """
    with daemon.client() as kms:
        root_key = next((root for root in kms.list_roots().roots if root.slot_id == slot), None)
        what = (
            f"slot {slot}"
            if root_key is None
            else f"slot {slot}, the root key {root_key.fingerprint} ({root_key.provider})"
        )
        if root_key is not None and root_key.in_use:
            what += ", under which the daemon was started: its next start needs another one"
        confirm(f"Remove {what}? It can't be added again.", yes=yes)
        removed = kms.remove_root(slot)
    lines = (
        f"The root key {removed.fingerprint} opens no later keyring. It still opens older copies and archives.",
        "The KEK is being rotated, so that it opens no key either: minikms root list shows when that has ended.",
    )
    print_result(removed, lines, json=json)
