"""The command tree of `minikms`, and the end of every command.

Owns: the names of the commands, and the one place in which an error becomes a sentence and an exit status. A new
command is a module and an entry of COMMANDS. Invariants: a command that writes in the data directory takes its lock,
one that only reads works beside a running daemon; a command's module is imported when the command runs, so that a start
takes a fifth of a second at most.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Final, Literal

from cyclopts import App, Parameter

from minikms.cli.console import EXIT_GOOD, EXIT_INTERRUPTED, EXIT_MISSING, EXIT_READER_LEFT, complain, explained
from minikms.cli.serve import serve

COMMANDS: Final = {
    "init": ("init:init", "Make a data directory, and a root key file if there is none."),
    "status": ("status:status", "Show the state of the running daemon."),
    "keys": ("keys:app", "List, show, retire and destroy keys."),
    "rotate-kek": ("kek:rotate_kek", "Make a new KEK and wrap every key under it, while the daemon serves."),
    "kek": ("kek:app", "List key-encryption keys (KEKs), and destroy those that nothing needs."),
    "encrypt": ("files:encrypt", "Encrypt a file or a pipe of any size."),
    "decrypt": ("files:decrypt", "Decrypt the output of `minikms encrypt`."),
    "backup": ("backup:app", "Create, verify, restore, list and prune backup archives."),
    "doctor": ("doctor:doctor", "Look for problems, and say what to do about each."),
    "audit": ("audit:app", "Verify and read the audit log."),
    "demo": ("demo:demo", "Run the commands on example data in a temporary directory."),
    "completion": ("command:completion", "Print the completion script of a shell."),
}
"""By name, each command beside `serve`: its module and function in `minikms.cli`, and its help in a line."""

app = App(
    name="minikms",
    help="A local, hardened key service. Without a command it runs `serve`.",
    help_format="plaintext",  # what Markdown needs takes long to import
    help_epilogue="Exit status: 0 done, 1 a check failed or a refusal, 2 wrong usage or something is missing.",
    version_flags=["--version"],
    version="0.1.0",
)
app.default(serve)
app.command(serve, name="serve")
for _name, (_place, _help) in COMMANDS.items():
    app.command(f"minikms.cli.{_place}", name=_name, help=_help)


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="The shell.")]) -> int:
    """Print the completion script of a shell. For bash: source <(minikms completion bash)"""
    print(app.generate_completion(prog_name="minikms", shell=shell), end="")
    return EXIT_GOOD


def run() -> None:
    """Runs the command line and ends the process. An error that is neither ours nor the system's is a defect: its
    traceback is shown.
    """
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
        # The reader closed the pipe. Python flushes once more at exit, and must not report that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_READER_LEFT)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001  defects are raised again by `explained`
        text, exit_status = explained(error)
        complain(text)
        sys.exit(exit_status)


def _mistyped(words: list[str]) -> str:
    """The error text for a first word that is no command: `serve` takes flags only, so it can't be an argument."""
    if not words or words[0].startswith("-") or words[0] in ("serve", *COMMANDS):
        return ""
    from difflib import get_close_matches

    close = get_close_matches(words[0], ["serve", *COMMANDS], n=1)
    meant = f"Did you mean `minikms {close[0]}`?" if close else "`minikms --help` lists the commands."
    return f"there is no command {words[0]!r}. {meant}"
