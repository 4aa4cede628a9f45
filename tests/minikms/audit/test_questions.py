"""The newest lines of a log that match: those that a scan finds, from the end, and never silently fewer."""

from pathlib import Path

import msgspec
import pytest

from minikms.audit import blocks, questions
from minikms.audit.queries import Query, find, query
from minikms.audit.questions import Found, Search
from minikms.audit.reader import each_segment, newest_first
from minikms.audit.record import parse_line
from minikms_daemon.audit.maintenance import LogRetention, compress_closed, remove_segments
from tests.minikms.audit.indexed_log import SMALL, Log
from tests.minikms.audit.logmaker import open_log

SOUGHT = [
    query(),
    query(thread="t7"),
    query(thread="t7", reads=True),
    query(thread="t7", reads=True, outcome="not_found"),
    query(thread="nobody"),
    query(key="k_3", actor="peer_uid:1000"),
    query(actor="peer_uid:1001", verb="decrypt", outcome="not_found"),
    query(verb="seal"),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(questions, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(questions, "GROUP_BLOCKS", 2)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path)
    log.write(800)
    return log


class Time:
    """Over after so many looks at it. A search looks after each group of blocks."""

    def __init__(self, looks_max: int = 10**9) -> None:
        self.looks = 0
        self.looks_max = looks_max

    def __call__(self) -> bool:
        self.looks += 1
        return self.looks > self.looks_max


def ask(log: Log, sought: Query, *, before: int = 0, count: int = 7, time: Time | None = None) -> Found:
    search = Search(
        directory=str(log.directory),
        index=str(log.index),
        sought=sought,
        before=before,
        count=count,
        is_late=time or Time(),
    )
    return search.run()


def pages(log: Log, sought: Query, *, count: int = 7, looks: int = 10**9) -> list[int]:
    """The numbers of all lines, asked page by page."""
    seqs: list[int] = []
    before = 0
    while True:
        found = ask(log, sought, before=before, count=count, time=Time(looks))
        assert len(found.events) <= count
        assert found.stopped == "" or looks < 10**9
        seqs += [event.seq for event in found.events]
        assert not found.before or not before or found.before < before, "each page goes on"
        before = found.before
        if not before:
            return seqs


def scanned(log: Log, sought: Query) -> list[int]:
    """A scan learns a key of the thread at the line that gives it, a search before it looks."""
    if "t7" in sought.threads:
        sought = msgspec.structs.replace(sought, thread_keys=("k_7",))
    return [parse_line(line)[0].seq for line in find(str(log.directory), sought)][::-1]


def test_pages_from_the_end_have_what_a_scan_finds_in_any_state(log: Log) -> None:
    for state in ("no index", "part", "indexed", "more lines", "compressed", "retention"):
        if state == "part":
            log.grow(until=log.seq // 2)
        elif state == "indexed":
            log.grow()
        elif state == "more lines":
            log.write(150)
        elif state == "compressed":
            log.grow()
            compress_closed(str(log.directory))
        elif state == "retention":
            opened = open_log(log.directory, clock=log.clock, limits=SMALL)
            assert remove_segments(opened, LogRetention(bytes_max=10_000, days_min=0))
            opened.close()
        for sought in SOUGHT:
            for count in (1, 7, 2000) if sought.threads else (40,):
                assert pages(log, sought, count=count) == scanned(log, sought), (state, sought)


def test_a_time_finds_its_lines_and_reads_few_blocks(log: Log) -> None:
    log.grow()
    events = [parse_line(line)[0] for file in each_segment(str(log.directory)) for line in file.lines()]
    time = Time()
    found = ask(log, query(since_ns=events[300].ts, until_ns=events[320].ts), count=50, time=time)
    assert [event.seq for event in found.events] == [event.seq for event in events[300:320]][::-1]
    assert time.looks < 8


@pytest.mark.parametrize("compressed", [False, True])
def test_a_search_that_is_late_says_so_and_goes_on(log: Log, compressed: bool) -> None:
    log.grow()
    if compressed:
        compress_closed(str(log.directory))
    sought = query(actor="peer_uid:1000", outcome="not_found")
    found = ask(log, sought, count=2000, time=Time(1))
    assert found.stopped == "time" and 0 < found.before <= log.seq
    assert pages(log, sought, looks=2) == scanned(log, sought)


def test_compressed_lines_wait_for_their_index_and_say_so(log: Log) -> None:
    """A page with the newer lines comes, and names where it stopped."""
    log.grow(until=log.seq // 2)
    whole = scanned(log, query(actor="peer_uid:1000"))
    compress_closed(str(log.directory))
    found = ask(log, query(actor="peer_uid:1000"), count=2000)
    seqs = [event.seq for event in found.events]
    assert found.stopped == "index" and seqs == whole[: len(seqs)] and len(seqs) < len(whole)
    late = ask(log, query(thread="t7"), time=Time(0))
    assert (late.stopped, late.events) == ("index", [])
    log.grow()
    assert pages(log, query(actor="peer_uid:1000"), count=2000) == whole


def test_known_keys_of_a_thread_find_its_lines_without_its_name(log: Log) -> None:
    """As in a log with hashed thread ids."""
    log.grow()
    found = ask(log, query(thread="other", thread_keys=["k_7"]), count=2000)
    assert [event.seq for event in found.events] == scanned(log, query(key="k_7"))
    assert found.keys == [], "the log does not name the thread"
    assert ask(log, query(thread="t7")).keys == ["k_7"]


@pytest.mark.parametrize("damage", [b"x" * 4000, b'{"event":{"seq":1}\n' * 9, b"\n\n\0"])
def test_a_damaged_end_of_the_log_hides_no_line_before_it(log: Log, damage: bytes) -> None:
    log.grow(until=log.seq // 2)
    newest = next(newest_first(str(log.directory))).name
    before = scanned(log, query(verb="decrypt"))
    with (log.directory / newest).open("ab") as file:
        file.write(damage)
    assert pages(log, query(verb="decrypt")) == before
