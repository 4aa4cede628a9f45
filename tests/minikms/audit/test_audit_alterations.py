"""Every alteration of a log is found and named. Both verifiers check the altered logs on disk (`logmaker.verify`)."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.audit import record
from minikms.audit.record import LineRef
from minikms.audit.rules import FINDINGS_COUNT_MAX
from minikms.audit.verdict import LogVerifier, VerificationReport
from tests.minikms.audit.logmaker import (
    KEY1,
    KEY2,
    LOG,
    Clock,
    Key,
    encrypt_event,
    lines_of,
    make_log,
    open_log,
    trust,
    verify,
)

EVENT_LINE = 5
"""Number of a line that is neither the first nor signed."""
COUNT = 12
"""Events in the log; before them the genesis, after them the checkpoint of the close."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("logs") / "original"
    make_log(directory, COUNT)
    return directory


def put(directory: Path, lines: list[bytes], end: bytes = b"\n") -> None:
    (directory / LOG).write_bytes(b"\n".join(lines) + end)


def judge_bytes(content: bytes, **options: bool) -> VerificationReport:
    """The checker's report on the content of a log file."""
    verifier = LogVerifier(trust(**options))
    *lines, rest = content.split(b"\n")
    for line in lines:
        verifier.feed(line)
    if rest:
        verifier.feed_incomplete(rest)
    return verifier.report()


def kinds(report: VerificationReport) -> list[tuple[str, int]]:
    return [(finding.kind, finding.seq) for finding in report.findings]


def test_the_unaltered_log_is_intact(original: Path) -> None:
    report = verify(original)
    assert report.intact
    assert (report.first_seq, report.lines, report.covered_seq) == (1, COUNT + 2, COUNT + 2)
    assert verify(original, public_only=True).intact


@pytest.mark.parametrize("number", [1, EVENT_LINE, COUNT + 2], ids=["genesis", "event", "checkpoint"])
def test_every_flipped_bit_is_found_and_its_line_named(original: Path, number: int) -> None:
    content = (original / LOG).read_bytes()
    lines = lines_of(original)
    begin = sum(len(line) + 1 for line in lines[: number - 1])
    for at in range(begin, begin + len(lines[number - 1]) + 1):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            report = judge_bytes(bytes(flipped))
            assert not report.intact, f"byte {at - begin}, bit {bit}"
            assert report.findings[0].line == number, f"byte {at - begin}, bit {bit}: {report.findings}"


Lines = list[bytes]
Change = Callable[[Lines], Lines]


def edit(old: bytes, new: bytes) -> Change:
    """Replaces a part of the line of the event."""

    def change(lines: Lines) -> Lines:
        assert old in lines[4]
        return [*lines[:4], lines[4].replace(old, new), *lines[5:]]

    return change


def with_the_sig_of_the_next(lines: Lines) -> Lines:
    return [*lines[:4], lines[4][:-46] + lines[5][-46:], *lines[5:]]


def with_unused_bits(lines: Lines) -> Lines:
    """Base64 that decodes to the same bytes: the last character before the padding has two unused bits."""
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    last = alphabet[alphabet.index(lines[4][-4:-3]) ^ 1 :][:1]
    return [*lines[:4], lines[4][:-4] + last + lines[4][-3:], *lines[5:]]


