"""Runs the program again before it reads a key: without the root key in its environment, and with its symbols bound.

Owns: writing PROGRESSDB_MINIKMS_MASTER_KEY into a pipe and running the program again without the variable; running the
daemon with LD_BIND_NOW. Without that, the dynamic linker looks up each library function when the interpreter first
calls it, and saves the vector registers on the stack meanwhile (ld.so(8)). After AES on a processor with AVX-512 they
hold the whole key schedule, and what is written below the stack pointer stays until a deeper call overwrites it.
Invariants: it runs before any other module of the program is imported; the process that goes on never had the key in
its memory or in /proc/<pid>/environ. It must never put the key into argv.
"""

from __future__ import annotations

import os
import sys
from typing import Final

VARIABLE: Final = "PROGRESSDB_MINIKMS_MASTER_KEY"
FLAG: Final = "--master-key-fd"
BIND_VARIABLE: Final = "LD_BIND_NOW"
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
    _run_again(FLAG, str(reading))


def bind_symbols() -> None:
    """Does not return when the program is to serve and the linker binds lazily: it runs again with `LD_BIND_NOW`.

    The other commands do not: they have a key until they end, if any, and are not hardened in any other way (nothing
    keeps them from being dumped or swapped). A help text has none.
    """
    first = sys.argv[1] if len(sys.argv) > 1 else "serve"
    serves = first == "serve" or (first.startswith("-") and first not in ("-h", "--help", "--version"))
    if serves and sys.platform == "linux" and not os.environ.get(BIND_VARIABLE):
        try:
            _run_again()
        except OSError as error:
            print(f"minikms: start it with {BIND_VARIABLE}=1 in its environment ({error.strerror})", file=sys.stderr)
            raise SystemExit(2) from None


def _run_again(*more: str) -> None:
    """The same program with the same arguments and `more`. Raises OSError."""
    os.execve(  # noqa: S606  without a shell, which would hold the key as well
        sys.executable, [sys.executable, *sys.orig_argv[1:], *more], {**os.environ, BIND_VARIABLE: "1"}
    )
