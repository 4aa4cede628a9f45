"""The flags of a daemon that a test makes in its own process.

Owns: their values where a test says nothing, which are those of `minikms serve`.
"""

from pathlib import Path

from minikms.cli.serve import PlainFlags
from minikms.processes.flags import UNLOCK_UIDS, Flags


def flags_of(data_dir: Path) -> Flags:
    """Those of a daemon of this directory, which no client reaches."""
    return Flags(
        socket="unused",
        data_dir=str(data_dir),
        root="dev:",
        key_owner=None,
        unlock_uids=UNLOCK_UIDS,
        root_lease=None,
        pin=None,
        policy=None,
        allowed_uids="",
        admin_uids="",
        parent_fd=None,
        version="",
        commit="",
        **vars(PlainFlags()),
    )
