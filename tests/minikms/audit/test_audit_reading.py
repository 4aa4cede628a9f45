"""Finding, counting and following the lines of a log."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from minikms.audit import Event, queries, record
from minikms.audit.following import LogFollower, last_lines
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.audit.reader import DamagedSegmentError
from minikms_daemon.audit.maintenance import compress_closed
from tests.minikms.audit.logmaker import KEY1, LOG, Clock, encrypt_event, lines_of, make_log, open_log, write_events

SMALL_SEGMENTS = LogLimits(segment_bytes=3000, reserve_bytes=0)


def seqs(lines: Sequence[bytes]) -> list[int]:
    return [record.peek_seq(line) for line in lines]


def make_segments(directory: Path, count: int = 60) -> int:
    """A log of several files, the oldest compressed; its last seq."""
    log = make_log(directory, count, clock=Clock(step=CHORES_NS), limits=SMALL_SEGMENTS)
    os.rename(directory / f"{LOG}.3", directory / "kept")
    compress_closed(str(directory))
    os.rename(directory / "kept", directory / f"{LOG}.3")
    return int(log.head["seq"])


# --- find and count --------------------------------------------------------------------------------------------------


@pytest.fixture
def searched(tmp_path: Path) -> str:
    log = open_log(tmp_path)
    log.add(encrypt_event(1, thread_id="t1"))
    log.add(encrypt_event(2, thread_id="t2"))
    log.add(Event(type="encrypt_batch", actor="peer_uid:7", key_ids=["k_a", "k_b"], request_ids=["r8", "r9"], count=2))
    log.add(Event(type="decrypt", actor="peer_uid:1000", key_id="k_a", outcome="forbidden", detail="t1 r1 k_b"))
    log.add(Event(type="create_dek", actor="peer_uid:7", thread_id='bad "id"\n', outcome="invalid_request"))
    log.close()
    with open(tmp_path / LOG, "ab") as file:
        file.write(b"not a line, but t1 and k_a are in it\n")
    return str(tmp_path)


def found(directory: str, **sought: str) -> list[int]:
    return seqs(list(queries.find(directory, queries.query(**sought))))  # type: ignore[arg-type]  # all of them are text


def test_lines_are_found_by_thread_key_actor_and_request_id(searched: str) -> None:
    assert found(searched, thread="t1") == [2]
    assert found(searched, key="k_a") == [4, 5]
    assert found(searched, key="k_b") == [4], "not by a word in the detail"
    assert found(searched, actor="peer_uid:7") == [4, 6]
    assert found(searched, actor="peer_uid:1000", request="r2") == [3]
    assert found(searched, request="r9") == [4]
    assert found(searched, key="k_a", actor="peer_uid:7") == [4]
    assert found(searched, thread="t") == []


def test_a_text_is_found_in_the_form_that_a_person_types(searched: str) -> None:
    assert found(searched, thread='bad "id"\n') == [6]


def test_hidden_thread_ids_are_found_with_the_audit_key(tmp_path: Path) -> None:
    log = open_log(tmp_path, hash_thread_ids=True)
    log.add(encrypt_event(1, thread_id="payroll"))
    log.close()
    assert found(str(tmp_path), thread="payroll") == []
    sought = queries.query(thread="payroll", audit_keys=[memoryview(bytes(32)), KEY1.mac_key])
    assert seqs(list(queries.find(str(tmp_path), sought))) == [2]


def test_lines_are_found_in_every_file(tmp_path: Path) -> None:
    make_segments(tmp_path)
    assert len(found(str(tmp_path), actor="peer_uid:1000")) == 60


# --- the end, and what comes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 30, 61, 1000])
def test_the_last_lines_come_from_as_many_files_as_it_takes(tmp_path: Path, count: int) -> None:
    last = make_segments(tmp_path)
    assert seqs(last_lines(str(tmp_path), count)) == list(range(max(1, last - count + 1), last + 1))


def test_the_last_lines_are_read_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.audit.following._BACKWARDS_BYTES", 1000)
    make_log(tmp_path, 200)
    (tmp_path / LOG).write_bytes(b"damaged" + (tmp_path / LOG).read_bytes()[7:])
    assert seqs(last_lines(str(tmp_path), 20)) == list(range(183, 203))


def test_a_follower_yields_each_line_once_across_rotation_and_compression(tmp_path: Path) -> None:
    log = open_log(tmp_path, clock=Clock(step=CHORES_NS), limits=SMALL_SEGMENTS)
    follower = LogFollower(str(tmp_path))
    got: list[bytes] = []
    for turn in range(40):
        write_events(log, 3, first=3 * turn)
        if turn % 3:
            got += follower.read(7)
        if turn % 10 == 9:
            compress_closed(str(tmp_path))
    while more := follower.read():
        got += more
    assert seqs(got) == list(range(1, int(log.head["seq"]) + 1))
    assert follower.read() == []
    follower.close()
    log.close()


def test_a_follower_begins_after_a_line(tmp_path: Path) -> None:
    last = make_segments(tmp_path)
    follower = LogFollower(str(tmp_path), after_seq=last - 3)
    assert seqs(follower.read()) == [last - 2, last - 1, last]
    follower.close()


def test_a_follower_waits_for_the_rest_of_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms.audit.reader.GROWTH_WAIT_S", 0)
    make_log(tmp_path, 3)
    content = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(content[:-50])
    follower = LogFollower(str(tmp_path))
    assert seqs(follower.read()) == [1, 2, 3, 4]
    assert follower.read() == []
    (tmp_path / LOG).write_bytes(content)
    assert seqs(follower.read()) == [5]
    follower.close()


def add_forged_line(directory: Path) -> None:
    """A line with a huge `seq`, as a writer beside the daemon could append it, and then a true one."""
    *lines, last = lines_of(directory)
    forged = re.sub(rb'"seq":[0-9]+', b'"seq":9000000000000000000', last, count=1)
    (directory / LOG).write_bytes(b"".join(line + b"\n" for line in (*lines, forged, last)))


def test_a_follower_says_where_the_numbers_of_lines_jump(tmp_path: Path) -> None:
    """It hands out the lines before, and then fails for ever: it must not wait for a line after the forged one."""
    make_log(tmp_path, 5)
    add_forged_line(tmp_path)
    for after_seq, before in ((0, [1, 2, 3, 4, 5, 6]), (9_000_000_000_000_000_000, [])):
        follower = LogFollower(str(tmp_path), after_seq=after_seq)
        if before:
            assert seqs(follower.read()) == before
        for _ in range(2):
            with pytest.raises(
                DamagedSegmentError, match=r"line 6 of the audit log is followed by .* 9000000000000000000"
            ):
                follower.read()
        follower.close()
