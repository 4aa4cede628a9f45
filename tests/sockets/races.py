"""Two processes that try the same thing at the same moment.

Owns: how a race is run. Invariants: both are forks that spin until one moment, so that they do meet; a winner holds
what it won until both have told, however long the other takes; an error that is not a refusal is neither of the two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

from minikms.errors import StartError

HEAD_START_SECONDS = 0.005
WON, REFUSED, FAILED = b"w", b"r", b"f"


class Closable(Protocol):
    def close(self) -> None: ...


def race(take: Callable[[], Closable]) -> list[str]:
    """What became of the two, sorted: `won` if `take` answered, `refused` if it raised StartError, or else `failed`."""
    start_at = time.monotonic() + HEAD_START_SECONDS
    told, teller = os.pipe()
    held, release = os.pipe()  # its end of file is the word to let go
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os.close(release)
            _run(take, start_at, teller, held)
        children.append(child)
    os.close(teller)
    os.close(held)
    words = [os.read(told, 1) for _ in children]
    os.close(release)
    os.close(told)
    for child in children:
        os.waitpid(child, 0)
    return sorted({WON: "won", REFUSED: "refused"}.get(word, "failed") for word in words)


def _run(take: Callable[[], Closable], start_at: float, teller: int, held: int) -> None:
    """In the child; it does not return."""
    try:
        while time.monotonic() < start_at:
            pass
        won = take()
        os.write(teller, WON)
        os.read(held, 1)
        won.close()
    except StartError:
        os.write(teller, REFUSED)
    except BaseException:
        os.write(teller, FAILED)
    finally:
        os._exit(0)