EVENT = ("altered", EVENT_LINE)
FOUND: dict[str, tuple[Change, tuple[str, int], str]] = {
    "an event": (edit(b'"outcome":"ok"', b'"outcome":"no"'), EVENT, ""),
    "a sig": (with_the_sig_of_the_next, EVENT, "the sig of line 5 was altered; its event is genuine"),
    "a seq": (edit(b'"seq":5,', b'"seq":9,'), EVENT, "line 5 was altered: its seq reads 9"),
    "a dropped line": (lambda lines: lines[:4] + lines[5:], ("missing", 5),
                       "line 5 is missing: line 6 is in that position"),
    "the line before the last": (lambda lines: lines[:12] + lines[13:], ("missing", 13),
                                 "line 13 is missing: line 14 is in that position"),
    "a gap": (lambda lines: lines[:4] + lines[8:], ("missing", 5),
              "lines 5 to 8 are missing: line 9 is in that position"),
    "repeated at once": (lambda lines: lines[:5] + lines[4:], ("repeated", 5), ""),
    "repeated later": (lambda lines: [*lines[:9], lines[2], *lines[9:]], ("repeated", 3), ""),
    "swapped": (lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]], ("moved", 6),
                "line 6 is out of order: it comes before line 5"),
    "moved back": (lambda lines: [*lines[:4], *lines[5:11], lines[4], *lines[11:]], ("moved", 5),
                   "line 5 is out of order: it comes after line 11"),
    "moved forward": (lambda lines: [*lines[:4], lines[9], *lines[4:9], *lines[10:]], ("moved", 10),
                      "line 10 is out of order: it comes before line 5"),
}  # fmt: skip
"""Alterations of one line, each with the one finding, its line, and a part of its text."""
OTHER_ENCODINGS: dict[str, Change] = {
    "a space": edit(b'{"event":', b'{"event": '),
    "a fraction": edit(b'"pid":77', b'"pid":77.0'),
    "a leading zero": edit(b'"pid":77', b'"pid":077'),
    "an exponent": edit(b'"pid":77', b'"pid":7.7e1'),
    "a member twice": edit(b'"pid":77', b'"pid":77,"pid":77'),
    "a default number": edit(b'"pid":77', b'"pid":77,"count":0'),
    "a default list": edit(b'"pid":77', b'"pid":77,"key_ids":[]'),
    "default facts": edit(b'"pid":77', b'"pid":77,"facts":{}'),
    "an unknown member": edit(b'"pid":77', b'"pid":77,"color":"red"'),
    "an escape": edit(b'"outcome":"ok"', b'"outcome":"\\u006fk"'),
    "a member less": edit(b'"outcome":"ok",', b""),
    "another order": edit(b'"type":"encrypt","actor":"peer_uid:1000"', b'"actor":"peer_uid:1000","type":"encrypt"'),
    "no padding": edit(b'="}', b'"}'),
    "a member of the line": edit(b'="}', b'=","x":1}'),
    "unused bits": with_unused_bits,
}
"""The same event in other bytes."""
NO_LINES: dict[str, Change] = {
    "blank line": lambda lines: [*lines[:4], b"", *lines[4:]],
    "blank first line": lambda lines: [b"", *lines],
    "blank last line": lambda lines: [*lines, b""],
    "CRLF": lambda lines: [line + b"\r" for line in lines],
    "byte order mark": lambda lines: [b"\xef\xbb\xbf" + lines[0], *lines[1:]],
    "leading space": lambda lines: [*lines[:4], b" " + lines[4], *lines[5:]],
    "trailing space": lambda lines: [*lines[:4], lines[4] + b" ", *lines[5:]],
    "two lines in one": lambda lines: [*lines[:4], lines[4] + lines[5], *lines[6:]],
    "zeros": lambda lines: [*lines[:4], b"\x00" * 300, *lines[5:]],
    "another object": lambda lines: [*lines[:4], b"{}", *lines[5:]],
    "longer than a line may be": lambda lines: [*lines[:4], b"x" * record.LINE_BYTES_MAX, *lines[5:]],
}


@pytest.mark.parametrize("name", FOUND)
def test_an_altered_line_is_one_finding_that_names_it(altered: Path, name: str) -> None:
    change, kind, text = FOUND[name]
    put(altered, change(lines_of(altered)))
    report = verify(altered)
    assert (kinds(report), report.findings[0].file) == ([kind], LOG)
    assert text in report.findings[0].text
    assert not verify(altered, public_only=True).intact


