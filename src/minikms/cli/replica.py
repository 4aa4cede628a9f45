"""`minikms replica`: the hosts of a key service on several hosts.

Owns: flags and output; the files of an invitation and of a request; the comparison of the keys of hosts. Invariants:
what a new host asks for is shown as the digest of its whole request, on its own screen and on that of the host that
adds it; adding, removing, leaving and filling a database ask first. It must never say that a host serves before its
daemon says so.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, TypeVar

from cyclopts import App, Parameter

from minikms.api.printable import clean
from minikms.cli.console import (
    DaemonFlags,
    DataDir,
    DataFiles,
    Json,
    Yes,
    chosen_data_dir,
    chosen_key_file,
    complain,
)
from minikms.commands.output import (
    Facts,
    Table,
    confirm,
    duration,
    name_list,
    print_json,
    print_result,
    print_table,
)
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, CommandError

if TYPE_CHECKING:
    from minikms import api

T = TypeVar("T")

app = App(name="replica", help="The hosts of a key service on several hosts.", version_flags=[])

FILE_BYTES_MAX: Final = 16 * 1024
EVIDENCE_BYTES_MAX: Final = 1024 * 1024 * 1024
"""More than ten million keys take."""
DAMAGED: Final = "damaged"
"""The text in place of the SHA-256 of a file that can't be read."""
DIGEST_GROUP_CHARS: Final = 4
POLL_SECONDS: Final = 0.2
PROMOTE_SECONDS: Final = 10.0
STOPPED_MODES: Final = ("sealed", "refused")

Name = Annotated[str, Parameter(name="--name", help="The name of this host in `minikms replica list`.")]
EvidenceFile = Annotated[Path, Parameter(name="FILE", help="Of a host, or of the database.")]
RequestFile = Annotated[Path, Parameter(help="The file that `minikms replica join` has made on the new host.")]


@app.command
def init(
    *,
    name: Name,
    files: DataFiles = DataFiles(),
    json: Json = False,
) -> None:
    """Make this host the first of several. The daemon is stopped; later it fills the empty database.

    Exit status: 0 done, 2 refused.
    """
    from minikms.offline import init_replica

    directory, root = files.opened()
    member = init_replica(directory, root, name)
    lines = (
        f"{directory} is that of the host {member.name}, {member.member_id}, the first of several.",
        "Next: start minikms-replicator and the daemon; when `minikms replica status` says `serving`: "
        "minikms replica invite",
    )
    print_result({"data_dir": directory, "member_id": member.member_id, "name": member.name}, lines, json=json)


@app.command
def invite(
    *,
    invitation: Annotated[Path, Parameter(help="The file to make.")] = Path("invite.json"),
    daemon: DaemonFlags = DaemonFlags(),
    json: Json = False,
) -> None:
    """Make the invitation of a new host. It has no secret, and nothing is kept of it."""
    with daemon.client() as kms:
        content = kms.invite_replica()
    _write(invitation, content)
    lines = (
        f"Made {invitation}. Copy it to the new host, and run there:",
        f"  minikms replica join --invitation {shlex.quote(invitation.name)} --name NAME",
    )
    print_result(content, lines, json=json)


@app.command
def join(
    *,
    invitation: Annotated[Path, Parameter(help="The file that `minikms replica invite` has made.")],
    name: Name,
    request: Annotated[Path, Parameter(help="The file to make.")] = Path("request.json"),
    files: DataFiles = DataFiles(),
    json: Json = False,
) -> None:
    """Make the request of a new host.

    Its data directory is empty, and its root key stays here; a key file that does not exist is made. Exit status:
    0 made, 1 refused, 2 something is missing.
    """
    from minikms import api
    from minikms.keys import members
    from minikms.offline import join_replica

    directory = chosen_data_dir(files.data_dir, must_exist=False)
    invited = _read(invitation, api.ReplicaInvitation)
    if os.path.lexists(request):
        raise CommandError(f"{request} exists already: name another file with --request")
    root = files.root_key.required_provider(directory)
    joining = join_replica(directory, root, invited, name, key_file=chosen_key_file(files.root_key))
    _write(request, joining)
    digest = members.newcomer(joining).digest
    lines = (
        f"Made {request}. Its fingerprint is",
        f"  {' '.join(wrap(digest, DIGEST_GROUP_CHARS))}",
        "Copy it to the host that serves, and run there, which must show the same fingerprint:",
        f"  minikms replica add {shlex.quote(request.name)}",
        "Then here, as a user whom the database accepts; give the daemon's user the files, and start both services:",
        f"  minikms-replicator fetch --data-dir {shlex.quote(directory)}",
    )
    print_result({"request": str(request), "member_id": joining.member_id, "digest": digest}, lines, json=json)


