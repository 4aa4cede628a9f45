"""Files that try to hang a reader, fill its memory, crash it, or be read in two ways are refused."""

import gzip
import io
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from minikms.audit import Event, reader, record
from minikms.audit.following import LAST_BYTES_MAX, LogFollower, last_lines
from minikms.audit.log import LogLimits
from minikms.audit.queries import verify_directory
from minikms.audit.reader import list_segments
from minikms.audit.rules import FINDINGS_COUNT_MAX
from minikms.audit.verdict import FINDINGS_COUNTED_MAX
from minikms.cli import audit
from minikms_daemon.audit.maintenance import compress_closed
from tests.minikms.audit.logmaker import (
    LOG,
    Clock,
    encrypt_event,
    lines_of,
    make_log,
    open_log,
    trust,
    verify,
    write_events,
)

SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"extra"


def compressed(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True, **options).compress(content)  # type: ignore[arg-type]  # as given


# --- compressed files that are not one whole frame --------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda content, frame: frame[:-1],
        lambda content, frame: frame[:-4],
        lambda content, frame: frame[:-5],
        lambda content, frame: frame + b"x",
        lambda content, frame: frame + frame[:20],
        lambda content, frame: frame + SKIPPABLE,
        lambda content, frame: SKIPPABLE + frame,
        lambda content, frame: frame + compressed(b""),
        lambda content, frame: compressed(content[:1000]) + compressed(content[1000:]),
        lambda content, frame: zstandard.ZstdCompressor().compress(content),
        lambda content, frame: zstandard.ZstdCompressor().compress(content) + frame[:4],
        lambda content, frame: gzip.compress(content),
        lambda content, frame: frame[:-4] + bytes(4),
        lambda content, frame: content,
        lambda content, frame: b"",
        lambda content, frame: frame[:3],
        lambda content, frame: frame[:5],
    ],
    ids=[
        "cut in the checksum",
        "cut before the checksum",
        "cut before its end",
        "a byte after it",
        "a part of another frame after it",
        "a skippable frame after it",
        "a skippable frame before it",
        "an empty frame after it",
        "two frames",
        "no checksum",
        "something else in the place of the checksum",
        "gzip",
        "another checksum",
        "not compressed",
        "empty",
        "a part of the magic number",
        "a part of the header",
    ],
)
def test_a_compressed_file_is_one_whole_frame(altered: Path, change: Callable[[bytes, bytes], bytes]) -> None:
    """A stream decompressor accepts most of these without an error, and the program `zstd` most of the others."""
    plain = (altered / f"{LOG}.2").read_bytes()
    compress_closed(str(altered))
    path = altered / f"{LOG}.2.zst"
    path.write_bytes(change(plain, path.read_bytes()))
    report = verify(altered)
    assert not report.intact
    assert path.name in report.findings[0].text
    assert audit.find(data_dir=str(altered), actor="peer_uid:1000") == 2
    assert audit.tail(data_dir=str(altered), lines=1000) == 2


def test_a_frame_with_a_larger_window_is_refused(altered: Path) -> None:
    content = (altered / f"{LOG}.2").read_bytes()
    parameters = zstandard.ZstdCompressionParameters(window_log=24, write_checksum=1)
    target = io.BytesIO()
    zstandard.ZstdCompressor(compression_params=parameters).copy_stream(io.BytesIO(content), target)
    (altered / f"{LOG}.2").unlink()
    (altered / f"{LOG}.2.zst").write_bytes(target.getvalue())
    assert not verify(altered).intact


def test_a_large_file_is_compressed_and_read_back(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    for number in range(3):
        for item in range(8):
            log.add(encrypt_event(item, detail=os.urandom(500).hex(), request_ids=[os.urandom(120).hex()] * 1000))
        log.commit()
        log.writer.rotate(10**18 + number)
    log.close()
    assert (tmp_path / f"{LOG}.1").stat().st_size > 1024 * 1024
    assert len(compress_closed(str(tmp_path))) == 3
    assert verify(tmp_path).intact


def test_a_compressed_file_with_other_content_replaces_no_plain_file(altered: Path) -> None:
    content = (altered / f"{LOG}.1").read_bytes()
    for false in (b"nonsense", compressed(content + b"x"), compressed(content[:-1]), compressed(content) + b"x"):
        (altered / f"{LOG}.1").write_bytes(content)
        (altered / f"{LOG}.1.zst").write_bytes(false)
        assert verify(altered).intact, "the plain one counts"
        compress_closed(str(altered), below=2)
        assert not (altered / f"{LOG}.1").exists()
        assert verify(altered).intact


# --- files that would not end -----------------------------------------------------------------------------------------


def test_a_reader_names_what_is_not_a_file_and_does_not_wait_for_it(
    altered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (f"{LOG}.2", LOG):
        (altered / name).unlink()
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(tmp_path, path)):
            make(altered / name)
            for command in (audit.tail, lambda data_dir: audit.find(data_dir=data_dir, actor="x")):
                command(data_dir=str(altered))
            with pytest.raises(OSError, match=r"not a regular file|symbolic links"):
                verify_directory(str(altered), trust())
            (os.rmdir if make is os.mkdir else os.unlink)(altered / name)
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("minikms: ") and LOG in line for line in errors)


