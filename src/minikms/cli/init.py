"""`minikms init`: makes a data directory, and a root key file if there is none, before the first start.

Owns: the root key file of a new directory, its first set of recovery shares, and the text about what a person must
keep. Invariants: nothing that exists is overwritten; the lock is held; the result is that of a first start, which is
made by the same function. It must never make a second keyring for a directory that has had one, nor store the slot of
shares that were not handed out.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from cyclopts import Parameter

from minikms.cli.console import (
    AuditDir,
    DataDir,
    Json,
    MasterKeyFd,
    MasterKeyFile,
    RootKey,
    Yes,
    chosen_data_dir,
    chosen_key_file,
    complain,
    explained,
)
from minikms.cli.recovery import SharesDir, check_can_hand_out, hand_out
from minikms.commands.output import name_list, print_facts, print_json
from minikms.commands.usage import EXIT_FAILED, EXIT_GOOD, SOCKET_VARIABLE, CommandError

if TYPE_CHECKING:
    from minikms.datadir import DataDir as OpenedDataDir
    from minikms.memory.arena import SecretArena
    from minikms.roots.providers import RootProvider

ADD_LATER: Final = "Add them with `minikms root add shares:{}/{}` while the daemon serves"
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH


class Recovery(NamedTuple):
    """The shares to make. `counts`: threshold and number. `directory`: of their files; None: show them."""

    counts: tuple[int, int]
    directory: Path | None
    yes: bool


def init(
    *,
    data_dir: DataDir = None,
    master_key_file: MasterKeyFile = None,
    recovery_shares: Annotated[
        str | None, Parameter(help="Also make a root key in shares, such as 3/5: any three of five open the keyring.")
    ] = None,
    shares_dir: SharesDir = None,
    audit_dir: AuditDir = None,
    yes: Yes = False,
    json: Json = False,
    master_key_fd: MasterKeyFd = None,
) -> int:
    """Make a data directory. A root key file that does not exist is made too, with a fresh key.

    It shows the public key of the audit log. Keep it outside this machine: with it, `minikms audit verify` checks the
    log without trusting the machine. Recovery shares are shown once, on the terminal, or written to files. Exit status:
    0 made, 1 there is one already or the shares were not stored, 2 something is missing.

    For example:
        minikms init --data-dir kms/data --master-key-file root.key
    """
    recovery = _recovery(recovery_shares, shares_dir, yes=yes)
    directory = chosen_data_dir(data_dir, must_exist=False)
    audit_dir = None if audit_dir is None else os.path.abspath(audit_dir)
    key = RootKey(master_key_file, None, master_key_fd)
    key_file, root = chosen_key_file(key), key.provider()
    if root is None:
        raise CommandError(
            "say where the root key is, or is to be made: --master-key-file FILE, better not beside the data directory"
        )
    if os.path.lexists(os.path.join(directory, "keyring.json")):
        void = "" if recovery is None else _void_shares(directory, recovery)
        raise CommandError(f"{directory} has a keyring already; nothing was changed{void}", EXIT_FAILED)
    if recovery is not None:
        check_can_hand_out(recovery.directory, data_dir=directory)
    makes_key = key_file is not None and not os.path.lexists(key_file)
    facts, failure = _make(directory, audit_dir, root, key_file if makes_key else None, recovery)
    if recovery is not None and failure:
        later = ADD_LATER.format(*recovery.counts)
        complain(f"{directory} was made, but without recovery shares: {failure}. {later}")
    if json:
        print_json({**facts, "data_dir": directory, "master_key_made": makes_key})
        return EXIT_FAILED if failure else EXIT_GOOD
    if makes_key:
        print(f"Made a root key in {key_file}. Without it nothing can ever be decrypted: keep a copy elsewhere,")
        print("apart from every backup of the data directory.")
    print(f"Made {directory}.")
    print_facts(
        [
            ("keyring", facts["keyring_id"]),
            ("root key", f"{facts['root_fingerprint']}   its fingerprint, no secret"),
            ("audit log", f"{facts['audit_public_key']}   its public key: keep it outside this machine"),
        ],
        indent=2,
    )
    if "shares" in facts:
        _print_shares(facts["shares"])
    source = f" --master-key-file {shlex.quote(os.path.abspath(key_file))}" if key_file is not None else ""
    if audit_dir is not None:
        source += f" --audit-dir {shlex.quote(audit_dir)}"
    program, sockets = _program(), os.path.dirname(directory)
    print("Start it, and look at it on another terminal:")
    if os.stat(sockets).st_mode & _WRITABLE_BY_OTHERS:  # the daemon refuses such a directory
        sockets = os.path.join(sockets, "run")
        print(f"  install -d -m 700 {shlex.quote(sockets)}")
    socket = shlex.quote(os.path.join(sockets, "minikms.sock"))
    print(f"  {program} --socket {socket} --data-dir {shlex.quote(directory)}{source}")
    print(f"  export {SOCKET_VARIABLE}={socket}")
    print(f"  {program} status")
    return EXIT_FAILED if failure else EXIT_GOOD


def _program() -> str:
    """This command as a shell finds it: by its absolute path if it is not the `minikms` of PATH."""
    called = os.path.abspath(sys.argv[0])
    outside = os.path.basename(called) == "minikms" and os.path.isfile(called) and shutil.which("minikms") != called
    return shlex.quote(called) if outside else "minikms"


def _recovery(counts: str | None, directory: Path | None, *, yes: bool) -> Recovery | None:
    """What the flags ask for. Raises CommandError, InvalidRequestError."""
    from minikms.roots.recovery_shares import parse_counts

    if counts is None:
        if directory is not None:
            raise CommandError("--shares-dir says where shares go; say how many with --recovery-shares, such as 3/5")
        return None
    return Recovery(parse_counts(counts), directory, yes)


def _void_shares(data_dir: str, recovery: Recovery) -> str:
    """A sentence about the files of shares that an interrupted `init` left, and that open nothing; or empty."""
    from minikms.api.errors import KmsRefusedError
    from minikms.datadir import read_keyring
    from minikms.keys.keyring import parse_file

    void: list[str] = []
    with contextlib.suppress(OSError, KmsRefusedError):
        body = parse_file(read_keyring(data_dir))[0]
        known = tuple(f"{body.keyring_id}-{slot.shares.set_id}-" for slot in body.slots if slot.shares is not None)
        names = os.listdir(recovery.directory) if recovery.directory is not None else ()
        void += (name for name in names if name.startswith(f"{body.keyring_id}-") and not name.startswith(known))
    if not void:
        return ""
    return f". These shares open nothing: remove {name_list(sorted(void))}. {ADD_LATER.format(*recovery.counts)}"


def _print_shares(shares: dict[str, Any]) -> None:
    print(f"Any {shares['threshold']} of {shares['count']} shares open the keyring too: slot {shares['slot_id']}.")
    if shares["directory"]:
        print(f"They are in {shares['directory']}, one file a share: give each to another person, and remove it here.")


def _make(
    directory: str,
    audit_dir: str | None,
    root: RootProvider,
    new_key_file: Path | None,
    recovery: Recovery | None,
) -> tuple[dict[str, Any], str]:
    """Opens the directory as a first start does, adds recovery shares, and closes it. Raises StartError and
    StorageUnavailableError. Returns what was made, and why there are no shares; empty if there are, or need not be.
    """
    from concurrent.futures import ThreadPoolExecutor

    from minikms.api.base64 import encode_text
    from minikms.custody import keyring_file
    from minikms.datadir import KEYRING_SLOTS, Options, lock_data_dir, open_for_service
    from minikms.memory.arena import SecretArena
    from minikms.roots.key_file import make_key_file

    with (
        lock_data_dir(directory, audit_dir) as lock,
        SecretArena(KEYRING_SLOTS) as arena,
        ThreadPoolExecutor(1) as executor,
    ):
        if os.path.lexists(os.path.join(directory, keyring_file.NAME)):
            raise CommandError(f"{directory} has a keyring already; nothing was changed", EXIT_FAILED)
        if new_key_file is not None:
            make_key_file(new_key_file, arena)
        data = open_for_service(lock, root, arena=arena, disk=executor, options=Options(audit_dir=audit_dir))
        body = data.vault.keyring.body
        answer = {
            "keyring_id": body.keyring_id,
            "epoch": body.epoch,
            "root_fingerprint": data.slot.fingerprint,
            "audit_public_key": encode_text(data.vault.unlocked.audit.current.public_key),
        }
        failure = ""
        try:
            if recovery is not None:
                answer["shares"] = _add_shares(data, recovery, arena)
                answer["epoch"] = data.vault.keyring.body.epoch
        except KeyboardInterrupt:
            failure = "it was interrupted"
        except Exception as error:  # noqa: BLE001  a defect is raised again by `explained`
            failure = explained(error)[0]
        finally:
            data.close()
        return answer, failure


def _add_shares(data: OpenedDataDir, recovery: Recovery, arena: SecretArena) -> dict[str, Any]:
    """Adds a slot for a fresh root key, after its shares were handed out."""
    from minikms.memory.arena import fill_random
    from minikms.offline import add_root
    from minikms.roots.typed_shares import TypedShares

    with arena.allocate() as root:
        fill_random(root.view)
        keyring_id = data.vault.keyring.body.keyring_id
        shares = hand_out(root, keyring_id, recovery.counts, recovery.directory, arena, yes=recovery.yes)
        slot = add_root(data, root, TypedShares.name, shares)
    return {
        "slot_id": slot.slot_id,
        "set_id": shares.set_id,
        "threshold": shares.threshold,
        "count": shares.count,
        "directory": str(recovery.directory) if recovery.directory is not None else "",
    }
