"""The thread that waits for the disk."""

import asyncio
import threading
from functools import partial

import pytest

from progressdb_server.store.writer import DiskThread


async def test_works_run_in_order_in_one_other_thread_and_their_errors_come_back() -> None:
    ran: list[tuple[int, int]] = []

    def work(number: int) -> None:
        ran.append((number, threading.get_ident()))
        if number == 3:
            raise OSError("no space")

    disk = DiskThread()
    outcomes = await asyncio.gather(*[disk.run(partial(work, n)) for n in range(6)], return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None)] * 3 + [OSError] + [type(None)] * 2
    disk.close()
    assert [number for number, _ in ran] == [*range(6)]
    assert len({thread for _, thread in ran}) == 1
    assert ran[0][1] != threading.get_ident()


async def test_a_cancelled_caller_stops_no_work_and_closing_waits_for_it() -> None:
    gate, ran = threading.Event(), list[int]()

    def wait() -> None:
        assert gate.wait(60)
        ran.append(1)

    disk = DiskThread()
    gone, stays = disk.run(wait), disk.run(lambda: ran.append(2))
    gone.cancel()
    gate.set()
    await stays
    last = disk.run(lambda: ran.append(3))
    await asyncio.to_thread(disk.close)
    assert ran == [1, 2, 3]
    await last
    with pytest.raises(asyncio.CancelledError):
        await gone


def test_a_loop_that_was_closed_meanwhile_leaves_the_thread_alive() -> None:
    disk, gate, ran = DiskThread(), threading.Event(), list[int]()

    async def leave() -> None:
        disk.run(lambda: ran.append(int(gate.wait(60))))

    async def come_back() -> None:
        await disk.run(lambda: ran.append(2))

    asyncio.run(leave())
    gate.set()
    asyncio.run(come_back())
    disk.close()
    assert ran == [1, 2]
