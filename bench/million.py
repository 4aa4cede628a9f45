"""A key service with a million keys: how soon it serves after a start, and a KEK rotation that nothing disturbs.

Making the keys takes minutes, so it runs only when it is asked for (`--million`).
"""

from __future__ import annotations

import threading

from bench import keys, programs
from bench.report import Row, figure, say

KEYS = 1_000_000
WATCH_SECONDS = 0.1


def million() -> list[Row]:
    """Start, rotation time, memory growth. Raises BenchError when a key is not under the new version."""
    with programs.workplace() as directory:
        kept = keys.stored(directory, KEYS)
        say(f"million: serves after {figure(kept.seconds_to_serve)} s")
        with programs.minikms(directory) as path:
            pid = keys.wait_for_index(path)
            with Watched(pid) as memory:
                seconds = keys.rotate_idle(path, KEYS)
        say(f"million: rotated in {figure(seconds)} s")
    return [
        keys.start_row(kept, KEYS, 0.5, 0.25),
        Row(f"KEK rotation of {KEYS:,} DEKs, idle otherwise", seconds, "s", 90, 45, less_is_better=True),
        Row(
            f"resident memory growth during the rotation of {KEYS:,} DEKs",
            memory.most_mib - memory.before_mib,
            "MiB",
            64,
            32,
            less_is_better=True,
            note=f"from {memory.before_mib:.0f} MiB",
        ),
    ]


class Watched:
    """The resident memory of a process in MiB: before the block, and the most within it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before_mib = self.most_mib = keys.resident_mib(pid)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(WATCH_SECONDS):
            self.most_mib = max(self.most_mib, keys.resident_mib(self._pid))