@app.command
def add(request: RequestFile, *, daemon: DaemonFlags = DaemonFlags(), yes: Yes = False, json: Json = False) -> None:
    """Add a host. Compare the fingerprint with the one on its screen: its root key opens the keyring from then on."""
    joining = read_request(request)
    with daemon.client() as kms:
        confirm_request(joining, yes=yes)
        added = kms.add_replica(joining)
    lines = (
        f"Added {added.name}, {added.member_id}. Its root key {added.fingerprint} opens the keyring, as slot "
        f"{added.slot_id}.",
        "Next, on that host: minikms-replicator fetch; then start its daemon and minikms-replicator.",
    )
    print_result(added, lines, json=json)


@app.command(name="list")
def list_hosts(*, daemon: DaemonFlags = DaemonFlags(), json: Json = False) -> None:
    """List the hosts."""
    from minikms.api import MEMBER_SILENT_SECONDS

    with daemon.client() as kms:
        answer = kms.replica_status()
    serving = next((one for one in answer.members if one.member_id == answer.serving), None)
    newest = max((one.number for one in answer.members), default=0)
    rows = (
        (
            one.member_id,
            one.name,
            "silent" if one.version and one.seen_seconds > MEMBER_SILENT_SECONDS else one.mode,
            one.number,
            newest - one.number,
            f"{duration(int(one.seen_seconds))} ago" if one.version else "never",
            one.version,
            _notes(one, serving),
        )
        for one in answer.members
    )
    titles = ("host", "name", "mode", "changes", "behind", "seen", "version", "")
    print_result(answer, Table(titles, rows, right=("changes", "behind")), json=json)


def _notes(one: api.MemberReport, serving: api.MemberReport | None) -> str:
    if not one.version:  # it has not reported yet
        return one.why
    notes = [one.why] if one.why else []
    if serving is not None and one.policy != serving.policy:
        notes.append("ANOTHER POLICY" if one.policy else "NO POLICY FILE")
    if serving is not None and one.pin != serving.pin:
        notes.append("another pin file" if one.pin else "NO PIN FILE")
    return "; ".join(notes)