def test_reading_a_decompression_bomb_ends_early(altered: Path) -> None:
    """256 MiB of zeros, and as much of lines, in some KiB each."""
    os.rename(altered / f"{LOG}.1", altered / "kept")
    genuine = (altered / "kept").read_bytes()
    for unit in (bytes(1024 * 1024), b"\n" * 1024 * 1024, genuine * 200):
        target = io.BytesIO()
        with zstandard.ZstdCompressor(write_checksum=True).stream_writer(target, closefd=False) as writer:
            for _ in range(256 * 1024 * 1024 // len(unit)):
                writer.write(unit)
        (altered / f"{LOG}.1.zst").write_bytes(target.getvalue())
        tracemalloc.start()
        report = verify_directory(str(altered), trust())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert not report.intact
        assert peak < 64 * 1024 * 1024


def test_a_check_ends_after_too_many_findings_and_reports_that(tmp_path: Path) -> None:
    (tmp_path / LOG).write_bytes(b"\n" * 2 * FINDINGS_COUNTED_MAX)
    report = verify_directory(str(tmp_path), trust())
    assert (len(report.findings), report.findings_count) == (FINDINGS_COUNT_MAX, FINDINGS_COUNTED_MAX)
    assert report.given_up and report.lines == FINDINGS_COUNTED_MAX


def test_reading_an_endless_line_ends_early(altered: Path) -> None:
    """A sparse file takes no space, but would take hours to read."""
    path = altered / f"{LOG}.1"
    os.truncate(path, 1024**4)
    report = verify_directory(str(altered), trust())
    assert f"{path.name} holds a line of more than" in " ".join(finding.text for finding in report.findings)
    assert audit.find(data_dir=str(altered), actor="x") == 2
    os.truncate(altered / LOG, 1024**4)
    assert audit.tail(data_dir=str(altered)) == 2


def test_a_long_line_is_one_finding_and_the_next_is_read(altered: Path) -> None:
    lines = lines_of(altered)
    (altered / LOG).write_bytes(b"\n".join([lines[0], b"x" * 5_000_000, *lines[1:], b""]))
    report = verify_directory(str(altered), trust())
    assert [(finding.kind, finding.line) for finding in report.findings] == [("malformed", 2)]


# --- reading and showing ----------------------------------------------------------------------------------------------


def test_a_file_that_appears_after_the_end_of_the_log_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that begins at that moment comes after lines that were not read."""
    log = open_log(tmp_path)
    write_events(log, 10)
    real = reader.SegmentFile.lines

    def lines(self: reader.SegmentFile) -> Any:
        yield from real(self)
        write_events(log, 4)
        log.writer.rotate(10**18)
        write_events(log, 8)

    monkeypatch.setattr(reader.SegmentFile, "lines", lines)
    report = verify_directory(str(tmp_path), trust())
    assert report.intact, report.findings
    assert report.lines == 11
    log.close()


def test_a_follower_ends_when_the_segment_number_decreases(altered: Path) -> None:
    """The file being written claims to be the first, and closed. A follower must not read it again and again."""
    (altered / LOG).write_bytes((altered / f"{LOG}.1").read_bytes())
    last = max(list_segments(str(altered)))
    follower = LogFollower(str(altered))
    seqs = [record.peek_seq(line) for line in follower.read(10_000)]
    follower.close()
    assert seqs == list(range(1, record.peek_seq((altered / f"{LOG}.{last}").read_bytes().split(b"\n")[-2]) + 1))


def test_markup_in_a_log_is_shown_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    for actor in ("[/bold]", "[link=https://example.org]peer[/link]", ":skull:"):
        log.add(Event(type=actor, actor=actor, outcome=actor))
    log.close()
    assert audit.tail(data_dir=str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert output.count("[/bold]") == output.count("[link=https://example.org]peer[/link]") == 3
    assert output.count(":skull:") == 3


def test_the_last_lines_are_bounded_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_log(tmp_path, 400, clock=Clock(step=10**9), limits=LogLimits(segment_bytes=40_000, reserve_bytes=0))
    compress_closed(str(tmp_path))
    every = last_lines(str(tmp_path), 10_000)
    assert sum(map(len, every)) < LAST_BYTES_MAX and len(every) > 400
    monkeypatch.setattr("minikms.audit.following.LAST_BYTES_MAX", 20_000)
    monkeypatch.setattr("minikms.audit.following._BACKWARDS_BYTES", 1000)
    some = last_lines(str(tmp_path), 10_000)
    assert some and sum(map(len, some)) < 70_000
    assert some == every[-len(some) :]
