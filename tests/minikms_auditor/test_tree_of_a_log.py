"""Which lines enter the tree, and when: an auditor beside a real log."""

import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from minikms.api.errors import StartError
from minikms.audit import blocks
from minikms.audit.log import CHORES_NS, LogLimits
from minikms.cli import audit
from minikms_auditor.auditor import FAULTS_BEFORE_ALARM
from minikms_daemon.audit.maintenance import compress_closed
from tests.harness.disk_faults import failing_os
from tests.minikms.audit.logmaker import KEY1, KEY2, open_log, write_events
from tests.minikms_auditor.rig import Rig, root_of


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Rig(tmp_path) as rig:
        yield rig


def test_the_tree_has_every_line_up_to_the_last_signed_one(rig: Rig) -> None:
    rig.write(20)
    rig.write(5, signed=False)
    lines = rig.lines()
    status = rig.steps()
    assert not status.alarm and not status.errors, status
    size, root = rig.published()
    assert b'"type":"checkpoint"' in lines[size - 1]
    assert size == len(lines) - 5
    assert root == root_of(lines[:size])
    assert status.position_seq == size
    assert status.lag_lines == 5
    assert rig.daemon.reports[-1] == size


def test_a_line_waits_until_the_daemon_calls_it_durable(rig: Rig) -> None:
    rig.write(20)
    rig.daemon.durable_seq = 10
    assert rig.steps().size == 0
    rig.daemon.durable_seq = None
    assert rig.steps().size == len(rig.lines())


def test_the_tree_grows_over_restarts_of_the_auditor(rig: Rig) -> None:
    for count in (1, 300, 1, 40, 256):
        rig.write(count)
        status = rig.start().steps()
        lines = rig.lines()
        assert (status.alarm, status.size) == ("", len(lines))
        assert rig.published() == (len(lines), root_of(lines))


def test_segments_that_are_closed_compressed_and_removed_are_read(rig: Rig) -> None:
    small = LogLimits(segment_bytes=3000, reserve_bytes=0)
    lines: list[bytes] = []
    for part in range(4):
        rig.clock.step = CHORES_NS
        rig.write(40, limits=small)
        lines += rig.lines()[len(lines) if part else 0 :]
        status = rig.steps()
        assert status.alarm == "", status
        compress_closed(str(rig.log_dir))
        if part == 2:
            rig.start()
    assert rig.published() == (len(rig.lines()), root_of(rig.lines()))


def test_a_removed_last_segment_is_bound_by_the_next_one(rig: Rig) -> None:
    """The tree ends with the last line of a segment that is removed before the auditor starts again."""
    rig.clock.step = CHORES_NS
    log = open_log(rig.log_dir, clock=rig.clock, limits=LogLimits(segment_bytes=3000, reserve_bytes=0))
    while not (rig.log_dir / "minikms-audit.log.1").exists():
        write_events(log, 1)
    closed = (rig.log_dir / "minikms-audit.log.1").read_bytes().split(b"\n")[:-1]
    rig.daemon.durable_seq = len(closed)
    assert rig.steps().size == len(closed)
    log.close()
    lines = rig.lines()
    (rig.log_dir / "minikms-audit.log.1").unlink()
    rig.daemon.durable_seq = None
    status = rig.start().steps()
    assert (status.alarm, status.size) == ("", len(lines))
    assert rig.published() == (len(lines), root_of(lines))


def test_the_audit_key_may_change(rig: Rig) -> None:
    rig.write(10)
    rig.steps()
    log = open_log(rig.log_dir, KEY2, former=(KEY1.audit_key(),), clock=rig.clock)
    write_events(log, 10)
    log.close()
    for _ in range(2):
        status = rig.steps()
        assert (status.alarm, status.size) == ("", len(rig.lines()))
        rig.start()


