"""The daemon in the process of the `minikms` command: for a program with faults in it, or a forked one.

Only here does the command's process become the daemon's without a new interpreter. The flags go through the same file.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from minikms.processes.flags import DAEMON, Flags, write_flags


def install() -> None:
    """In this process, from now on."""
    from minikms.cli import command  # noqa: F401  imports `minikms.cli.serve`

    vars(sys.modules["minikms.cli.serve"])["become_daemon"] = _become_daemon  # the seam


def _become_daemon(flags: Flags, words: Sequence[str]) -> NoReturn:
    from minikms_daemon import serve

    sys.argv = [DAEMON, str(write_flags(flags)), *words]
    serve.main()
    sys.exit(0)