@pytest.mark.parametrize("name", [*OTHER_ENCODINGS, *NO_LINES])
def test_bytes_that_are_not_a_line_are_malformed(altered: Path, name: str) -> None:
    put(altered, (OTHER_ENCODINGS | NO_LINES)[name](lines_of(altered)))
    found = kinds(verify(altered))
    assert found == [("malformed", EVENT_LINE)] if name in OTHER_ENCODINGS else found[0][0] == "malformed"
    assert not verify(altered, public_only=True).intact


def test_a_dropped_genesis_line_is_missing(altered: Path) -> None:
    put(altered, lines_of(altered)[1:])
    assert verify(altered).findings[0].kind == "missing"


def test_lines_of_two_logs_are_not_accepted_as_one_log(altered: Path, tmp_path: Path) -> None:
    """Two logs with the same keys and line numbers: lines of one can't replace lines of the other."""
    other = tmp_path / "other"
    make_log(other, COUNT, clock=Clock(now=1_800_000_000_000_000_000))
    put(altered, lines_of(altered)[:7] + lines_of(other)[7:])
    report = verify(altered)
    assert report.findings[0].seq == 8
    assert not verify(altered, public_only=True).intact


def test_a_log_truncated_within_a_line_is_incomplete_at_every_offset(original: Path) -> None:
    content = (original / LOG).read_bytes()
    begin = content.rindex(b"\n", 0, len(content) - 1) + 1
    for end in range(begin + 1, len(content)):
        assert kinds(judge_bytes(content[:end])) == [("incomplete", COUNT + 2)]


def test_both_verifiers_report_an_incomplete_last_line(altered: Path) -> None:
    content = (altered / LOG).read_bytes()
    (altered / LOG).write_bytes(content[:-1])
    assert kinds(verify(altered)) == [("incomplete", COUNT + 2)]


def test_removed_last_lines_are_found_only_with_a_known_head(altered: Path) -> None:
    lines = lines_of(altered)
    put(altered, lines[:9])
    assert verify(altered).intact
    known = LineRef(11, record.parse_line(lines[10])[2])
    report = verify(altered, expect_head=known)
    assert kinds(report) == [("truncated", 9)]
    assert "ends at line 9, but the expected line 11 was written" in report.findings[0].text


def test_lines_newer_than_the_known_head_are_counted(original: Path) -> None:
    known = LineRef(10, record.parse_line(lines_of(original)[9])[2])
    report = verify(original, expect_head=known)
    assert report.intact
    assert report.lines_after_expected_head == COUNT + 2 - 10


def test_another_genuine_end_is_found_with_a_known_head(original: Path, tmp_path: Path) -> None:
    """A directory restored from a copy and used again: two genuine continuations of one log."""
    first, second = (Path(shutil.copytree(original, tmp_path / name)) for name in ("first", "second"))
    logs = [open_log(directory, clock=Clock(now)) for directory, now in ((first, 10**18), (second, 2 * 10**18))]
    for log in logs:
        log.add(encrypt_event(1))
        log.close()
    known = LineRef(COUNT + 3, record.parse_line(lines_of(first)[COUNT + 2])[2])
    assert verify(first, expect_head=known).intact
    assert verify(second).intact
    assert kinds(verify(second, expect_head=known)) == [("anchor", COUNT + 3)]


def test_a_replayed_checkpoint_is_refused(altered: Path) -> None:
    log = open_log(altered)
    log.add(encrypt_event())
    log.close()
    lines = lines_of(altered)
    old = lines[COUNT + 1]
    assert b'"type":"checkpoint"' in old
    put(altered, [*lines[:-1], old])
    assert kinds(verify(altered)) == [("repeated", COUNT + 2)]
    # The same with the number that belongs there: neither MAC nor signature fit it.
    renumbered = old.replace(b'"seq":%d,' % (COUNT + 2), b'"seq":%d,' % len(lines))
    put(altered, [*lines[:-1], renumbered])
    assert {kind for kind, _ in kinds(verify(altered))} >= {"altered", "signature"}
    assert not verify(altered, public_only=True).intact


