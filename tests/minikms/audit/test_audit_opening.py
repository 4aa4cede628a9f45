"""Opening a log at start: each row of the decision table in `minikms.audit.repair`."""

import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.audit import ExpectedLog, reader, record, repair, writer
from minikms.audit.reader import each_segment
from minikms.audit.record import LineRef
from minikms_daemon.audit.maintenance import compress_closed
from tests.harness.reading import bytes_read
from tests.minikms.audit.logmaker import (
    KEY1,
    KEY2,
    LOG,
    Clock,
    Key,
    encrypt_event,
    events_of,
    lines_of,
    make_log,
    make_segments,
    open_log,
    types_of,
    verify,
    write_events,
)


def head_of(directory: Path, number: int) -> LineRef:
    return LineRef(number, record.parse_line(lines_of(directory)[number - 1])[2])


def kill(directory: Path, count: int = 5, key: Key = KEY1) -> None:
    """A log whose writer ended without closing it."""
    write_events(open_log(directory, key), count)


def kill_confirmed(directory: Path, count: int = 5) -> None:
    """As `kill`, with all lines on the disk."""
    log = open_log(directory)
    write_events(log, count)
    log.sync.fdatasync()


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


@pytest.mark.parametrize("near_bytes", [1, 300, 5000, reader.NEAR_BYTES])
def test_a_line_is_found_by_its_number_in_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near_bytes: int
) -> None:
    monkeypatch.setattr(reader, "NEAR_BYTES", near_bytes)
    make_segments(tmp_path)
    compress_closed(str(tmp_path))
    lines = [line for file in each_segment(str(tmp_path)) for line in file.lines()]
    assert len(lines) > 60
    assert [reader.line_of(str(tmp_path), number + 1) for number in range(len(lines))] == lines
    assert reader.line_of(str(tmp_path), len(lines) + 1) is None


