"""`minikms serve`: the daemon, from flags and environment, in the place of this process.

Owns: the flags of the daemon and how they go together; `minikms_daemon.server.settings` checks their values.
Invariants: an empty environment variable counts as unset; a flag wins over its variable; a start without a root key is
refused before anything is made or bound. It must never hold the root key, only where it comes from.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn

from cyclopts import Parameter, validators

from minikms.cli.console import (
    PIN_VARIABLE,
    AuditDir,
    DataDir,
    MasterKeyFd,
    Root,
    RootKey,
    chosen_data_dir,
    chosen_socket,
    chosen_source,
    key_file_owner,
)
from minikms.commands.usage import LogFormat, PathText
from minikms.processes.flags import (
    ADMIN_UIDS_VARIABLE,
    ALLOWED_UIDS_VARIABLE,
    UNLOCK_UIDS,
    UNLOCK_UIDS_VARIABLE,
    Flags,
    become_daemon,
)

POLICY_VARIABLE: Final = "PROGRESSDB_MINIKMS_POLICY"
DAY_SECONDS: Final = 24 * 3600
ROOT_LEASE_SECONDS_MIN: Final = 30
"""More than one question takes."""
UNSHIPPED_LINES_MIN: Final = 100
"""An auditor that works takes lines about ten seconds after they were written."""


@Parameter(name="*")
@dataclass(frozen=True)
class PlainFlags:
    """The flags that the daemon gets as they are, under the names of `Flags`."""

    socket_mode: Annotated[str, Parameter(help="Permission bits of the socket, octal.")] = "0600"
    socket_group: Annotated[str | None, Parameter(help="Group that the socket belongs to.")] = None
    make_socket_dir: Annotated[
        bool, Parameter(help="Make the socket's directory if it is missing, mode 0750, of that group.")
    ] = False
    audit_dir: AuditDir = None
    refuse_when_unshipped: Annotated[
        int | None,
        Parameter(
            help="Use no key while the auditor has not taken more lines of the audit log than this.",
            validator=validators.Number(gte=UNSHIPPED_LINES_MIN),
        ),
    ] = None
    audit_fsync: Annotated[
        Literal["never", "interval", "turn"],
        Parameter(
            help="When audit lines are synced: never (but every 8 MiB), interval (100 ms), turn.", show_choices=False
        ),
    ] = "interval"
    cache_keys: Annotated[
        int | None,
        # At least two: a re-encryption opens the old and the new key.
        Parameter(help="Maximum number of unwrapped keys in locked memory.", validator=validators.Number(gte=2)),
    ] = None
    require_hardening: Annotated[bool, Parameter(help="Refuse to start when a hardening measure is missing.")] = False
    rewritable: Annotated[
        bool,
        Parameter(
            name="--rewrite-master-key-file", help="A rotation to a new root key also writes it to the root key file."
        ),
    ] = False
    sealed: Annotated[bool, Parameter(help="Start without keys, and serve after `minikms unseal` only.")] = False
    log_format: LogFormat = "console"
    accept_audit_loss: Annotated[
        bool, Parameter(help="Begin a new audit log if the old one is missing or altered; the old one is renamed.")
    ] = False
    accept_restore: Annotated[bool, Parameter(help="Start once with a keyring that is older than the audit log.")] = (
        False
    )
    expect_audit_head: Annotated[
        str | None, Parameter(help="SEQ:SIG of an earlier audit line: refuse to start if the log does not contain it.")
    ] = None
    audit_hash_thread_ids: Annotated[
        bool, Parameter(help="Record thread ids in the audit log as keyed hashes only.")
    ] = False
    audit_segment_mib: Annotated[
        int, Parameter(help="Close a file of the audit log at this size.", validator=validators.Number(gte=1))
    ] = 1024
    audit_segment_days: Annotated[
        int, Parameter(help="Close a file of the audit log at this age.", validator=validators.Number(gte=1))
    ] = 30
    audit_keep_mib: Annotated[
        int,
        Parameter(
            help="Delete the oldest closed files while the closed files exceed this size; 0 keeps all.",
            validator=validators.Number(gte=0),
        ),
    ] = 0
    audit_keep_days: Annotated[
        int,
        Parameter(
            help="Never delete a file that was closed fewer days ago than this.", validator=validators.Number(gte=0)
        ),
    ] = 90


def serve(
    *,
    socket: Annotated[PathText | None, Parameter(help="Unix socket to serve on [MINIKMS_SOCKET].")] = None,
    data_dir: DataDir = None,
    master_key_file: Annotated[
        Path | None,
        Parameter(help="File with the root key: 64 hex characters, mode 0600 [PROGRESSDB_MINIKMS_MASTER_KEY_FILE]."),
    ] = None,
    master_key_owner: Annotated[
        str | None,
        Parameter(
            help="UID:GID of a root key file that its group may read too, as those of a Kubernetes secret "
            "[PROGRESSDB_MINIKMS_MASTER_KEY_OWNER, also for other commands]."
        ),
    ] = None,
    root_source: Root = None,
    unlock_uids: Annotated[
        str | None,
        Parameter(
            help="Users that may be the unlock service, comma-separated; default: root, for systemd listens "
            "[PROGRESSDB_MINIKMS_UNLOCK_UIDS, also for other commands]."
        ),
    ] = None,
    root_lease: Annotated[
        int | None,
        Parameter(
            help="Seconds for which the root key is used without another grant of the unlock service; then every key "
            "is zeroed. Only with --root unlock:SOCKET.",
            validator=validators.Number(gte=ROOT_LEASE_SECONDS_MIN, lte=DAY_SECONDS),
        ),
    ] = None,
    pin: Annotated[
        Path | None,
        Parameter(help="Root's file that names the root keys which may open the keyring [PROGRESSDB_MINIKMS_PIN]."),
    ] = None,
    dev: Annotated[bool, Parameter(help="Without a root key, make a key file beside the data directory.")] = False,
    allowed_uids: Annotated[
        str | None,
        Parameter(
            help="Users that may connect, comma-separated; default: this one, or those of the policy file "
            "[PROGRESSDB_MINIKMS_ALLOWED_UIDS]."
        ),
    ] = None,
    admin_uids: Annotated[
        str | None,
        Parameter(
            help="Only these users have the roles rotate, destroy, audit and unseal [PROGRESSDB_MINIKMS_ADMIN_UIDS]."
        ),
    ] = None,
    policy: Annotated[
        Path | None,
        Parameter(
            help="File that says who may do what, in a directory of its own [PROGRESSDB_MINIKMS_POLICY]. Not with "
            "--admin-uids."
        ),
    ] = None,
    plain: PlainFlags = PlainFlags(),
    master_key_fd: MasterKeyFd = None,
    parent_fd: Annotated[int | None, Parameter(show=False)] = None,
) -> NoReturn:
    """Serve keys on a Unix socket until SIGTERM."""
    from minikms.api.errors import StartError
    from minikms.platform.process_metrics import build

    path = chosen_socket(socket, must_exist=False)
    if socket is None and "," in path:
        raise StartError("the variable of the socket names several, and this serves on one: give --socket")
    directory = chosen_data_dir(data_dir, must_exist=False)
    root = chosen_source(RootKey(master_key_file, root_source, master_key_fd), rewritable=plain.rewritable)
    if root is None:
        if not dev:
            raise StartError(_no_root_text(directory))
        root = "dev:"
    policy_file = policy or os.environ.get(POLICY_VARIABLE)
    pin_file = pin or os.environ.get(PIN_VARIABLE)
    if plain.audit_dir is not None and plain.audit_fsync == "never":
        raise StartError("--audit-dir is for an auditor, which takes durable lines only: not with --audit-fsync never")
    if plain.refuse_when_unshipped is not None and plain.audit_dir is None:
        raise StartError("--refuse-when-unshipped needs --audit-dir: without it no auditor can take a line")
    if root_lease is not None and not root.startswith("unlock:"):
        raise StartError("--root-lease is for a root key of the unlock service: give --root unlock:SOCKET")
    audit_dir = None if plain.audit_dir is None else os.path.abspath(plain.audit_dir)
    built = build()
    become_daemon(
        Flags(
            socket=path,
            data_dir=directory,
            root=root,
            key_owner=key_file_owner(master_key_owner),
            unlock_uids=unlock_uids or os.environ.get(UNLOCK_UIDS_VARIABLE) or UNLOCK_UIDS,
            root_lease=root_lease,
            pin=os.path.abspath(pin_file) if pin_file else None,
            policy=os.path.abspath(policy_file) if policy_file else None,
            allowed_uids=allowed_uids
            or os.environ.get(ALLOWED_UIDS_VARIABLE)
            or ("" if policy_file else str(os.geteuid())),
            admin_uids=admin_uids or os.environ.get(ADMIN_UIDS_VARIABLE) or "",
            parent_fd=parent_fd,
            version=built.version,
            commit=built.commit,
            **vars(plain) | {"audit_dir": audit_dir},
        ),
        sys.argv[1:],
    )


def _no_root_text(directory: str) -> str:
    """The advice for a start without a root key: it depends on the files that exist already."""
    from minikms.api import development_key_path

    key_file = development_key_path(directory)
    if os.path.lexists(key_file):
        return f"no root key is given. {key_file} is the development key of this data directory: start with --dev"
    if os.path.lexists(os.path.join(directory, "keyring.json")):
        return "no root key is given. Give the file of the one that this data directory has: --master-key-file FILE"
    return (
        f"no root key is given, and {directory} has no keyring yet. Make both: "
        f"`minikms init --data-dir {shlex.quote(directory)} --master-key-file FILE`"
    )
