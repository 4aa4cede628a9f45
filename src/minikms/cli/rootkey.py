"""The master key's way out of the environment.

Owns: moving PROGRESSDB_MINIKMS_MASTER_KEY into a pipe and running the program again without it. Invariant: this runs
before anything else of the program is imported; the process that goes on never had the key in its memory, nor in
/proc/<pid>/environ. It must never put the key into argv.
"""

from __future__ import annotations

import os
import sys
from typing import Final

VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY"
FLAG: Final = "--master-key-fd"
_PIPE_BYTES_MAX: Final = 4096
"""What a pipe takes without a reader (pipe(7): PIPE_BUF); a key is 64 characters."""


def move_out_of_environment() -> None:
    """Does not return when the variable is set: the program runs again, with the key behind `--master-key-fd`.

    An empty variable counts as unset.
    """
    text = os.environ.pop(VARIABLE, "")
    if not text:
        return
    data = os.fsencode(text)
    if len(data) > _PIPE_BYTES_MAX:
        raise SystemExit(f"{VARIABLE} must be 64 hexadecimal characters")
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    os.set_inheritable(reading, True)
    # The same program with the same arguments and one more; nothing here comes from outside the invocation itself.
    os.execve(  # noqa: S606  a shell would be one more place for the key
        sys.executable, [sys.executable, *sys.orig_argv[1:], FLAG, str(reading)], dict(os.environ)
    )
