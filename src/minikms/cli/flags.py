"""The flags that several commands share, each spelled once.

Owns: their names, help and environment variables. Invariants: a flag wins over its variable, an empty variable counts
as unset; no flag ever takes a key itself, only the path of its file. It must never import what makes a start slow.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Final

from cyclopts import Parameter

from minikms.cli.outcome import CommandError

SOCKET_VARIABLE: Final = "PROGRESSDB_KMS_SOCKET"
DATA_DIR_VARIABLE: Final = "PROGRESSDB_KMS_DATA_DIR"
MASTER_KEY_FILE_VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY_FILE"
DEV_KEY_SUFFIX: Final = ".master-key"

Socket = Annotated[str | None, Parameter(name="--socket", help=f"The daemon's Unix socket [{SOCKET_VARIABLE}].")]
ServerUid = Annotated[
    int | None, Parameter(name="--server-uid", help="The user that must serve the socket; default: this one or root.")
]
DataDir = Annotated[
    str | None, Parameter(name="--data-dir", help=f"Directory of keys and audit log [{DATA_DIR_VARIABLE}].")
]
MasterKeyFile = Annotated[
    Path | None, Parameter(name="--master-key-file", help=f"File with the root key [{MASTER_KEY_FILE_VARIABLE}].")
]
MasterKeyFd = Annotated[int | None, Parameter(name="--master-key-fd", show=False)]
Json = Annotated[bool, Parameter(name="--json", help="JSON instead of text.", negative=(), show_default=False)]
Yes = Annotated[bool, Parameter(name=("--yes", "-y"), help="Don't ask.", negative=(), show_default=False)]


def chosen_socket(given: str | None) -> str:
    """Raises CommandError when none is named."""
    path = given or os.environ.get(SOCKET_VARIABLE) or ""
    if not path:
        raise CommandError(f"name the daemon's socket: --socket PATH, or {SOCKET_VARIABLE}")
    return path


def chosen_data_dir(given: str | None, *, must_exist: bool = True) -> str:
    """The absolute path. Raises CommandError when none is named, or it isn't there."""
    path = given or os.environ.get(DATA_DIR_VARIABLE) or ""
    if not path:
        raise CommandError(f"name the data directory: --data-dir DIR, or {DATA_DIR_VARIABLE}")
    if must_exist and not os.path.isdir(path):
        raise CommandError(f"there is no directory {path}")
    return os.path.abspath(path)


def chosen_key_file(given: Path | None) -> Path | None:
    """The flag, else the variable, else None."""
    named = os.environ.get(MASTER_KEY_FILE_VARIABLE)
    return given if given is not None else Path(named) if named else None