def test_a_log_begun_anew_under_a_known_key_continues_the_tree(rig: Rig) -> None:
    rig.write(10)
    rig.steps()
    before = rig.lines()
    (rig.log_dir / "minikms-audit.log").unlink()
    rig.write(7)
    status = rig.steps()
    lines = before + rig.lines()
    assert (status.alarm, status.size) == ("", len(lines))
    assert rig.published() == (len(lines), root_of(lines))
    rig.write(7)
    assert rig.start().steps().size == len(before) + len(rig.lines())


def test_an_earlier_log_of_the_tree_that_is_put_back_stops_the_auditor(rig: Rig) -> None:
    """It begins with a known key, and would enter the tree a second time."""
    log = rig.log_dir / "minikms-audit.log"
    rig.write(10)
    rig.steps()
    older = log.read_bytes()
    log.unlink()
    rig.write(7)
    size = rig.steps().size
    log.write_bytes(older)
    status = rig.steps(3)
    assert "is an earlier one of the tree" in status.alarm
    assert (status.size, rig.published()[0]) == (size, size)


def test_a_log_begun_anew_under_the_key_of_an_audit_key_line_continues(rig: Rig) -> None:
    rig.write(10)
    open_log(rig.log_dir, KEY2, former=(KEY1.audit_key(),), clock=rig.clock).close()
    rig.steps()
    before = rig.lines()
    (rig.log_dir / "minikms-audit.log").unlink()
    rig.write(7, KEY2)
    assert rig.start().steps().size == len(before) + len(rig.lines())


def test_a_log_under_an_unknown_key_waits_for_accept_log(rig: Rig) -> None:
    from minikms_auditor.store import accept_key

    rig.write(10)
    rig.steps()
    size, root = rig.published()
    (rig.log_dir / "minikms-audit.log").unlink()
    rig.write(7, KEY2)
    status = rig.steps()
    assert "accept-log" in status.alarm
    assert status.pending is not None and status.pending.public_key == KEY2.public_key
    assert rig.start().steps().alarm == status.alarm
    assert rig.published() == (size, root)
    accept_key(str(rig.state_dir), KEY2.public_key)
    status = rig.steps()
    assert (status.alarm, status.pending, status.size) == ("", None, size + len(rig.lines()))


def test_the_index_follows_the_tree_and_fails_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    index = rig.state_dir / blocks.BLOCKS_NAME
    rig.write(300)
    rig.start()
    index.touch()
    status = rig.steps()
    assert (status.size, rig.published()[0]) == (len(rig.lines()),) * 2
    assert [error.partition(":")[0] for error in status.errors] == ["index"]
    index.unlink()
    assert rig.steps(2).errors == ()
    for where, said in ((str(index), r"by .*: 1 of 2[0-9] blocks read, and 0 files"), ("", "")):
        assert audit.find(data_dir=str(rig.log_dir), key=f"k_01jd{5:022}", index=where) == 0
        output = capsys.readouterr()
        assert output.out.count("request=r5\n") == 1 and re.search(said, output.err)
    assert stat.S_IMODE((index / "1").stat().st_mode) == 0o600


# --- faults -----------------------------------------------------------------------------------------------------------


def stopped(rig: Rig, *, restarted: bool = False) -> str:
    """The alarm after some steps, in which nothing was published."""
    before = rig.published()
    if restarted:
        rig.start()
    status = rig.steps(FAULTS_BEFORE_ALARM)
    assert rig.published() == before
    assert ("alarm", status.alarm) in rig.logged
    return status.alarm


@pytest.mark.parametrize("restarted", [False, True])
def test_a_log_that_was_cut_stops_the_auditor(rig: Rig, restarted: bool) -> None:
    rig.write(20)
    rig.steps()
    path = rig.log_dir / "minikms-audit.log"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-4]))
    assert "no line" in stopped(rig, restarted=restarted)


