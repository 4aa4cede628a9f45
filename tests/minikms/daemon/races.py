"""Two processes that try the same thing at the same moment.

Owns: running a race. Invariants: both processes are forks that spin until the same moment; the winner holds what it
won until both have reported; an error other than StartError counts as `failed`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

from minikms.api.errors import StartError

HEAD_START_SECONDS = 0.005
WON, REFUSED, FAILED = b"w", b"r", b"f"


class Closable(Protocol):
    def close(self) -> None: ...


def race(take: Callable[[], Closable]) -> list[str]:
    """The two results, sorted: `won` if `take` returned, `refused` if it raised StartError, else `failed`."""
    start_at = time.monotonic() + HEAD_START_SECONDS
    results, reporting = os.pipe()
    held, release = os.pipe()  # the end of file tells the winner to release
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(release)
            _run(take, start_at, reporting, held)
        children.append(child)
    os.close(reporting)
    os.close(held)
    words = [os.read(results, 1) for _ in children]
    os.close(release)
    os.close(results)
    for child in children:
        os.waitpid(child, 0)
    return sorted({WON: "won", REFUSED: "refused"}.get(word, "failed") for word in words)


def _run(take: Callable[[], Closable], start_at: float, reporting: int, held: int) -> None:
    """In the child; it does not return."""
    try:
        while time.monotonic() < start_at:
            pass
        won = take()
        os.write(reporting, WON)
        os.read(held, 1)
        won.close()
    except StartError:
        os.write(reporting, REFUSED)
    except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
        os.write(reporting, FAILED)
    finally:
        os._exit(0)
