"""The `progressdb` command: with flags only it serves; subcommands do the rest.

`command.py` has the tree of commands, `flags.py` what they share, and each other module a command or a group of them.
Invariant: a root key in the environment is removed from it before anything else is imported. The room must never hold
the work of a command that another room could do.
"""

from __future__ import annotations

import sys
from typing import Final

EXIT_MISSING: Final = 2
"""The same status as in `minikms.commands.usage`, which may not be imported yet."""


def main() -> None:
    """The entry point."""
    from progressdb_server.kms import root_key

    try:
        master_key_fd = root_key.take()
    except root_key.MasterKeyError as error:
        print(f"progressdb: {error}", file=sys.stderr)
        raise SystemExit(EXIT_MISSING) from None
    import gc

    from minikms.commands.usage import COLLECTED_OBJECTS_MIN  # first: it names a library that is missing

    gc.set_threshold(COLLECTED_OBJECTS_MIN)
    from progressdb_server.cli.command import run

    run(master_key_fd)
