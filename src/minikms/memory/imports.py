"""The end of imports: from the hardening on, a process has the code that it had before its first key.

Invariants: after `end_imports` no module is loaded, from wherever; what an error path of the standard library loads
when it is first needed is here before.
"""

from __future__ import annotations

import codecs
import ctypes
import linecache
import sys
import tokenize
import traceback
from typing import Final, NoReturn

_OF_ERROR_PATHS: Final = (linecache, tokenize, traceback, *map(codecs.lookup, ("ascii", "latin-1", "utf-8")))


def _libgcc() -> ctypes.CDLL | None:
    """pthread_exit(3) loads it when the first thread ends, and aborts where it can't."""
    try:
        return ctypes.CDLL("libgcc_s.so.1")
    except OSError:
        return None


_OF_THREADS: Final = _libgcc()


class _NoFinder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> NoReturn:
        raise ImportError(f"{name} is not loaded: nothing is, after the hardening", name=name)


def end_imports() -> None:
    sys.meta_path[:] = [_NoFinder]