@pytest.mark.parametrize("restarted", [False, True])
def test_an_older_copy_of_the_log_beside_its_daemon_is_named_truly(rig: Rig, restarted: bool) -> None:
    rig.write(5)
    path = rig.log_dir / "minikms-audit.log"
    older = path.read_bytes()
    rig.write(20)
    rig.steps()
    size, written = len(rig.lines()), older.count(b"\n")
    path.write_bytes(older)
    said = stopped(rig, restarted=restarted)
    assert f"the tree has line {size}, and the daemon has written line {written}" in said


def test_damaged_files_of_the_state_directory_are_noticed_at_a_start(rig: Rig) -> None:
    rig.write(20)
    rig.steps()
    index = rig.state_dir / "tree" / "logs.json"
    good = index.read_bytes()
    for content in (b"garbage", None):
        index.unlink() if content is None else index.write_bytes(content)
        rig.start()
        assert index.read_bytes() == good
    rig.stop()
    (rig.state_dir / "accepted-keys.json").write_bytes(b"garbage")
    with pytest.raises(StartError, match=r"accepted-keys\.json is damaged"):
        rig.start()


@pytest.mark.parametrize("restarted", [False, True])
def test_a_fork_with_the_audit_key_stops_the_auditor(rig: Rig, restarted: bool) -> None:
    """An older copy of the log is continued under the same key: each line verifies, and the tree has others."""
    rig.write(5)
    path = rig.log_dir / "minikms-audit.log"
    older = path.read_bytes()
    rig.write(20)
    rig.steps()
    path.unlink()
    path.write_bytes(older)
    rig.write(30)
    assert "not the one in the tree" in stopped(rig, restarted=restarted)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_changed_line_stops_the_auditor_before_it(rig: Rig, restarted: bool) -> None:
    rig.write(20)
    rig.steps()
    size, _ = rig.published()
    rig.write(20)
    path = rig.log_dir / "minikms-audit.log"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[size + 5] = lines[size + 5].replace(b'"pid":77', b'"pid":78')
    path.write_bytes(b"".join(lines))
    assert "not intact" in stopped(rig, restarted=restarted)


def test_a_log_that_the_daemon_did_not_write_stops_the_auditor(rig: Rig) -> None:
    """The files hold a fork whose last durable line is not the daemon's."""
    rig.write(20)
    rig.steps()
    rig.write(10)
    rig.daemon.durable_mac = bytes(32)
    assert "not the line that the daemon has written" in stopped(rig)


def test_an_alarm_ends_when_the_log_is_whole_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minikms_auditor.auditor.ALARM_RETRY_SECONDS", 0.0)
    rig.write(20)
    rig.steps()
    path = rig.log_dir / "minikms-audit.log"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-4]))
    stopped(rig)
    rig.daemon.away = True
    assert rig.steps().alarm, "without the daemon's answer nothing is known"
    rig.daemon.away = False
    path.write_bytes(whole)
    assert rig.steps().alarm == ""
    rig.write(3)
    assert rig.steps().size == len(rig.lines())


def test_lines_are_not_skipped_while_the_log_cannot_be_read(rig: Rig) -> None:
    rig.write(20)
    rig.steps()
    rig.write(5)
    hidden = rig.log_dir.rename(rig.base / "hidden")
    rig.daemon.directory = hidden
    status = rig.start().steps()
    assert "can't be read" in " ".join(status.errors)
    hidden.rename(rig.log_dir)
    rig.daemon.directory = rig.log_dir
    status = rig.steps()
    assert (status.errors, status.size) == ((), len(rig.lines()))


def test_a_full_disk_is_shown_and_tried_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.write(10)
    size = rig.steps().size
    rig.write(10)
    with failing_os(monkeypatch, "rename"):
        status = rig.steps(2)
    assert (status.alarm, status.published_size) == ("", size)
    assert any(error.startswith("disk: ") for error in status.errors), status
    status = rig.steps()
    assert (status.errors, status.published_size) == ((), len(rig.lines()))