def test_a_line_near_the_end_is_found_without_reading_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a start with an expected line would take longer for a larger file."""
    make_log(tmp_path, 2000)
    lines = lines_of(tmp_path)
    monkeypatch.setattr(reader, "NEAR_BYTES", 10_000)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1000)
    before = bytes_read()
    assert reader.line_of(str(tmp_path), len(lines) - 5) == lines[-6]
    read = bytes_read() - before
    assert 0 < read < 50_000 < (tmp_path / LOG).stat().st_size


def test_a_first_start_begins_a_log_with_a_genesis_line(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    [genesis] = events_of(tmp_path / LOG)
    assert (genesis.type, genesis.seq, genesis.actor) == ("genesis", 1, "minikms")
    assert set(genesis.facts) == {"format", "key", "log_id", "public_key", "segment"}
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600
    log.close()
    assert verify(tmp_path).intact


def test_a_missing_log_that_is_expected_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"missing.*--accept-audit-loss"):
        open_log(tmp_path, expected=ExpectedLog(exists=True))
    assert snapshot(tmp_path) == {}


def test_an_empty_log_that_is_expected_is_refused(tmp_path: Path) -> None:
    (tmp_path / LOG).touch()
    with pytest.raises(StartError, match="is empty, but there was one"):
        open_log(tmp_path, expected=ExpectedLog(exists=True))


def test_a_log_with_an_incomplete_genesis_line_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b'{"event":{"seq":1,')
    open_log(tmp_path).close()
    assert types_of(tmp_path) == ["genesis", "recovery", "checkpoint"]
    assert verify(tmp_path).intact


def test_a_log_continues_after_its_writer_was_killed(tmp_path: Path) -> None:
    kill(tmp_path)
    make_log(tmp_path, 2)
    assert types_of(tmp_path) == ["genesis"] + ["encrypt"] * 7 + ["checkpoint"]
    assert verify(tmp_path).intact


def test_an_incomplete_last_line_is_moved_aside_and_recorded(tmp_path: Path) -> None:
    kill(tmp_path)
    content = (tmp_path / LOG).read_bytes()
    torn = b'{"event":{"seq":7,"ts":170'
    for _ in range(2):
        (tmp_path / LOG).write_bytes(content + torn)
        assert not verify(tmp_path).intact
        log = open_log(tmp_path)
        event = events_of(tmp_path / LOG)[-1]
        assert event.type == "recovery"
        assert event.facts == {
            "bytes": len(torn),
            "file": f"{LOG}.torn-7",
            "lines": 1,
            "sha256": hashlib.sha256(torn).hexdigest(),
        }
        assert (tmp_path / f"{LOG}.torn-7").read_bytes() == torn
        log.close()
        assert verify(tmp_path).intact
        (tmp_path / f"{LOG}.torn-7").unlink()
        (tmp_path / f"{LOG}.confirmed").unlink()


@pytest.mark.parametrize("zeros", [1, 5000, 200_000])
def test_zeros_at_the_end_after_a_power_failure_are_moved_aside(tmp_path: Path, zeros: int) -> None:
    kill(tmp_path)
    with open(tmp_path / LOG, "ab") as file:
        file.write(b'{"event":' + bytes(zeros))
    make_log(tmp_path, 1)
    assert types_of(tmp_path)[6] == "recovery"
    assert verify(tmp_path).intact


def test_an_interrupted_recovery_is_completed(tmp_path: Path) -> None:
    """Killed after the incomplete bytes were saved (before or after the truncation), before the line was written."""
    kill(tmp_path)
    whole = (tmp_path / LOG).read_bytes()
    aside = tmp_path / f"{LOG}.torn-7"
    for left_in_log in (b"torn", b"", b"second"):
        (tmp_path / LOG).write_bytes(whole + left_in_log)
        (tmp_path / f"{LOG}.confirmed").unlink()
        aside.write_bytes(b"torn")
        open_log(tmp_path).close()
        saved = b"tornsecond" if left_in_log == b"second" else b"torn"
        assert aside.read_bytes() == saved
        assert events_of(tmp_path / LOG)[6].facts["sha256"] == hashlib.sha256(saved).hexdigest()
        assert verify(tmp_path).intact


@pytest.mark.parametrize("number", [4, 6])
def test_an_altered_line_that_was_confirmed_is_refused(tmp_path: Path, number: int) -> None:
    kill_confirmed(tmp_path)
    lines = lines_of(tmp_path)
    lines[number - 1] = lines[number - 1].replace(b'"ok"', b'"no"')
    (tmp_path / LOG).write_bytes(b"\n".join(lines) + b"\n")
    before = snapshot(tmp_path)
    with pytest.raises(StartError, match=f"line {number} was altered.*--accept-audit-loss"):
        open_log(tmp_path)
    assert snapshot(tmp_path) == before, "a refused start changes nothing"


def test_a_log_of_another_key_is_refused(tmp_path: Path) -> None:
    make_log(tmp_path, 3, key=Key(1))
    foreign = Key(1)
    foreign.mac_key = memoryview(bytes(32))
    with pytest.raises(StartError, match="can't be trusted"):
        open_log(tmp_path, foreign)


def test_a_log_shorter_than_expected_is_refused(tmp_path: Path) -> None:
    kill(tmp_path)
    known = head_of(tmp_path, 6)
    lines = lines_of(tmp_path)
    (tmp_path / LOG).write_bytes(b"\n".join(lines[:4]) + b"\n")
    with pytest.raises(StartError, match="ends at line 4, but line 6 was written"):
        open_log(tmp_path, expected=ExpectedLog(exists=True, head=known))


def many(directory: Path) -> list[LineRef]:
    """A log in several files, some compressed. Returns the heads that it had."""
    make_segments(directory)
    compress_closed(str(directory), below=3)
    lines = [line for file in each_segment(str(directory)) for line in file.lines()]
    return [LineRef(record.peek_seq(line), record.split_line(line)[1]) for line in lines]


def test_the_expected_line_is_found_in_any_file(tmp_path: Path) -> None:
    for head in many(tmp_path):
        open_log(tmp_path, expected=ExpectedLog(exists=True, head=head)).close()
        with pytest.raises(StartError, match=f"line {head.seq} of the audit log is not the one that was written"):
            open_log(tmp_path, expected=ExpectedLog(exists=True, head=LineRef(head.seq, bytes(32))))


def test_a_log_that_was_truncated_and_continued_is_refused(tmp_path: Path) -> None:
    """The lines of a start without the expectation hide the truncation from a check of the log's end alone."""
    kill(tmp_path)
    known = head_of(tmp_path, 6)
    (tmp_path / LOG).write_bytes(b"\n".join(lines_of(tmp_path)[:4]) + b"\n")
    make_log(tmp_path, 20)
    assert verify(tmp_path).intact
    with pytest.raises(StartError, match=r"line 6 of the audit log is not the one.*--expect-audit-head"):
        open_log(tmp_path, expected=ExpectedLog(exists=True, head=known))