def test_the_public_key_alone_finds_an_edit_at_the_next_checkpoint(altered: Path) -> None:
    lines = lines_of(altered)
    lines[4] = lines[4].replace(b'"outcome":"ok"', b'"outcome":"no"')
    put(altered, lines)
    report = verify(altered, public_only=True)
    assert kinds(report) == [("altered", COUNT + 1)]
    text = report.findings[0].text
    assert f"lines 1 to {COUNT + 1} are not those that the signature of line {COUNT + 2} covers" in text


def test_the_report_counts_lines_that_no_signature_covers(altered: Path) -> None:
    log = open_log(altered)
    for number in range(3):
        log.add(encrypt_event(number))
    log.commit()
    report = verify(altered, public_only=True)
    assert report.intact
    assert (report.covered_seq, report.lines_not_covered) == (COUNT + 2, 3)
    log.close()
    assert verify(altered, public_only=True).lines_not_covered == 0


def test_a_signature_covers_every_part_of_its_line(altered: Path) -> None:
    lines = lines_of(altered)
    lines[-1] = lines[-1].replace(b'"outcome":"ok"', b'"outcome":"ok","detail":"x"')
    put(altered, lines)
    assert kinds(verify(altered, public_only=True)) == [("signature", COUNT + 2)]


def test_a_log_made_with_other_keys_is_foreign(altered: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    make_log(forged, COUNT, key=Key(7))
    shutil.copy(forged / LOG, altered / LOG)
    assert verify(altered).findings[0].kind == "foreign"
    assert verify(altered, public_only=True).findings[0].kind == "foreign"


def test_both_kinds_of_keys_verify_across_a_change_of_the_audit_key(altered: Path) -> None:
    log = open_log(altered, KEY1)
    log.change_key(KEY2.audit_key())
    log.add(encrypt_event())
    log.close()
    assert verify(altered, KEY1, KEY2).intact
    assert verify(altered, KEY1, public_only=True).intact


def test_a_change_of_key_that_the_old_key_did_not_sign_is_refused(altered: Path) -> None:
    log = open_log(altered, KEY1)
    log.change_key(KEY2.audit_key())
    log.close()
    lines = lines_of(altered)
    at = next(index for index, line in enumerate(lines) if b'"type":"audit_key"' in line)
    old = record.parse_line(lines[at])[0].facts["next_public_key"]
    foreign = Key(9).public_key.hex()[:2].encode()
    assert isinstance(old, str)
    lines[at] = lines[at].replace(old[:2].encode(), foreign[:2], 1)
    put(altered, lines)
    assert not verify(altered, KEY1, KEY2).intact
    assert not verify(altered, KEY1, public_only=True).intact


def test_findings_are_bounded_and_all_are_counted() -> None:
    report = judge_bytes(b"nonsense\n" * 5000)
    assert (len(report.findings), report.findings_count) == (FINDINGS_COUNT_MAX, 5000)


def test_an_empty_log_is_not_intact() -> None:
    assert not judge_bytes(b"").intact


@settings(max_examples=300)
@given(data=st.data())
def test_no_edit_of_the_bytes_leaves_the_log_intact(original: Path, data: st.DataObject) -> None:
    """Except removing whole lines at its end."""
    content = (original / LOG).read_bytes()
    length = len(content)
    begin = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(begin, min(length, begin + 700)))
    put_in = data.draw(
        st.one_of(
            st.binary(max_size=40),
            st.integers(0, length - 1).flatmap(lambda at: st.just(content[at : at + (end - begin)])),
            st.sampled_from([line + b"\n" for line in content.split(b"\n")[:-1]]),
        )
    )
    edited = content[:begin] + put_in + content[end:]
    cut_cleanly = content.startswith(edited) and edited.endswith(b"\n")
    assert judge_bytes(edited).intact == (edited == content or cut_cleanly)
