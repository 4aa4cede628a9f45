"""An attacker who can write the files and knows the public key or an earlier audit key can't forge a log.

Both verifiers check each forgery (`logmaker.verify`). The tests are named after what the attacker has and does.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.api.base64 import decode_exact, encode_text
from minikms.api.errors import StartError
from minikms.audit import chain, record
from minikms.audit.chain import Coverage, KeyState
from minikms.audit.log import LogLimits
from minikms.audit.reader import list_segments
from minikms.audit.record import Event, LineRef
from tests.minikms.audit.logmaker import (
    KEY1,
    KEY2,
    LOG,
    SECOND,
    Clock,
    Key,
    encrypt_event,
    events_of,
    lines_of,
    make_log,
    make_segments,
    open_log,
    verify,
    write_events,
)

ALIEN_SIG = bytes(range(32))
NOW = 1_700_000_000 * SECOND
BEGINNING = LineRef(0, record.ZERO_MAC)


def put(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def forged(seq: int, event_type: str = "encrypt", **members: object) -> bytes:
    """A well-formed line with an arbitrary SIG, which the public key alone can't reveal."""
    event = Event(seq=seq, ts=1, type=event_type, actor="peer_uid:0", **members)  # type: ignore[arg-type]  # as given
    return record.encode_line(record.encode_event(event), ALIEN_SIG)[:-1]


def kinds(directory: Path, *keys: Key, **options: object) -> set[str]:
    report = verify(directory, *keys, **options)  # type: ignore[arg-type]  # tests pass on what `verify` takes
    assert not report.intact
    return {finding.kind for finding in report.findings}


# --- files: the content stays, what is read changes -------------------------------------------------------------------


def test_the_file_being_written_is_read_beside_one_with_its_number(altered: Path) -> None:
    """An old copy under the live file's number; the live file is edited at will."""
    number = max(list_segments(str(altered))) + 1
    lines = lines_of(altered)
    put(altered / f"{LOG}.{number}", lines[:3])
    assert kinds(altered) == {"repeated"}
    put(altered / LOG, [line.replace(b"peer_uid:1000", b"peer_uid:0") for line in lines])
    assert "repeated" in kinds(altered)
    assert "repeated" in kinds(altered, public_only=True)


# --- with the public key alone ----------------------------------------------------------------------------------------


def test_an_unsigned_log_is_not_intact_with_the_public_key_alone(tmp_path: Path) -> None:
    """The public key is public: it can be written into any genesis line."""
    genesis = chain.genesis_event(bytes(16), 1, KEY1.public_key, {})
    put(tmp_path / LOG, [forged(1, "genesis", facts=genesis.facts), *(forged(seq) for seq in range(2, 20))])
    report = verify(tmp_path, public_only=True)
    assert not report.intact and not report.conclusive and report.findings == []
    assert "altered" in kinds(tmp_path)


