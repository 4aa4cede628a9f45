"""The commands of `minikms` and their flags.

Owns: the command tree, the flags of `serve`, and the one place in which an error becomes a sentence and an exit status
(`minikms.cli.console`). Invariants: a command that writes the data directory takes its lock, one that only reads works
beside a live daemon; a command's module is imported when it runs, so that a start takes a fifth of a second at most.
"""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter, validators

from minikms.cli.console import EXIT_INTERRUPTED, EXIT_MISSING, EXIT_READER_LEFT, complain, explained

COMMANDS: Final = {
    "init": ("init:init", "Make a data directory, and a root key file if there is none."),
    "status": ("status:status", "Show what the running daemon says of itself."),
    "keys": ("keys:app", "List, show, retire and destroy keys."),
    "rotate-kek": ("kek:rotate_kek", "Make a new KEK and wrap every key under it, while the daemon serves."),
    "kek": ("kek:app", "List key-encryption keys (KEKs), and destroy those that nothing needs."),
    "encrypt": ("files:encrypt", "Encrypt a file or a pipe of any size."),
    "decrypt": ("files:decrypt", "Decrypt what `minikms encrypt` made."),
    "backup": ("backup:app", "Create, verify, restore, list and prune backup archives."),
    "doctor": ("doctor:doctor", "Look for what is wrong or soon will be, each with what to do."),
    "audit": ("audit:app", "Verify and read the audit log."),
    "demo": ("demo:demo", "See the commands at work, in a temporary directory."),
    "completion": ("completion:completion", "Print the completion script of a shell."),
}
"""Each command beside `serve`, where it is, and what it does in a line. The modules are imported when they are used."""

app = App(
    name="minikms",
    help="A local, hardened key service. With flags only, it serves.",
    help_format="plaintext",  # what Markdown needs takes long to import
    help_epilogue="Exit status: 0 done, 1 judged and found wanting, or refused, 2 wrong usage or something is missing.",
    version_flags=["--version"],
    version="0.1.0",
)
for _name, (_place, _help) in COMMANDS.items():
    app.command(f"minikms.cli.{_place}", name=_name, help=_help)


