"""The `minikms` command.

Owns: parsing of flags, exit codes, and how results are shown. With flags only, it serves. Invariants: nothing secret in
argv; an error is one sentence on standard error that says what to do next. It must never hold key material itself.
"""

from __future__ import annotations


def main() -> None:
    from minikms.cli.rootkey import move_out_of_environment

    move_out_of_environment()
    from minikms.cli.command import run

    run()
