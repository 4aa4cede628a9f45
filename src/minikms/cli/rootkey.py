"""Runs the program again without the root key in its environment.

Owns: writing PROGRESSDB_MINIKMS_MASTER_KEY into a pipe and running the program again without the variable. Invariants:
it runs before any other module of the program is imported; the process that goes on never had the key in its memory or
in /proc/<pid>/environ. It must never put the key into argv.
"""

from __future__ import annotations

import os
import sys
from typing import Final

VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY"
FLAG: Final = "--master-key-fd"
_PIPE_BYTES_MAX: Final = 4096
"""A pipe takes this much without a reader (pipe(7): PIPE_BUF); a key is 64 characters."""


def move_out_of_environment() -> None:
    """Does not return when the variable is set: the program runs again, with the key behind `--master-key-fd`.

    An empty variable counts as unset.
    """
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return
    data = os.fsencode(text)
    if len(data) > _PIPE_BYTES_MAX:
        print(f"minikms: {VARIABLE} must be 64 hexadecimal characters", file=sys.stderr)
        raise SystemExit(2)  # wrong usage, as in `minikms.cli.console`
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    os.set_inheritable(reading, True)
    os.execv(  # noqa: S606  without a shell, which would hold the key as well
        sys.executable, [sys.executable, *sys.orig_argv[1:], FLAG, str(reading)]
    )
