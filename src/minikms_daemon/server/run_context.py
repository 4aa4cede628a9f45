"""What all parts of one process share: its settings, its locked directory, its arena, and its worker threads.

Owns: one worker thread for each kind of disk work, so that none waits behind another's sync; each does one job at a
time. It must never know of an opened data directory, which a seal closes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from minikms.memory.arena import SecretArena
from minikms.memory.process import Measure, name_thread
from minikms.platform.directory_lock import DataDirLock
from minikms.platform.logs import Log
from minikms.platform.notify import Notifier
from minikms_daemon.server.policy_in_force import PolicyInForce
from minikms_daemon.server.settings import Settings


class Workers(NamedTuple):
    """`disk` changes key files and keyring, `reader` reads key files, the others are named after what they serve.

    `seal` writes the files of the sealed state, while the others may still wait for earlier work. `policy` reads
    the policy file: no request of a caller whose rights are being revoked uses it. `lookup` reads lines of the audit
    log, in files that take seconds to decompress.
    """

    disk: ThreadPoolExecutor
    reader: ThreadPoolExecutor
    audit: ThreadPoolExecutor
    upkeep: ThreadPoolExecutor
    seal: ThreadPoolExecutor
    policy: ThreadPoolExecutor
    lookup: ThreadPoolExecutor

    @classmethod
    def start(cls) -> Workers:
        return cls(*(_worker(name) for name in cls._fields))

    def shutdown(self) -> None:
        """Returns when what was begun is done."""
        for worker in self:
            worker.shutdown()


class RunContext(NamedTuple):
    """What all parts of one process share."""

    settings: Settings
    policy: PolicyInForce
    lock: DataDirLock
    arena: SecretArena
    measures: tuple[Measure, ...]
    connections_max: int
    workers: Workers
    notifier: Notifier
    log: Log
    on_internal_error: Callable[[str], None]


def _worker(name: str) -> ThreadPoolExecutor:
    """A worker whose thread runs from now on: where no thread can be made, the daemon does not start."""
    executor = ThreadPoolExecutor(1, initializer=name_thread, initargs=(name,))
    executor.submit(int).result()
    return executor