def test_a_log_without_the_file_of_the_expected_line_is_refused(tmp_path: Path) -> None:
    heads = many(tmp_path)
    os.unlink(tmp_path / f"{LOG}.1.zst")
    with pytest.raises(StartError, match="line 3 of the audit log was written, but none of the files has it"):
        open_log(tmp_path, expected=ExpectedLog(exists=True, head=heads[2]))
    damaged = tmp_path / f"{LOG}.2.zst"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(StartError, match=r"can't be read: minikms-audit\.log\.2\.zst does not decompress"):
        open_log(tmp_path, expected=ExpectedLog(exists=True, head=heads[2]))


def test_accepting_a_loss_keeps_the_old_files_and_records_it(tmp_path: Path) -> None:
    kill_confirmed(tmp_path)
    known = head_of(tmp_path, 6)
    altered = (tmp_path / LOG).read_bytes().replace(b'"ok"', b'"no"')
    (tmp_path / LOG).write_bytes(altered)
    (tmp_path / f"{LOG}.1").write_bytes(b"an older segment")
    open_log(tmp_path, expected=ExpectedLog(exists=True, head=known), accept_loss=True).close()
    genesis = events_of(tmp_path / LOG)[0]
    aside = genesis.facts["previous_files"]
    assert isinstance(aside, str)
    (tmp_path / aside / f"{LOG}.confirmed").unlink()
    assert snapshot(tmp_path / aside) == {LOG: altered, f"{LOG}.1": b"an older segment"}
    assert genesis.facts["previous_seq"] == 6
    assert "was altered" in str(genesis.facts["previous"])
    assert verify(tmp_path).intact


def test_two_losses_in_one_second_are_kept_apart(tmp_path: Path) -> None:
    for _ in range(2):
        (tmp_path / LOG).write_bytes(b"nonsense\n")
        open_log(tmp_path, clock=Clock(step=0), accept_loss=True).close()
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("minikms-audit.aside-")]) == 2


def test_a_log_through_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    make_log(tmp_path, 1)
    shutil.move(tmp_path / LOG, tmp_path / "elsewhere")
    (tmp_path / LOG).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StartError, match="can't be opened"):
        open_log(tmp_path)


def test_a_log_that_is_not_a_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOG)
    with pytest.raises(StartError, match="not a regular file"):
        open_log(tmp_path)


def test_a_change_of_key_that_reached_only_the_keyring_is_completed(tmp_path: Path) -> None:
    kill(tmp_path)
    open_log(tmp_path, KEY2, former=(KEY1.audit_key(),)).close()
    assert types_of(tmp_path)[6:] == ["audit_key"]
    assert verify(tmp_path, KEY1, KEY2).intact


