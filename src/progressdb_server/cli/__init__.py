"""The `progressdb` command: with flags only it serves; subcommands do the rest.

`command.py` has the tree of commands, `flags.py` what they share, and each other module a command or a group of them.
Invariant: a master key in the environment is removed from it before anything else is imported. The room must never hold
the work of a command that another room could do.
"""

from __future__ import annotations


def main() -> None:
    """The entry point."""
    from progressdb_server.kms import root_key

    try:
        master_key_fd = root_key.take()
    except root_key.MasterKeyError as error:
        raise SystemExit(f"progressdb: {error}") from None
    from progressdb_server.cli.command import run

    run(master_key_fd)