def test_a_new_log_is_intact_with_the_public_key_only_when_signed(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    write_events(log, 3)
    assert verify(tmp_path).intact
    assert not verify(tmp_path, public_only=True).conclusive
    log.close()
    assert verify(tmp_path, public_only=True).intact


def test_an_unsigned_retention_line_does_not_excuse_missing_files(altered: Path) -> None:
    """The oldest file is removed, and an unsigned line that would excuse it is added at the end."""
    first = events_of(altered / f"{LOG}.2")[0]
    (altered / f"{LOG}.1").unlink()
    facts = {"removed_segment": 1, "last_seq": first.facts["previous_seq"], "last_sig": first.facts["previous_sig"]}
    lines = lines_of(altered)
    put(altered / LOG, [*lines, forged(record.peek_seq(lines[-1]) + 1, "retention", facts=facts)])
    assert kinds(altered, public_only=True) == {"missing"}
    assert kinds(altered) == {"altered"}


def fork(directory: Path, now: int) -> None:
    """Continue the log of `directory` with the same number of lines each time, but with other lines."""
    log = open_log(directory, clock=Clock(now), limits=LogLimits(reserve_bytes=0))
    write_events(log, 3)
    log.writer.rotate(now + SECOND)
    write_events(log, 2)
    log.writer.rotate(now + 2 * SECOND)
    write_events(log, 2)
    log.close()


def test_segments_of_two_continuations_are_not_accepted_as_one_log(tmp_path: Path) -> None:
    """A directory that was copied, put back, and used again: same log id, same keys, same numbers, no shared end.

    No signature of its own file covers the SIG of a closing line; here it has the value that the next file names.
    """
    make_log(tmp_path / "a", 3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    fork(tmp_path / "a", NOW + 100 * SECOND)
    fork(tmp_path / "b", NOW + 200 * SECOND)
    assert verify(tmp_path / "a", public_only=True).intact
    for number in (1, 2):
        spliced = Path(shutil.copytree(tmp_path / "a", tmp_path / f"spliced{number}"))
        ours, theirs = ((tmp_path / name / f"{LOG}.{number}").read_bytes() for name in ("a", "b"))
        (spliced / f"{LOG}.{number}").write_bytes(theirs[: theirs.rindex(b'"sig"')] + ours[ours.rindex(b'"sig"') :])
        if number == 2:
            shutil.copy(tmp_path / "b" / f"{LOG}.1", spliced / f"{LOG}.1")
        assert kinds(spliced, public_only=True) == {"altered"}
        assert "altered" in kinds(spliced)


# --- with an audit key that was changed since -------------------------------------------------------------------------


def rewritten(lines: list[bytes], key: Key, before: LineRef = BEGINNING) -> list[bytes]:
    """The lines of a segment with another actor, with new MACs and signatures of `key`."""
    made: list[bytes] = []
    head, coverage = before, Coverage()
    for line in lines:
        event = record.parse_line(line)[0]
        if event.type in record.SIGNED_TYPES:
            log_id = bytes.fromhex(str(event.facts["log_id"]))
            extra: record.Facts = {name: event.facts[name] for name in ("next_segment", "next_key", "next_public_key")
                     if name in event.facts}  # fmt: skip
            blob, head = chain.signed_line(
                event.type,
                head=head,
                ts=event.ts,
                coverage=coverage,
                log_id=log_id,
                key=key.audit_key(),
                state=KeyState(),
                extra=extra,
            )
            coverage = Coverage()
        else:
            event.actor = event.actor.replace("peer_uid:1000", "peer_uid:0")
            blob, head = chain.make_lines([event], head, key.mac_key, event.ts)
        coverage.add(blob, 1)
        made.append(blob[:-1])
    return made


@pytest.fixture
def changed(tmp_path: Path) -> tuple[Path, LineRef]:
    """A log in two files whose key changed in the second, and its last line under the first key."""
    directory = tmp_path / "changed"
    make_log(directory, 5)
    log = open_log(directory)
    log.writer.rotate(NOW)
    write_events(log, 3)
    since = log.sign_and_sync()
    log.change_key(KEY2.audit_key())
    write_events(log, 3)
    log.close()
    return directory, since


def test_an_earlier_key_can_not_rewrite_a_closed_file(changed: tuple[Path, LineRef]) -> None:
    directory, since = changed
    assert verify(directory, KEY1, KEY2, since={2: since}).intact
    assert verify(directory, public_only=True).intact
    lines = (directory / f"{LOG}.1").read_bytes().split(b"\n")[:-1]
    forgery = rewritten(lines, KEY1)
    forgery[-1] = forgery[-1][:-46] + lines[-1][-46:]
    put(directory / f"{LOG}.1", forgery)
    assert "altered" in kinds(directory, KEY1, KEY2)
    assert kinds(directory, KEY1, public_only=True) == {"altered"}


def test_an_earlier_key_can_not_rewrite_lines_before_the_change(changed: tuple[Path, LineRef]) -> None:
    directory, since = changed
    lines = lines_of(directory)
    at = next(index for index, line in enumerate(lines) if b'"type":"audit_key"' in line)
    first = record.parse_line(lines[0])[0]
    previous = LineRef(first.seq - 1, decode_exact(first.facts["previous_sig"], 32) or b"")
    put(directory / LOG, rewritten(lines[: at + 1], KEY1, previous) + lines[at + 1 :])
    assert "foreign" in kinds(directory, KEY1, KEY2, since={2: since})
    assert "altered" in kinds(directory, KEY1, KEY2)
    assert "altered" in kinds(directory, KEY1, public_only=True)


def whole_log(directory: Path) -> None:
    make_log(directory, 20)


def log_that_changes_the_key(directory: Path) -> None:
    make_log(directory, 20)
    log = open_log(directory)
    log.change_key(KEY2.audit_key())
    log.close()


def log_that_goes_on_after_the_last_line(directory: Path) -> None:
    log = open_log(directory)
    write_events(log, 1)
    log.close()


@pytest.mark.parametrize("forge", [whole_log, log_that_changes_the_key, log_that_goes_on_after_the_last_line])
def test_an_earlier_key_can_not_make_another_log(tmp_path: Path, forge: Callable[[Path], None]) -> None:
    """The keyring records after which line the key changed; the verifier with the audit keys and a start know it."""
    make_log(tmp_path / "genuine", 8)
    log = open_log(tmp_path / "genuine")
    since = log.sign_and_sync()
    log.change_key(KEY2.audit_key())
    log.close()
    assert verify(tmp_path / "genuine", KEY1, KEY2, since={2: since}).intact
    forgery = tmp_path / "forged"
    shutil.copytree(tmp_path / "genuine", forgery)
    put(forgery / LOG, lines_of(forgery)[: since.seq])
    if forge is not log_that_goes_on_after_the_last_line:
        (forgery / LOG).unlink()
    forge(forgery)
    assert kinds(forgery, KEY1, KEY2, since={2: since}) & {"truncated", "foreign"}
    with pytest.raises(StartError, match=r"version 2 was introduced after"):
        open_log(forgery, KEY2, former=(KEY1.audit_key(),), since=since)


def test_an_earlier_key_can_not_introduce_a_forged_key(tmp_path: Path) -> None:
    forger = Key(2)
    forger.seed = memoryview(bytearray([9] * 32))
    log = make_log(tmp_path, 3)
    log = open_log(tmp_path)
    log.change_key(forger.audit_key())
    log.close()
    assert kinds(tmp_path, KEY1, KEY2) == {"foreign"}


def test_the_report_names_the_public_key_active_at_the_end(changed: tuple[Path, LineRef]) -> None:
    """A verifier with only a public key compares it with the newest one it knows: the log may end before the change."""
    directory, since = changed
    report = verify(directory, KEY1, public_only=True)
    assert (report.key_version, report.public_key) == (2, KEY2.public_key)
    lines = lines_of(directory)
    put(directory / LOG, [line for line in lines if record.peek_seq(line) <= since.seq])
    report = verify(directory, KEY1, public_only=True)
    assert (report.intact, report.key_version, report.public_key) == (True, 1, KEY1.public_key)


def test_a_change_of_key_is_completed_also_after_an_incomplete_line(tmp_path: Path) -> None:
    make_log(tmp_path, 3)
    log = open_log(tmp_path)
    since = log.sign_and_sync()
    log.close()
    with open(tmp_path / LOG, "ab") as file:
        file.write(b'{"event":{"seq":')
    assert kinds(tmp_path, KEY1, KEY2, since={2: since}) == {"incomplete", "truncated"}
    open_log(tmp_path, KEY2, former=(KEY1.audit_key(),), since=since).close()
    events = events_of(tmp_path / LOG)[since.seq :]
    assert [event.type for event in events] == ["audit_key", "recovery", "checkpoint"]
    assert events[1].facts["file"] == f"{LOG}.torn-{events[1].seq}"
    assert (tmp_path / f"{LOG}.torn-{events[1].seq}").exists()
    assert verify(tmp_path, KEY1, KEY2, since={2: since}).intact


def test_a_close_after_settle_writes_nothing(tmp_path: Path) -> None:
    """Otherwise the recorded line after which a new key begins would not be the last one."""
    log = open_log(tmp_path)
    log.add(encrypt_event())
    since = log.sign_and_sync()
    assert events_of(tmp_path / LOG)[-1].type == "checkpoint"
    log.close()
    assert log.head == {"seq": since.seq, "sig": encode_text(since.sig)}


def test_a_retention_line_is_signed_before_the_deletion(tmp_path: Path) -> None:
    from minikms_daemon.audit.maintenance import LogRetention, remove_segments

    make_segments(tmp_path)
    log = open_log(tmp_path, clock=Clock(now=NOW + 3600 * SECOND))
    assert remove_segments(log, LogRetention(bytes_max=1, days_min=0))
    report = verify(tmp_path, public_only=True)
    assert report.intact and report.first_seq > 1, "also while the log goes on"
    log.close()
