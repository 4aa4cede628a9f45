"""The files of the sealed state."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms import seal_files as files
from minikms.policy.policy import Policy
from minikms.policy.principal import Principal
from minikms.seal_files import AttemptRecords, Marker, Outcome
from minikms_daemon.seal.unseal import FREE_FAILURES, SlowDown

WHO = Policy([1000]).principal(1000, 7) or pytest.fail("uid 1000 is allowed")
OTHER = Policy([1001]).principal(1001, 8) or pytest.fail("uid 1001 is allowed")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def failed(records: AttemptRecords, who: Principal = WHO) -> None:
    records.begin(who, "root_hex").outcome = "wrong_root"


def store(directory: int, records: AttemptRecords) -> None:
    files.write_attempts(directory, records.encode())


def test_a_marker_is_read_back_as_it_was_written(tmp_path: Path, directory: int) -> None:
    assert files.read_marker(directory) is None
    marker = Marker.of(WHO)
    files.write_marker(directory, marker)
    assert files.read_marker(directory) == marker
    assert (tmp_path / files.MARKER_NAME).read_bytes().startswith(b'{"format":"minikms-sealed","version":1,"at":')
    files.remove_seal_files(directory)
    assert files.read_marker(directory) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 2000,
        b"{}",
        b'{"format":"minikms-sealed","version":2,"at":"2026-01-01T00:00:00Z","actor":"peer_uid:0","pid":1}',
        b'{"format":"minikms-sealed","version":1,"at":"2026-01-01T00:00:00Z","actor":"peer_uid:0\\n","pid":1}',
        b'{"format":"minikms-sealed","version":1,"at":"then","actor":"peer_uid:0","pid":1}',
        b" " * (files.MARKER_BYTES_MAX + 1),
    ],
)
def test_a_damaged_marker_still_seals(tmp_path: Path, directory: int, content: bytes) -> None:
    (tmp_path / files.MARKER_NAME).write_bytes(content)
    assert files.read_marker(directory) == Marker()


def test_a_directory_in_the_place_of_the_marker_still_seals(tmp_path: Path, directory: int) -> None:
    (tmp_path / files.MARKER_NAME).mkdir()
    assert files.read_marker(directory) == Marker()


def test_records_are_read_back_and_become_lines(directory: int) -> None:
    records = AttemptRecords([], 0)
    failed(records)
    last = records.begin(OTHER, "from_source")
    store(directory, records)
    again = AttemptRecords.load(directory)
    assert again.encode() == records.encode()
    [event] = records.events(but=last)
    assert (event.type, event.actor, event.pid, event.outcome) == ("unseal_attempt", WHO.actor, 7, "wrong_root")
    assert [event.actor for event in again.events(but=last)] == [WHO.actor, OTHER.actor]


def test_more_records_than_are_kept_are_counted(directory: int) -> None:
    records = AttemptRecords([], 0)
    for _ in range(files.ATTEMPTS_KEPT + 3):
        failed(records)
    store(directory, records)
    assert len(records.encode()) < files.ATTEMPTS_BYTES_MAX
    again = AttemptRecords.load(directory)
    assert (again.dropped, len(again.failed())) == (3, files.ATTEMPTS_KEPT)
    *_, about_dropped = again.events(but=records.begin(WHO, "root_hex"))
    assert about_dropped.count == 3


@pytest.mark.parametrize("outcome", ["refused", "share_kept"])
def test_other_attempts_push_out_no_wrong_ones(directory: int, outcome: Outcome) -> None:
    """So a restart after a flood of them still slows the caller down."""
    records = AttemptRecords([], 0)
    for _ in range(2 * FREE_FAILURES):
        failed(records)
    for _ in range(2 * files.ATTEMPTS_KEPT):
        records.begin(OTHER, "share").outcome = outcome
    store(directory, records)
    again = AttemptRecords.load(directory)
    wrong = [event for event in again.events(but=again.begin(WHO, "share")) if event.outcome == "wrong_root"]
    assert len(wrong) == 2 * FREE_FAILURES
    slow = SlowDown()
    slow.seed(again, 100.0)
    assert slow.wait_s(WHO.actor, 100.0) > 0


@pytest.mark.parametrize(
    "change",
    [{"actor": "root"}, {"actor": "peer_uid:1 "}, {"attempt": "x"}, {"at_ns": -1}, {"at_ns": 1 << 63}, {"pid": -1}],
)
def test_an_altered_record_is_dropped_and_counted(tmp_path: Path, directory: int, change: dict[str, object]) -> None:
    records = AttemptRecords([], 0)
    failed(records)
    file = json.loads(records.encode())
    file["records"][0] |= change
    (tmp_path / files.ATTEMPTS_NAME).write_text(json.dumps(file))
    again = AttemptRecords.load(directory)
    assert (again.dropped, again.failed()) == (1, [])


@pytest.mark.parametrize("change", [{"at": "now"}, {"pid": -1}, {"lease": "lost"}, {"version": 2}, {"more": 1}])
def test_an_altered_record_of_a_lease_gives_no_line(tmp_path: Path, directory: int, change: dict[str, object]) -> None:
    files.write_lapse(directory, lapse := files.Lapse.now("ended"))
    assert files.read_lapse(directory) == lapse
    found = json.loads((tmp_path / files.LAPSE_NAME).read_text())
    (tmp_path / files.LAPSE_NAME).write_text(json.dumps(found | change))
    assert files.read_lapse(directory) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[" * 2000, b'{"format":"x","version":1,"dropped":0}'])
def test_damaged_records_are_counted_and_stop_nothing(tmp_path: Path, directory: int, content: bytes) -> None:
    (tmp_path / files.ATTEMPTS_NAME).write_bytes(content)
    again = AttemptRecords.load(directory)
    assert (again.dropped, again.failed()) == (1, [])
