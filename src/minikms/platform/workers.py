"""Blocking work in the worker threads of a process, beside its event loop.

Owns: how a job comes to a thread, and its result to the loop. It must never wait for a job itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


def in_worker(executor: Executor, work: Callable[[], T]) -> asyncio.Future[T]:
    """The result of `work`, or its error. A job that has begun goes on if the caller is cancelled.

    uvloop's `run_in_executor` first examines whether `work` is a coroutine function, for 5 to 15 µs.
    """
    return asyncio.wrap_future(executor.submit(work))
