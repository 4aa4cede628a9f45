"""One processor for threads that keep handing the interpreter to each other.

Owns: the affinity of a few threads while they do one long piece of work together. Why: a worker that makes many short
system calls beside a busy event loop asks for the interpreter after each of them, and on two processors the two threads
fight for it; a rewrapped key then costs more than twice the time that it takes on one. Invariants: each thread gets its
affinity back; where the system knows no affinity or refuses it (systemd's `@resources`), nothing changes. It must not
last longer than the work: the scheduler knows better in the long run.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from minikms.memory import libc


@contextlib.contextmanager
def on_one_cpu(thread_ids: Sequence[int]) -> Iterator[None]:
    """Keeps these threads (ids of the kernel) of this process on the processor that the caller runs on now."""
    before: dict[int, set[int]] = {}
    with contextlib.suppress(OSError, AttributeError):  # AttributeError: not Linux
        current = libc.library().sched_getcpu()
        for thread_id in thread_ids:
            before[thread_id] = os.sched_getaffinity(thread_id)
            os.sched_setaffinity(thread_id, {current})
    try:
        yield
    finally:
        for thread_id, affinity in before.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread_id, affinity)
