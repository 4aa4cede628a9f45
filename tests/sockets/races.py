"""Two processes that try the same thing at the same moment.

Owns: how a race is run. Invariants: both are forks that spin until one moment, so that they do meet; the winner holds
what it won until the loser has tried; an error that is not a refusal is neither of the two words.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol

from minikms.errors import StartError

HEAD_START_SECONDS = 0.005
HOLD_SECONDS = 0.02


class Closable(Protocol):
    def close(self) -> None: ...


def race(take: Callable[[], Closable]) -> list[str]:
    """What became of the two, sorted: `won` if `take` answered, `refused` if it raised StartError."""
    start_at = time.monotonic() + HEAD_START_SECONDS
    reader, writer = os.pipe()
    children = [os.fork() or _run(take, start_at, writer) for _ in range(2)]
    os.close(writer)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        return sorted(file.read().split())


def _run(take: Callable[[], Closable], start_at: float, writer: int) -> int:
    """In the child; it does not return."""
    try:
        while time.monotonic() < start_at:
            pass
        won = take()
        os.write(writer, b"won ")
        time.sleep(HOLD_SECONDS)
        won.close()
    except StartError:
        os.write(writer, b"refused ")
    except BaseException as error:
        os.write(writer, f"{type(error).__name__} ".encode())
    finally:
        os._exit(0)