@app.command
def remove(
    host: Annotated[str, Parameter(help="The host, by its id or name in `minikms replica list`.")],
    *,
    daemon: DaemonFlags = DaemonFlags(),
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Remove a host and its root key. Keyring key and audit key are replaced at once, and the KEK is rotated."""
    with daemon.client() as kms:
        member = next((one for one in kms.replica_status().members if host in (one.member_id, one.name)), None)
        what = host if member is None else f"{member.name}, {member.member_id}"
        confirm(f"Remove the host {what}? Its root key can't be added again.", yes=yes)
        removed = kms.remove_replica(host if member is None else member.member_id)
    if removed.fingerprint:
        text = f"Removed {removed.name}. Its root key {removed.fingerprint} opens no later keyring."
    else:
        text = f"Removed {removed.name}. The root key that it joined with was removed before: look for a later one."
    lines = (
        text,
        "The KEK is being rotated: minikms root list shows when that has ended, and the root keys that are left.",
        "Next: stop that host's daemon and minikms-replicator, and take its account in the database away.",
    )
    print_result(removed, lines, json=json)


@app.command
def promote(
    *,
    replace_database: Annotated[
        bool,
        Parameter(
            help="Fill an empty database with what this host has: after the loss or a restore of the database.",
            show_default=False,
        ),
    ] = False,
    wait: Annotated[float, Parameter(help="Seconds to wait until this host serves.")] = PROMOTE_SECONDS,
    daemon: DaemonFlags = DaemonFlags(),
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Let this host take over from the one that serves. Exit status: 0 it serves, 1 not yet, or refused."""
    from minikms.api.errors import ConflictError

    with daemon.client() as kms:
        if replace_database:
            confirm(
                "Fill an empty database with what this host has? What only another host has is lost: "
                "`minikms replica evidence` compares them.",
                yes=yes,
            )
        until = time.monotonic() + wait
        while True:
            try:
                state = kms.promote_replica(replace_database=replace_database)
                break
            except ConflictError:  # its lease has not ended yet
                if not replace_database or time.monotonic() >= until:
                    raise
                time.sleep(POLL_SECONDS)
        stopped = ("sealed",) if replace_database else STOPPED_MODES  # who has refused the database may fill it
        while state.mode != "serving" and state.mode not in stopped and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            state = kms.replica_status()
    serves = state.mode == "serving"
    if json:
        print_json(state)
    elif serves:
        print(f"This host, {state.member_id}, serves in term {state.term}.")
    if not serves:
        reason = f": {state.why}" if state.why else ""
        complain(f"this host does not serve yet, its mode is {state.mode}{reason}. See minikms replica status")
    return EXIT_GOOD if serves else EXIT_FAILED


@app.command
def status(*, daemon: DaemonFlags = DaemonFlags(), json: Json = False) -> int:
    """Show the state of this host. Exit status: 0 it serves or follows, 1 it can't, 2 the daemon does not answer."""
    from minikms.api import REPLICATOR_SILENT_SECONDS

    with daemon.client() as kms:
        state = kms.replica_status()
    heard = state.heard_seconds
    works = not state.enabled or (
        state.mode not in STOPPED_MODES and not state.why and heard is not None and heard < REPLICATOR_SILENT_SECONDS
    )
    facts = [
        ("host", state.member_id),
        ("mode", f"{state.mode}: {state.why}" if state.why else state.mode),
        ("serving", state.serving or "none"),
        ("term", state.term),
        ("changes", f"{state.number:,}"),
        ("lease", f"{state.lease_seconds:.1f} s left" if state.lease_seconds else "none"),
        ("replicator", "NEVER HEARD" if heard is None else f"heard {duration(int(heard))} ago"),
    ]
    one_host = "This key service has one host. To have several: minikms replica init"
    print_result(state, Facts(facts) if state.enabled else one_host, json=json)
    return EXIT_GOOD if works else EXIT_FAILED


@app.command
def evidence(*files: EvidenceFile, data_dir: DataDir = None, json: Json = False) -> int:
    """Show how many keys and tombstones this host has; --json names them. With the files that this command and
    `minikms-replicator evidence` wrote with --json on each host, show what each of them lacks.

    Nothing authenticates the files. Exit status: 0 done, 1 each host lacks something, 2 something is missing.
    """
    from minikms import api

    if not files:
        local = _evidence(chosen_data_dir(data_dir))
        keys = f"{len(local.keys):,} and {len(local.destroyed):,} destroyed"
        lines = f"{local.name}: term {local.term}, change {local.number:,}, keys: {keys}"
        print_result(local, lines, json=json)
        return EXIT_GOOD
    holders = [_read(path, api.ReplicaEvidence, EVIDENCE_BYTES_MAX) for path in files]
    if len({one.keyring_id for one in holders if one.keyring_id}) > 1:  # an empty database has none
        raise CommandError("these files are of different key services")
    try:
        rows = _compared(sorted(holders, key=lambda one: (one.term, one.number), reverse=True))
    except ValueError:
        raise CommandError("a tombstone in these files is not the 16 bytes of a key: copy them again") from None
    complete = [row.name for row in rows if row.is_complete]
    if json:
        print_json({"complete": complete, "holders": [row._asdict() for row in rows]})
    else:
        titles = ("", "term", "changes", "keys", "destroyed", "lacks keys", "lacks tombstones", "other contents")
        cells = ((row.name or "(database)", *row[1:5], *map(len, row[5:])) for row in rows)
        print_table(titles, cells, right=titles[1:])
        for row in rows:
            for what, ids in (("the keys", row.lacks_keys), ("the tombstones of", row.lacks_tombstones)):
                if ids:
                    print(f"{clean(row.name or 'the database')} lacks {what} {name_list(ids)}")
        print(f"lacks nothing: {name_list(complete)}" if complete else "each host lacks something that another one has")
    return EXIT_GOOD if complete else EXIT_FAILED


class Compared(NamedTuple):
    """What a host lacks of all that the others have; the database: `name` is empty. `other_contents`: the keys whose
    files differ from those of the first host that lacks nothing.
    """

    name: str
    term: int
    number: int
    keys: int
    destroyed: int
    lacks_keys: list[str]
    lacks_tombstones: list[str]
    other_contents: list[str]

    @property
    def is_complete(self) -> bool:
        return bool(self.name) and not self.lacks_keys and not self.lacks_tombstones


def _compared(holders: Sequence[api.ReplicaEvidence]) -> list[Compared]:
    from minikms.keys.dek import bytes_to_key_id

    tombstones = [{bytes_to_key_id(bytes.fromhex(raw)) for raw in one.destroyed} for one in holders]
    destroyed = set().union(*tombstones)
    keys = {key_id for one in holders for key_id in one.keys} - destroyed
    rows = [
        Compared(
            one.name, one.term, one.number, len(one.keys), len(stones),
            sorted(keys - {key_id for key_id, digest in one.keys.items() if digest != DAMAGED}),
            sorted(destroyed - stones), [],
        )
        for one, stones in zip(holders, tombstones, strict=True)
    ]  # fmt: skip
    first = next((one for one, row in zip(holders, rows, strict=True) if row.is_complete), None)
    if first is not None:
        for one, row in zip(holders, rows, strict=True):
            shared = sorted(keys & one.keys.keys())
            row.other_contents.extend(key_id for key_id in shared if one.keys[key_id] != first.keys[key_id])
    return rows


def _evidence(directory: str) -> api.ReplicaEvidence:
    """What this host has: read without its lock, so that it works beside the daemon."""
    import hashlib

    from minikms import api
    from minikms.api.errors import KmsRefusedError
    from minikms.custody import keyring_file, replica_file, tombstone_file
    from minikms.custody.settled_keys import SettledKeys
    from minikms.keys import keyring
    from minikms.keys.dek import bytes_to_key_id
    from minikms.platform.files import closed_after, open_directory, read_file_in

    with closed_after(open_directory(directory)) as directory_fd:
        stored = replica_file.read(directory_fd)
        content = tombstone_file.load(directory_fd)
    data = read_file_in(directory, keyring_file.NAME, keyring.FILE_BYTES_MAX)
    if stored is None or data is None:
        raise CommandError(f"{directory} is not that of one of several hosts, or has no keyring yet")
    body = keyring.parse_file(data)[0]
    destroyed = tombstone_file.read_tombstones(content, body, None).keys()
    destroyed_ids = set(map(bytes_to_key_id, destroyed))
    with SettledKeys(directory) as settled:
        keys = {
            key.key_id: DAMAGED if isinstance(key.record, KmsRefusedError) else hashlib.sha256(key.content).hexdigest()
            for key in settled.each(settled.key_ids())
            if key.key_id not in destroyed_ids
        }
    mark = stored.mark
    return api.ReplicaEvidence(
        body.keyring_id, mark.name, mark.term, mark.number, keys, sorted(raw.hex() for raw in destroyed)
    )


@app.command
def leave(
    *,
    files: DataFiles = DataFiles(),
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Make this host the only one. Its daemon is stopped, and the data directory is then as any other.

    Exit status: 0 done, 2 refused.
    """
    from minikms.offline import leave_replica

    directory, root = files.opened()
    confirm(
        "Go on with this host alone? Daemon and replicator of every other host must be stopped for good: this can't be "
        "checked here, and two that serve would answer with different keys.",
        yes=yes,
    )
    left = leave_replica(directory, root)
    lines = (
        f"{directory} is that of one host again, with the {left.number:,} changes that it had.",
        "Next: remove minikms-replicator and its tables, and start the daemon. The root keys of the other hosts still "
        "open the keyring: minikms root list, minikms root remove.",
    )
    print_result({"data_dir": directory, "member_id": left.member_id, "number": left.number}, lines, json=json)


def read_request(path: Path) -> api.AddReplicaRequest:
    from minikms import api

    return _read(path, api.AddReplicaRequest)


def confirm_request(joining: api.AddReplicaRequest, *, yes: bool) -> None:
    """Asks whether the new host shows the same fingerprint. Raises CommandError."""
    from minikms.keys import members

    digest = " ".join(wrap(members.newcomer(joining).digest, DIGEST_GROUP_CHARS))
    confirm(
        f"The host {clean(joining.name)} asks to be added. The fingerprint of its request is\n  {digest}\n"
        "Does the screen of that host show the same?",
        yes=yes,
    )


def _write(path: Path, value: object) -> None:
    """Makes the file. Raises CommandError if it exists, OSError."""
    from minikms.commands.output import as_json

    try:
        with path.open("x", encoding="ascii") as file:
            file.write(as_json(value) + "\n")
    except FileExistsError:
        raise CommandError(f"{path} exists already: name another file") from None


def _read(path: Path, kind: type[T], bytes_max: int = FILE_BYTES_MAX) -> T:
    import msgspec

    from minikms.api.decoding import UNDECODABLE

    with path.open("rb") as file:
        data = file.read(bytes_max + 1)
    try:
        if len(data) <= bytes_max:
            return msgspec.json.decode(data, type=kind)
    except UNDECODABLE:
        pass
    raise CommandError(f"{path} is not what `minikms replica` makes: copy it again")
