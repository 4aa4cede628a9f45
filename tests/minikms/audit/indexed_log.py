"""A log in small segments, in which each thread is used for a while, and its index."""

import random
from pathlib import Path

from minikms.audit.blocks import Indexer, Lookup, usable_blocks
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.queries import Query, find
from minikms.audit.reader import each_segment
from minikms.audit.record import Event
from tests.minikms.audit.logmaker import Clock, open_log

SMALL = LogLimits(segment_bytes=40_000, reserve_bytes=0)
THREADS = 40


class Log:
    """A log in segments, in which each thread is used for a while, and its index."""

    def __init__(self, base: Path) -> None:
        self.directory, self.index = base / "log", base / "index"
        self.directory.mkdir()
        self.clock = Clock(step=CHORES_NS)
        self._random = random.Random(7)
        self.count = 0

    def write(self, count: int) -> None:
        log = open_log(self.directory, clock=self.clock, limits=SMALL)
        for number in range(self.count, self.count + count):
            log.add(self._event(number))
            log.commit()
        self.count += count
        log.close()
        self.seq = log.writer.head.seq

    def _event(self, number: int) -> Event:
        thread = min(number // 20, THREADS - 1) if self._random.random() < 0.9 else self._random.randrange(THREADS)
        named: dict[str, object] = {"key_id": f"k_{thread}", "request_id": f"r{number}"}
        kind = self._random.choice(("encrypt", "decrypt", "get_or_create_dek", "decrypt_batch"))
        if kind == "get_or_create_dek":
            named["thread_id"] = f"t{thread}"
        elif kind == "decrypt_batch":
            named["key_id"], named["key_ids"] = "", [f"k_{thread}", f"k_{(thread + 1) % THREADS}"]
        outcome = self._random.choice(("ok", "ok", "ok", "not_found"))
        actor = f"peer_uid:{1000 + (number > 700)}"
        return Event(type=kind, actor=actor, outcome=outcome, **named)  # type: ignore[arg-type]  # chosen above

    def grow(self, calls: int = 60, until: int | None = None, by: Indexer | None = None) -> Indexer:
        indexer = by or Indexer(str(self.index), str(self.directory))
        for _ in range(calls):
            indexer.grow(self.seq if until is None else until)
        indexer.close()
        return indexer

    def find(self, sought: Query) -> Lookup:
        """By the index, after a check that a scan finds the same."""
        lookup = Lookup(str(self.index), str(self.directory))
        scanned = list(find(str(self.directory), sought))
        assert list(find(str(self.directory), sought, lookup)) == scanned
        return lookup

    def covered(self) -> list[int]:
        """The last line in the index of each segment."""
        found = []
        for file in each_segment(str(self.directory)):
            usable = usable_blocks(str(self.index), str(self.directory), file)
            found.append(usable[-1].last_seq if usable else 0)
        return found
