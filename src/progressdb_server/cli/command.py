"""The commands of `progressdb`.

Owns: the command tree, the flags of `serve`, and the one place in which an error becomes a sentence and an exit status.
Invariant: the module of a command is imported when the command runs, so that the start stays fast. A thin shell: the
work of a command is in its module, or in the room that owns it.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any, Final

from cyclopts import Parameter

from minikms.commands import usage
from minikms.commands.usage import (
    EXIT_FAILED,
    EXIT_MISSING,
    PAGES,
    CommandError,
    Shell,
    new_app,
    print_completion,
)
from progressdb_server.cli.flags import MasterKeyFd, ServerFlags

COMMANDS: Final = {
    "status": ("status:status", "Show the server and its key service on one page."),
    "doctor": ("doctor:doctor", "Ask the running server what is wrong, and retire keys that no thread names."),
    "check": ("check:check", "Examine the whole store, also while the server runs."),
    "store": ("store:app", "Make or upgrade the tables of a store in PostgreSQL, or copy a store."),
    "backup": ("backup:app", "Back up store and key service, verify and restore backups."),
    "config": ("configuration:app", "Check or show the configuration that the server would run with."),
    "rotate-dek": ("jobs:rotate_dek", "Give threads new keys and re-encrypt their records."),
    "jobs": ("jobs:app", "List, follow and control the background jobs of a running server."),
    "rotation-backups": ("jobs:backups", "List, restore and remove the backups that key rotations made."),
    "completion": ("command:completion", "Print the completion script of a shell."),
}
"""Each command except `serve`: its function or group, and its help in one line. To add a command, add its module and an
entry here.
"""


app = new_app(
    "progressdb",
    "The ProgressDB message server. Without a command it runs `serve`.",
    f"{PAGES}Exit status: 0 done, 1 a check failed or a refusal, 2 wrong usage or something is missing.",
)
for _name, (_place, _help) in COMMANDS.items():
    app.command(f"progressdb_server.cli.{_place}", name=_name, help=_help)


@app.default
@app.command(name="serve")
def serve(
    *,
    flags: ServerFlags = ServerFlags(),
    log_format: Annotated[str | None, Parameter(help="console or json [PROGRESSDB_LOG_FORMAT].")] = None,
    accept_restore: Annotated[
        bool, Parameter(help="Serve although the key service is in an older state than the store has recorded.")
    ] = False,
    master_key_fd: MasterKeyFd = None,
) -> None:
    """Serve the HTTP API until SIGTERM."""
    from progressdb_server import server
    from progressdb_server.store.model import StoreDamagedError, StoreUnavailableError

    config = flags.load(log_format).config
    try:
        server.run(config, master_key_fd, accept_restore=accept_restore)
    except StoreDamagedError:  # as an older state of the key service, it does not pass without a person
        raise
    except StoreUnavailableError as error:
        raise CommandError(error.explained, EXIT_FAILED) from None
    except server.ServeError as error:
        raise CommandError(str(error), error.exit_status) from None


def completion(shell: Shell) -> int:
    """Print the completion script of a shell. For bash and zsh: source <(progressdb completion bash)"""
    return print_completion(app, "progressdb", shell)


def run(master_key_fd: int | None) -> None:
    """Run the command line and end the process. `master_key_fd` holds the root key that was in the environment; the
    command passes it to its child and closes it."""

    def run_command() -> Any:
        words = usage.prepared(app, sys.argv[1:])
        if unknown := usage.unknown_command("progressdb", words, ["serve", *COMMANDS]):
            raise CommandError(unknown)
        command, bound, unparsed = app.parse_args(words, print_error=False, exit_on_error=False)
        key_argument = {"master_key_fd": master_key_fd} if "master_key_fd" in unparsed else {}
        if not key_argument and master_key_fd is not None:
            os.close(master_key_fd)  # this command needs no key
        return command(*bound.args, **bound.kwargs, **key_argument)

    usage.run("progressdb", run_command, _explained)


def _explained(error: Exception) -> tuple[str, int]:
    """The sentence and the exit status. Raises an error that is none of a user: it is a defect."""
    from progressdb_server.config import ConfigError
    from progressdb_server.store.epoch import RestoredError
    from progressdb_server.store.model import BackupError, FormatError, StoreUnavailableError

    if isinstance(error, CommandError):
        return str(error), error.exit_status
    if isinstance(error, StoreUnavailableError):
        return error.explained, EXIT_MISSING
    if isinstance(error, (BackupError, ConfigError, FormatError, RestoredError)):
        return str(error), EXIT_FAILED if isinstance(error, BackupError) else EXIT_MISSING
    return usage.explained_system(error, "progressdb"), EXIT_MISSING
