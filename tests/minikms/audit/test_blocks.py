"""The index of the log: a reader by it finds what a scan finds, and reads less."""

import re
from pathlib import Path

import pytest

from minikms.audit import blocks, record
from minikms.audit.blocks import Indexer, parse_blocks
from minikms.audit.queries import query
from minikms.audit.reader import DamagedSegmentError, each_segment, segment_name
from minikms_daemon.audit.maintenance import LogRetention, compress_closed, remove_segments
from tests.minikms.audit.indexed_log import SMALL, Log
from tests.minikms.audit.logmaker import LOG, open_log

SOUGHT = [
    *(query(thread=f"t{number}") for number in (0, 7, 39)),
    query(thread="t7", reads=True),
    query(thread="nobody"),
    query(key="k_3", actor="peer_uid:1000"),
    query(key="k_nobody"),
    query(actor="peer_uid:1001"),
    query(request="r77"),
    query(reads=True),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(blocks, "FILE_BYTES_MAX", 20_000)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path)
    log.write(800)
    return log


def test_a_reader_by_the_index_finds_what_a_scan_finds(log: Log) -> None:
    for step in ("none", "part", "whole", "more lines", "compressed", "made anew", "retention"):
        if step == "part":
            log.grow(until=log.seq // 2)
        elif step == "more lines":
            log.grow()
            log.write(200)
        elif step == "compressed":
            compress_closed(str(log.directory))
        elif step == "made anew":
            for file in log.index.iterdir():
                file.unlink()
            log.grow()
        elif step == "retention":
            opened = open_log(log.directory, clock=log.clock, limits=SMALL)
            assert remove_segments(opened, LogRetention(bytes_max=10_000, days_min=0))
            opened.close()
            log.grow()
            numbers = [file.number for file in each_segment(str(log.directory))]
            assert sorted(int(file.name) for file in log.index.iterdir()) == numbers, "the rest of the index is removed"
        for sought in SOUGHT:
            log.find(sought)


def test_only_blocks_that_may_match_are_read(log: Log) -> None:
    log.grow()
    for compressed in (False, True):
        if compressed:
            compress_closed(str(log.directory))
        nobody = log.find(query(thread="nobody"))
        assert (nobody.taken, nobody.whole) == (0, 0) and nobody.left_out > 60
        one = log.find(query(key="k_3", actor="peer_uid:1000"))
        assert 0 < one.taken < nobody.left_out / 3
        assert log.find(query(request="r77")).whole == len(log.covered()), "the index has no requests"


def test_the_index_holds_no_line_that_is_not_durable(log: Log) -> None:
    log.grow(until=100)
    assert 0 < max(log.covered()) <= 100
    log.grow()
    assert log.seq - 20 < max(log.covered()) <= log.seq


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbage", "huge", "directory", "of another segment"])
def test_a_damaged_index_is_not_used_and_is_made_anew(log: Log, damage: str) -> None:
    log.grow()
    path, whole = log.index / "2", log.covered()
    content = path.read_bytes()
    half = len(content) // 2
    if damage == "directory":
        path.unlink()
        path.mkdir()
    else:
        flipped = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        others = {"cut": content[:half], "flipped": flipped, "garbage": b"\xff" * 5000, "huge": b""}
        path.write_bytes(others.get(damage) or (log.index / "3").read_bytes())
    if damage == "huge":
        with path.open("r+b") as file:
            file.truncate(blocks.FILE_BYTES_MAX + 1)
    for sought in SOUGHT:
        log.find(sought)
    if damage != "directory":  # the auditor shows that error
        log.grow()
        assert log.covered() == whole


@pytest.mark.parametrize("restarted", [False, True])
def test_an_index_of_lines_that_were_replaced_is_not_used(log: Log, restarted: bool) -> None:
    """An older copy of the log goes on with other lines, of the same length."""
    older = {path: path.read_bytes() for path in log.directory.iterdir()}
    log.write(100)
    indexer = log.grow()
    for path in log.directory.iterdir():
        path.unlink()
    for path, content in older.items():
        path.write_bytes(content)
    log.count += 100
    log.write(150)
    for step in ("replaced", "indexed", "compressed"):
        if step == "indexed":
            log.grow(by=None if restarted else indexer)
            assert not restarted or all(log.covered()[:-1])
        elif step == "compressed":
            compress_closed(str(log.directory))
        for sought in SOUGHT:
            log.find(sought)


def test_a_file_of_the_index_has_a_bounded_number_of_blocks(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    log.grow()
    monkeypatch.setattr(blocks, "BLOCKS_COUNT_MAX", 2)
    for path in log.index.iterdir():
        assert len(parse_blocks(path.read_bytes())) <= 2
    for sought in SOUGHT:
        log.find(sought)


@pytest.mark.parametrize("number", [b"-1", b"18446744073709551616"])
def test_a_line_with_a_number_out_of_range_is_a_damaged_line(log: Log, number: bytes) -> None:
    for path in log.directory.iterdir():
        path.write_bytes(re.sub(rb'"ts":\d+', b'"ts":' + number, path.read_bytes()))
    indexer = Indexer(str(log.index), str(log.directory))
    with pytest.raises(DamagedSegmentError):
        indexer.grow(log.seq)
    indexer.close()


def test_blocks_say_what_and_when_for_later_readers(log: Log) -> None:
    log.grow()
    found = parse_blocks((log.index / "1").read_bytes())
    lines = (log.directory / segment_name(1)).read_bytes()
    assert (found[0].begin, found[-1].end, found[-1].closed) == (0, len(lines), 1)
    for block in found:
        events = [record.parse_line(line)[0] for line in lines[block.begin : block.end].split(b"\n")[:-1]]
        assert (block.ts_min, block.ts_max) == (events[0].ts, events[-1].ts)
        for field, texts in (
            (blocks.KEY, {event.key_id for event in events} - {""}),
            (blocks.THREAD, {event.thread_id for event in events} - {""}),
            (blocks.ACTOR, {event.actor for event in events}),
            (blocks.TYPE, {event.type for event in events}),
            (blocks.OUTCOME, {event.outcome for event in events}),
        ):
            assert all(block.has([blocks.name_number(field, text)]) for text in texts)
    assert not (log.directory / LOG).samefile(log.index / "1")
