"""Two processes that try the same thing at the same moment.

Owns: running races. Invariants: both processes are forks that spin until the same moment; the winner holds what it won
until both have reported; an error other than StartError counts as `failed`.
"""

import os
import struct
import time
from collections.abc import Callable
from typing import Protocol

from minikms.api.errors import StartError

HEAD_START_S = 0.005
WON, REFUSED, FAILED = b"w", b"r", b"f"
MOMENT = struct.Struct("d")


class Closable(Protocol):
    def close(self) -> None: ...


def check_races(take: Callable[[int], Closable], rounds: int) -> None:
    """In each round, which is the argument of `take`, it returns in one process and raises StartError in the other."""
    results, reporting = os.pipe()
    orders: list[int] = []
    children: list[int] = []
    try:
        for _ in range(2):
            received, order = os.pipe()
            orders.append(order)
            children.append(os.fork())
            if children[-1] == 0:
                for each in orders:
                    os.close(each)
                _run(take, reporting, received)
            os.close(received)
        os.close(reporting)
        for number in range(rounds):
            moment = MOMENT.pack(time.monotonic() + HEAD_START_S)
            for order in orders:
                os.write(order, moment)
            words = [os.read(results, 1) for _ in children]
            assert sorted(words) == [REFUSED, WON], f"round {number}: {words}"
            for order in orders:
                os.write(order, b"\n")  # the winner releases
    finally:
        for order in orders:
            os.close(order)
        os.close(results)
        for child in children:
            os.waitpid(child, 0)


def _run(take: Callable[[int], Closable], reporting: int, received: int) -> None:
    """In a child, until the orders end; it does not return."""
    try:
        number = 0
        while order := os.read(received, MOMENT.size):
            (start_at,) = MOMENT.unpack(order)
            won = None
            while time.monotonic() < start_at:
                pass
            try:
                won = take(number)
                word = WON
            except StartError:
                word = REFUSED
            except BaseException:  # noqa: BLE001 - reported to the parent, whatever it is
                word = FAILED
            os.write(reporting, word)
            os.read(received, 1)
            if won is not None:
                won.close()
            number += 1
    finally:
        os._exit(0)
