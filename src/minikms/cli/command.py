"""The commands of `minikms` and their flags.

Owns: the command tree. Exit codes: 0 done, 1 it was judged and found wanting (or refused), 2 usage, or something
needed is missing. Invariant: a command that writes the data directory takes its lock, one that only reads works
beside a live daemon.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Final

from cyclopts import App, Parameter, validators

from minikms.errors import StartError

EXIT_MISSING: Final = 2

app = App(
    name="minikms",
    help="A local, hardened key service. With flags only, it serves.",
    version_flags=["--version"],
    version="0.1.0",
)
app.command("minikms.cli.audit:app", name="audit", help="Verify and read the audit log.")


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
    master_key_fd: Annotated[int | None, Parameter(show=False)] = None,
    parent_fd: Annotated[int | None, Parameter(show=False)] = None,
) -> int:
    """Serve keys on a Unix socket until SIGTERM."""
    from minikms.daemon import compose, settings

    try:
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
        )
        compose.run(chosen)
    except StartError as error:
        print(f"minikms: {error}", file=sys.stderr)
        return EXIT_MISSING
    return 0


def run() -> None:
    sys.exit(app())
