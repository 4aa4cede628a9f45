"""`minikms pin`: root says which root keys may open the keyring, and which hosts may be added.

Owns: flags and output. Invariants: only root may run them, and what it reads is root's decision: the key file may
belong to any user. It must never print more of a root key than its fingerprint.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from minikms.cli.console import PIN_VARIABLE, DataDir, Json, Yes, chosen_data_dir, complain, named_root
from minikms.cli.replica import RequestFile, confirm_request, read_request
from minikms.commands.output import confirm, print_result
from minikms.commands.usage import EXIT_FAILED, CommandError, RootSource

if TYPE_CHECKING:
    from minikms.roots.pin import PinFile
    from minikms.roots.providers import RootProvider

app = App(name="pin", help="As root, name the root keys that may open the keyring.", version_flags=[])

Source = Annotated[
    RootSource,
    Parameter(show_choices=False, help="Where the root key is: file:PATH or fd:NUMBER; shares: asks for shares."),
]
Pin = Annotated[
    Path | None, Parameter(name="--pin", help=f"The pin file, outside the data directory [{PIN_VARIABLE}].")
]


@app.command
def add(
    source: Source,
    *,
    pin: Pin = None,
    data_dir: DataDir = None,
    json: Json = False,
) -> None:
    """Add a root key to the pin file, which is made if there is none. The daemon reads it with --pin.

    The first root key must open the keyring, which shows the id of the keyring. A later root key may be named here
    before it is added to the keyring. A damaged file is replaced by one with this root key only.
    """
    from minikms.api.errors import StartError
    from minikms.crypto import roots
    from minikms.datadir import opened_keyring, opened_root, read_keyring
    from minikms.keys import keyring

    file, directory = _chosen(pin, data_dir)
    root = _root(source, directory)
    data = read_keyring(directory)
    with opened_root(root) as (arena, key):
        opens = True
        try:
            with opened_keyring(arena, key, data) as unlocked:
                keyring_id = unlocked.body.keyring_id
        except StartError:
            if not file.exists():
                raise
            opens, keyring_id = False, keyring.parse_file(data)[0].keyring_id
        done = file.add(key.view, keyring_id)
        fingerprint = roots.fingerprint(key.view)
    facts = {"pin": str(file.path), "keyring_id": keyring_id, "fingerprint": fingerprint}
    page = {**facts, "new": done != "known", "replaced_damaged": done == "replaced", "opens": opens}
    names = "named already" if done == "known" else "names"
    lines = [f"{file.path} {names} the root key {fingerprint} for keyring {keyring_id}."]
    if not opens:
        lines.append("It does not open the keyring yet: minikms root add SOURCE")
    print_result(page, lines, json=json)
    if done == "replaced" and not json:
        complain("the file was damaged, and names only this root key now: add the others again")


@app.command(name="add-host")
def add_host(
    request: RequestFile, *, pin: Pin = None, data_dir: DataDir = None, yes: Yes = False, json: Json = False
) -> None:
    """Add a new host's request to the pin file. Then `minikms replica add` takes it; nothing opens here."""
    from minikms.datadir import read_keyring
    from minikms.keys import keyring, members

    file, directory = _chosen(pin, data_dir)
    joining = read_request(request)
    body = keyring.parse_file(read_keyring(directory))[0]
    if joining.keyring_id != body.keyring_id:
        raise CommandError(f"the request is for the keyring {joining.keyring_id}, and this one is {body.keyring_id}")
    if body.slot_for(joining.fingerprint) is not None:
        raise CommandError(f"the root key {joining.fingerprint} opens the keyring already", EXIT_FAILED)
    confirm_request(joining, yes=yes)
    file.add_host(joining.fingerprint, members.newcomer(joining).digest, body.keyring_id)
    lines = (f"{file.path} names the request of {joining.name}.", f"Next: minikms replica add {request}")
    print_result({"pin": str(file.path), "fingerprint": joining.fingerprint, "name": joining.name}, lines, json=json)


@app.command
def remove(source: Source, *, pin: Pin = None, data_dir: DataDir = None, yes: Yes = False, json: Json = False) -> None:
    """Remove a root key from the pin file: then it opens no keyring at a start, and can't be added to one.

    Only the root key itself shows which pin is its own. Without it, add the other root keys to a new file. Exit status:
    0 removed or not named, 2 refused.
    """
    from minikms.crypto import roots
    from minikms.datadir import opened_root

    file, directory = _chosen(pin, data_dir)
    with opened_root(_root(source, directory)) as (_, key):
        fingerprint = roots.fingerprint(key.view)
        confirm(f"Remove the root key {fingerprint} from {file.path}?", yes=yes)
        removed = file.remove(key.view)
    lines = (
        f"{file.path} {'names no longer' if removed else 'did not name'} the root key {fingerprint}.",
        "If minikms root list still shows it, also run minikms root remove SLOT.",
    )
    print_result({"pin": str(file.path), "fingerprint": fingerprint, "removed": removed}, lines, json=json)


def _chosen(pin: Path | None, data_dir: str | None) -> tuple[PinFile, str]:
    """The pin file and the data directory. Raises CommandError."""
    from minikms.roots.pin import PinFile

    if os.geteuid() != 0:
        raise CommandError("only root may change the pin file: run this as root")
    named = pin or os.environ.get(PIN_VARIABLE)
    if not named:
        raise CommandError(f"name the pin file: --pin FILE, or {PIN_VARIABLE}")
    directory = chosen_data_dir(data_dir)
    file = PinFile(Path(os.path.abspath(named)))
    if Path(directory).resolve() in file.path.resolve().parents:
        raise CommandError("the pin file must lie outside the data directory, which another user can write")
    return file, directory


def _root(source: str, directory: str) -> RootProvider:
    """The root key that root names, and vouches for. Raises StartError."""
    from minikms.roots.providers import KeyFile

    root = named_root(source, directory)
    return dataclasses.replace(root, any_owner=True) if isinstance(root, KeyFile) else root