@app.default
@app.command(name="serve")
def serve(
    *,
    socket: Annotated[str | None, Parameter(help="Unix socket to serve on [PROGRESSDB_KMS_SOCKET].")] = None,
    data_dir: Annotated[
        str | None, Parameter(help="Directory of keys and audit log [PROGRESSDB_KMS_DATA_DIR].")
    ] = None,
    master_key_file: Annotated[
        Path | None,
        Parameter(help="File with the root key: 64 hex characters, mode 0600 [PROGRESSDB_MINIKMS_MASTER_KEY_FILE]."),
    ] = None,
    dev: Annotated[
        bool, Parameter(help="Without a root key, make a key file beside the data directory.", negative=())
    ] = False,
    allowed_uids: Annotated[
        str | None,
        Parameter(help="Users that may connect, comma-separated; default: this one [PROGRESSDB_MINIKMS_ALLOWED_UIDS]."),
    ] = None,
    admin_uids: Annotated[
        str | None, Parameter(help="Keep rotate, destroy and audit to these users [PROGRESSDB_MINIKMS_ADMIN_UIDS].")
    ] = None,
    socket_mode: Annotated[str, Parameter(help="Permission bits of the socket, octal.")] = "0600",
    socket_group: Annotated[str | None, Parameter(help="Group that the socket is given to.")] = None,
    audit_fsync: Annotated[
        str, Parameter(help="When audit lines are synced: never, interval (100 ms), turn.")
    ] = "interval",
    cache_keys: Annotated[
        int | None,
        # Two at least: a re-encryption has the keys of both sides open.
        Parameter(help="How many opened keys stay in locked memory.", validator=validators.Number(gte=2)),
    ] = None,
    require_hardening: Annotated[
        bool, Parameter(help="Refuse to start when a hardening measure is missing.", negative=())
    ] = False,
    rewrite_master_key_file: Annotated[
        bool, Parameter(help="A rotation to a new root key also writes it to the master key file.", negative=())
    ] = False,
    log_format: Annotated[str, Parameter(help="json or console.")] = "console",
    accept_audit_loss: Annotated[
        bool,
        Parameter(help="Begin a new audit log where the old one is missing or altered; it is kept aside.", negative=()),
    ] = False,
    accept_restore: Annotated[
        bool,
        Parameter(help="Go on with a keyring that is older than the audit log says, once.", negative=()),
    ] = False,
    expect_audit_head: Annotated[
        str | None,
        Parameter(help="A line known to have been written, SEQ:SIG: refuse to start where the audit log lacks it."),
    ] = None,
    audit_hash_thread_ids: Annotated[
        bool, Parameter(help="Record thread ids in the audit log as keyed hashes only.", negative=())
    ] = False,
    audit_segment_mib: Annotated[
        int, Parameter(help="Close a file of the audit log at this size.", validator=validators.Number(gte=1))
    ] = 1024,
    audit_segment_days: Annotated[
        int, Parameter(help="Close a file of the audit log at this age.", validator=validators.Number(gte=1))
    ] = 30,
    audit_keep_mib: Annotated[
        int,
        Parameter(
            help="Delete the oldest closed files while all of them hold more; 0 keeps them all.",
            validator=validators.Number(gte=0),
        ),
    ] = 0,
    audit_keep_days: Annotated[
        int,
        Parameter(help="Never delete a file closed less long ago than this.", validator=validators.Number(gte=0)),
    ] = 90,
    audit_copy: Annotated[
        str | None, Parameter(help="Also append every audit line to this file, on another disk say.")
    ] = None,
    master_key_fd: Annotated[int | None, Parameter(show=False)] = None,
    parent_fd: Annotated[int | None, Parameter(show=False)] = None,
) -> int:
    """Serve keys on a Unix socket until SIGTERM."""
    from minikms.daemon import process, settings

    chosen = settings.from_environment(
        os.environ,
        socket=socket,
        data_dir=data_dir,
        allowed_uids=allowed_uids,
        admin_uids=admin_uids,
        master_key_file=master_key_file,
        master_key_fd=master_key_fd,
        dev=dev,
        parent_fd=parent_fd,
        socket_mode=settings.parse_mode(socket_mode),
        socket_group=socket_group,
        audit_fsync=settings.parse_choice(audit_fsync, ("never", "interval", "turn"), "--audit-fsync"),
        log_format=settings.parse_choice(log_format, ("json", "console"), "--log-format"),
        cache_keys_max=cache_keys,
        require_hardening=require_hardening,
        rewrite_master_key_file=rewrite_master_key_file,
        accept_audit_loss=accept_audit_loss,
        accept_restore=accept_restore,
        expect_audit_head=settings.parse_head(expect_audit_head),
        audit_hash_thread_ids=audit_hash_thread_ids,
        audit_limits=settings.audit_limits(segment_mib=audit_segment_mib, segment_days=audit_segment_days),
        audit_keep=settings.audit_keep(mib=audit_keep_mib, days=audit_keep_days),
        audit_copy=None if audit_copy is None else os.path.abspath(audit_copy),
    )
    process.run(chosen)
    return 0


def run() -> None:
    """Carries out the command line and ends the process. What is no error of ours or the system's is a defect, and
    shows as one."""
    try:
        mistyped = _mistyped(sys.argv[1:])
        if mistyped:
            complain(mistyped)
            sys.exit(EXIT_MISSING)
        try:
            sys.exit(app())
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read our output has closed it; Python must not complain when it flushes once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_READER_LEFT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001  defects are raised again by `explained`
        text, exit_status = explained(error)
        complain(text)
        sys.exit(exit_status)


def _mistyped(words: list[str]) -> str:
    """What is wrong with a first word that is no command: `serve` takes flags only, so it can't be anything else."""
    if not words or words[0].startswith("-") or words[0] in ("serve", *COMMANDS):
        return ""
    close = get_close_matches(words[0], ["serve", *COMMANDS], n=1)
    meant = f"Did you mean `minikms {close[0]}`?" if close else "`minikms --help` lists what there is."
    return f"there is no command {words[0]!r}. {meant}"