def test_two_changes_of_key_without_lines_between_are_accepted(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.change_key(KEY2.audit_key())
    key3 = Key(3)
    open_log(tmp_path, key3, former=(KEY1.audit_key(), KEY2.audit_key())).close()
    make_log(tmp_path, 1, key=key3, former=(KEY1.audit_key(), KEY2.audit_key()))
    assert types_of(tmp_path) == ["genesis", "audit_key", "audit_key", "encrypt", "checkpoint"]
    assert verify(tmp_path, KEY1, KEY2, key3).intact


def test_a_start_reads_no_further_back_than_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`minikms audit verify` finds a line that was altered before it."""
    monkeypatch.setattr(repair, "READ_BYTES", 500)
    monkeypatch.setattr(writer, "CHECKPOINT_LINES", 50)
    log = open_log(tmp_path)
    write_events(log, 130, per_commit=10)
    log.sync.fdatasync()
    content = (tmp_path / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(content.replace(b'"outcome":"ok"', b'"outcome":"no"', 20))
    log = open_log(tmp_path)
    log.add(encrypt_event())
    log.close()
    assert not verify(tmp_path).intact


def test_a_file_with_too_many_unsigned_bytes_at_its_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "READ_BYTES", 500)
    monkeypatch.setattr(repair, "LOG_END_BYTES_MAX", 4000)
    kill(tmp_path, 50)
    with pytest.raises(StartError, match="no checkpoint in its last 4000 bytes"):
        open_log(tmp_path)


# --- an end that was never confirmed ----------------------------------------------------------------------------------

SECTOR_BYTES = 512


def cut_log(directory: Path, chance: random.Random) -> tuple[bytes, int]:
    """A log whose machine lost power: what was synced, and of the rest some sectors. Returns the whole content, and how
    much of it was synced.
    """
    log = open_log(directory)
    synced = 0
    for _ in range(chance.randrange(1, 6)):
        write_events(log, chance.randrange(1, 60), per_commit=5)
        if chance.random() < 0.5:
            log.sync.fdatasync()
            synced = log.writer.file.size
        if chance.random() < 0.5:
            log.writer.checkpoint(1)
    content = (directory / LOG).read_bytes()
    synced = synced or content.index(b"\n") + 1  # a new file is synced
    left = bytearray(content)
    for at in range(synced - synced % SECTOR_BYTES, len(left), SECTOR_BYTES):
        begin, end = max(at, synced), min(at + SECTOR_BYTES, len(left))
        damage = chance.choice(("none", "none", "zeros", "noise"))
        if damage != "none":
            left[begin:end] = bytes(end - begin) if damage == "zeros" else chance.randbytes(end - begin)
    (directory / LOG).write_bytes(left[: chance.randrange(synced, len(left) + 1)])
    return content, synced


def check_power_cuts(directory: Path, seed: int, count: int) -> None:
    chance = random.Random(seed)
    recovered = 0
    for number in range(count):
        log_directory = directory / str(number)
        log_directory.mkdir()
        content, synced = cut_log(log_directory, chance)
        found = (log_directory / LOG).read_bytes()
        make_log(log_directory, 2)
        after = (log_directory / LOG).read_bytes()
        kept = next((at for at, (a, b) in enumerate(zip(content, after, strict=False)) if a != b), len(content))
        assert kept >= synced, f"seed {seed}, cut {number}: a confirmed line is gone"
        assert verify(log_directory).intact, f"seed {seed}, cut {number}"
        aside = list(log_directory.glob("*.torn-*"))
        if aside:
            [event] = [event for event in events_of(log_directory / LOG) if event.type == "recovery"]
            moved = aside[0].read_bytes()
            assert found.endswith(moved)
            assert (event.facts["file"], event.facts["bytes"]) == (aside[0].name, len(moved))
            recovered += 1
    assert recovered > count // 4


def test_any_damage_to_an_end_that_was_never_confirmed_is_set_aside(tmp_path: Path) -> None:
    check_power_cuts(tmp_path, 1, 30)


@pytest.mark.torture
def test_any_damage_to_the_unconfirmed_ends_of_many_logs_is_set_aside(tmp_path: Path) -> None:
    check_power_cuts(tmp_path, random.randrange(2**32), 3000)


def test_a_confirmed_line_is_refused_when_altered_beside_damage(tmp_path: Path) -> None:
    """Wherever it is altered, beside damage that is set aside; and so is a log that ends before."""
    kill_confirmed(tmp_path, 2)
    content = (tmp_path / LOG).read_bytes()
    for at in range(0, len(content), 3):
        altered = bytearray(content + bytes(700))
        altered[at] ^= 1
        (tmp_path / LOG).write_bytes(altered)
        with pytest.raises(StartError, match="--accept-audit-loss"):
            open_log(tmp_path)
    (tmp_path / LOG).write_bytes(content[: content.rindex(b'{"event"')])
    with pytest.raises(StartError, match=r"ends after \d+ bytes, and \d+ were on the disk"):
        open_log(tmp_path)
    (tmp_path / LOG).write_bytes(content + bytes(700))
    open_log(tmp_path).close()
    assert types_of(tmp_path) == ["genesis", "encrypt", "encrypt", "recovery", "checkpoint"]
