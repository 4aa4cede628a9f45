"""The `progressdb` command: with flags only it serves; subcommands do the rest.

Owns: the words of the command line and the exit statuses: 0 done or intact, 1 refused or wrong, 2 something that was
named is not there. Invariant: a master key in the environment is taken out of it before anything else is imported. A
thin shell: what a command does is in the room that owns it.
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
