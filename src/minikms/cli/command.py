"""The command tree of `minikms`.

Owns: the names of the commands, and the one place in which an error becomes a sentence and an exit status. A new
command is a module and an entry of COMMANDS. Invariants: a command that writes in the data directory takes its lock,
one that only reads works beside a running daemon; a command's module is imported when the command runs, so that a start
takes a fifth of a second at most.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, Final, NoReturn

from minikms.cli.console import explained
from minikms.cli.rootkey import FLAG as MASTER_KEY_FLAG
from minikms.cli.serve import serve
from minikms.commands import usage
from minikms.commands.usage import PAGES, CommandError, Shell, new_app, prepared, print_completion, unknown_command

COMMANDS: Final = {
    "init": ("init:init", "Make a data directory, and a root key file if there is none."),
    "status": ("status:status", "Show the state of the running daemon."),
    "ready": ("status:ready", "Check that the running daemon serves; with --live, that it answers."),
    "keys": ("keys:app", "List, show, retire and destroy keys."),
    "rotate-kek": ("kek:rotate_kek", "Make a new KEK and wrap every key under it, while the daemon serves."),
    "kek": ("kek:app", "List key-encryption keys (KEKs), and destroy those that nothing needs."),
    "seal": ("seal:seal", "Zero every key of the running daemon at once."),
    "unseal": ("seal:unseal", "Give a sealed daemon a share of the root key, or the root key itself."),
    "root": ("root:app", "List, add, test and remove root keys."),
    "pin": ("pin:app", "As root, name the root keys that may open the keyring."),
    "replica": ("replica:app", "Add, list, promote and remove the hosts of a key service on several hosts."),
    "policy": ("policy:app", "Check, explain and reload a policy file."),
    "encrypt": ("files:encrypt", "Encrypt a file or a pipe of any size."),
    "decrypt": ("files:decrypt", "Decrypt the output of `minikms encrypt`."),
    "receipt": ("receipt:app", "Check the receipt of a destroyed key."),
    "backup": ("backup:app", "Create, verify, restore, list and prune backup archives."),
    "doctor": ("doctor:doctor", "Look for problems, and say what to do about each."),
    "audit": ("audit:app", "Verify and read the audit log."),
    "completion": ("command:completion", "Print the completion script of a shell."),
}
"""Each command beside `serve`: its module and function in `minikms.cli`, and one line of help."""

HELPERS: Final = {"auditor": "minikms_auditor", "gateway": "minikms_gateway", "unlock": "minikms_unlock"}
"""Programs of this distribution that are processes of their own: `minikms NAME …` runs `minikms-NAME`, as git does."""

app = new_app(
    "minikms",
    "A local, hardened key service. Without a command it runs `serve`.",
    "`minikms unlock …` runs minikms-unlock: root keys from a passphrase. "
    "`minikms gateway …` runs minikms-gateway, for other hosts. `minikms auditor …` runs minikms-auditor, which has "
    "the audit log witnessed. "
    f"{PAGES}Exit status: 0 done, 1 a check failed or a refusal, 2 wrong usage or something is missing.",
)
app.default(serve)
app.command(serve, name="serve")
for _name, (_place, _help) in COMMANDS.items():
    app.command(f"minikms.cli.{_place}", name=_name, help=_help)


def completion(shell: Shell) -> int:
    """Print the completion script of a shell. For bash and zsh: source <(minikms completion bash)"""
    from importlib import import_module

    for name, package in HELPERS.items():
        app.command(import_module(f"{package}.command").app, name=name)
    return print_completion(app, "minikms", shell)


def run() -> None:
    """Runs the command line and ends the process. An error that is neither ours nor the system's is a defect: its
    traceback is shown.
    """
    usage.run("minikms", _command, explained)


def _command() -> Any:
    words = prepared(app, _with_needed_root_key(sys.argv[1:]))
    if words and words[0] in HELPERS:
        _run_helper(words[0], words[1:])
    if unknown := unknown_command("minikms", words, ["serve", *COMMANDS, *HELPERS]):
        raise CommandError(unknown)
    return app(words, print_error=False, exit_on_error=False)


def _with_needed_root_key(words: list[str]) -> list[str]:
    """The command line. If a root key from the environment ends it and the command takes none, its descriptor is closed
    and left out.
    """
    if words[-2:-1] != [MASTER_KEY_FLAG] or not words[-1].isdecimal() or _takes_root_key(words[:-2]):
        return words
    with contextlib.suppress(OSError):
        os.close(int(words[-1]))
    return words[:-2]


def _takes_root_key(words: list[str]) -> bool:
    if words and words[0] in HELPERS:
        return False
    command = app.parse_commands(words)[1][-1]
    if command.default_command is None:
        return False
    return any(MASTER_KEY_FLAG in argument.names for argument in command.assemble_argument_collection())


def _run_helper(name: str, words: list[str]) -> NoReturn:
    """Replaces this process by the helper of this installation. -P: never one from the working directory."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", HELPERS[name], *words])  # noqa: S606  without a shell
