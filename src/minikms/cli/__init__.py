"""The `minikms` command.

Owns: flags, exit statuses, and how results are shown. Without a command, it serves. Invariants: no secret in argv; an
error is one sentence on standard error that says what to do next. It must never hold key material itself, and never
import another module before `rootkey` has moved the root key out of the environment.
"""

from __future__ import annotations


def main() -> None:
    from minikms.cli.rootkey import move_out_of_environment

    move_out_of_environment()
    import gc

    from minikms.commands.usage import COLLECTED_OBJECTS_MIN  # first: it names a library that is missing

    gc.set_threshold(COLLECTED_OBJECTS_MIN)
    from minikms.cli.command import run

    run()
