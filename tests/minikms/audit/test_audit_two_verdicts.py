"""Two independent verifiers agree about logs that were altered at random, and accept no altered log.

There are two kinds of alterations: of bytes, lines and files, by someone who can write the files; and of events before
they are chained and signed again, by someone who has the keys, which reach the rules after MAC and signature.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minikms.api.base64 import decode_exact, encode_text
from minikms.audit import chain, record
from minikms.audit.chain import Coverage
from minikms.audit.log import LogLimits
from minikms.audit.reader import DamagedSegmentError, each_segment, list_segments
from minikms.audit.record import Event, LineRef
from minikms_daemon.audit.maintenance import LogRetention, compress_closed, remove_segments
from tests.minikms.audit.logmaker import (
    KEY1,
    KEY2,
    LOG,
    Clock,
    Key,
    encrypt_event,
    lines_of,
    open_log,
    verify,
    write_events,
)

EXAMPLES = int(os.environ.get("AUDIT_FUZZ_EXAMPLES", "120"))
NOW = 1_700_000_000_000_000_000
Draw = st.DataObject

NUMBERS = ("0", "-1", "1.0", "1e0", "01", "1", "2", "9223372036854775807", "9223372036854775808", "true", "null", '"1"')
TEXTS = ("", " ", "[]", "{}", "genesis", "segment_open", "checkpoint", "A" * 44, "A" * 43 + "=", "00" * 32, "ok")
BYTES = (b"\x00", b"\n", b"\r\n", b"\r", b"\\", b"\\u006f", b"\x7f", b"\xff", b'"', b"{", b",", b" ", b"\x1b[2J", b"%")


def lines_until(directory: Path, until: int) -> list[bytes]:
    """The log's lines up to that number."""
    lines = [line for file in each_segment(str(directory)) for line in file.lines()]
    return [line for line in lines if record.peek_seq(line) <= until]


class Original:
    """A log in several files whose key changed, and another end that it might have taken. Not `whole`: its first files
    were removed by retention.
    """

    def __init__(self, directory: Path, *, compressed: bool, whole: bool) -> None:
        self.directory = directory / "log"
        self.other = directory / "other"
        self.directory.mkdir(parents=True)
        log = open_log(self.directory, clock=Clock(NOW), limits=LogLimits(reserve_bytes=0))
        write_events(log, 3)
        log.writer.rotate(NOW)
        write_events(log, 2)
        log.writer.checkpoint(NOW)
        self.since = log.sign_and_sync()
        log.close()
        shutil.copytree(self.directory, self.other)
        for place, ts in ((self.directory, NOW), (self.other, NOW + 10**9)):
            log = open_log(place, KEY2, former=(KEY1.audit_key(),), clock=Clock(ts), limits=LogLimits(reserve_bytes=0))
            write_events(log, 2)
            log.writer.rotate(ts)
            if not whole:
                remove_segments(log, LogRetention(bytes_max=1, days_min=0))
            log.add(encrypt_event(7, thread_id="t", key_ids=["k"], detail="a word"))
            log.close()
        if compressed:
            compress_closed(str(self.directory))
        known = lines_of(self.directory)[-2]
        self.head = LineRef(record.peek_seq(known), record.split_line(known)[1])
        self.keys = (KEY1, KEY2) if whole else (KEY2, KEY1)
        self.lines = lines_until(self.directory, self.head.seq)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    place = tmp_path_factory.mktemp("originals")
    return [
        Original(place / name, compressed=compressed, whole=whole)
        for name, compressed, whole in (("plain", False, True), ("compressed", True, True), ("shortened", False, False))
    ]


@pytest.fixture(scope="module", autouse=True)
def nobody_writes() -> Iterator[None]:
    """A reader need not wait for a line to be completed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minikms.audit.reader.GROWTH_WAIT_S", 0)
        yield


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name.startswith(LOG))


def draw_file(draw: Draw, directory: Path) -> Path:
    return draw.draw(st.sampled_from(files(directory)))


# --- alterations by somebody who can write the files ------------------------------------------------------------------


def alter_bytes(draw: Draw, directory: Path, _: Original) -> None:
    path = draw_file(draw, directory)
    content = path.read_bytes()
    begin = draw.draw(st.integers(0, len(content)))
    end = draw.draw(st.integers(begin, min(len(content), begin + 300)))
    new = draw.draw(st.one_of(st.sampled_from(BYTES), st.binary(max_size=3)))
    path.write_bytes(content[:begin] + new + content[end:])


def alter_value(draw: Draw, directory: Path, _: Original) -> None:
    """A value of some member of some line becomes another, or is there twice."""
    path = draw_file(draw, directory)
    lines = path.read_bytes().split(b"\n")
    at = draw.draw(st.integers(0, len(lines) - 1))
    parts = lines[at].split(b":")
    member = draw.draw(st.integers(0, len(parts) - 1))
    value, comma, rest = parts[member].partition(b",")
    new = draw.draw(st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS).map(lambda text: f'"{text}"'))).encode()
    if draw.draw(st.booleans()):
        parts[member] = new + comma + rest
    else:
        parts[member] += b"," + rest + b":" + value
    lines[at] = b":".join(parts)
    path.write_bytes(b"\n".join(lines))


def alter_lines(draw: Draw, directory: Path, original: Original) -> None:
    """Lines are dropped, repeated, moved, or taken from elsewhere; or one gets the SIG of another."""
    path, source = draw_file(draw, directory), draw_file(draw, draw.draw(st.sampled_from([directory, original.other])))
    lines, theirs = path.read_bytes().split(b"\n"), source.read_bytes().split(b"\n")
    at, begin = draw.draw(st.integers(0, len(lines) - 1)), draw.draw(st.integers(0, len(theirs) - 1))
    taken = theirs[begin : begin + draw.draw(st.integers(0, 4))]
    if draw.draw(st.integers(0, 3)) == 0 and taken:
        lines[at] = lines[at][:-46] + taken[0][-46:]
    else:
        lines[at : at + draw.draw(st.integers(0, 4))] = taken
    path.write_bytes(b"\n".join(lines))


def alter_files(draw: Draw, directory: Path, original: Original) -> None:
    """A file takes another's place, name or form, or is gone, or is two."""
    source = draw_file(draw, draw.draw(st.sampled_from([directory, original.other])))
    content = source.read_bytes()
    number = draw.draw(st.sampled_from(["", ".1", ".2", ".3", ".4", ".5", ".0", ".01", ".9", ".99999999999999"]))
    form = draw.draw(st.sampled_from(["", "", ".zst"]))
    target = directory / f"{LOG}{number}{form}"
    act = draw.draw(st.sampled_from(["copy", "move", "swap", "append", "drop", "cut", "compress"]))
    if act == "drop":
        draw_file(draw, directory).unlink()
    elif act == "cut":
        at = content.rfind(b"\n", 0, draw.draw(st.integers(0, len(content)))) + 1
        target.write_bytes(content[:at])
    elif act == "append":
        target.write_bytes((target.read_bytes() if target.exists() else b"") + content)
    else:
        before = target.read_bytes() if target.exists() else None
        target.write_bytes(content)
        if act == "move" and source.parent == directory and source != target:
            source.unlink()
        elif act == "swap" and before is not None and source.parent == directory:
            source.write_bytes(before)
        elif act == "compress" and number:
            target.unlink()
            (directory / f"{LOG}{number}").write_bytes(content)
            compress_closed(str(directory))


# --- alterations by somebody who has the keys -------------------------------------------------------------------------


def alter_events(draw: Draw, directory: Path, _: Original) -> None:
    """Events are altered, dropped, repeated; then all is numbered, chained and signed again, as far as it can be."""
    events: list[tuple[Path, Event]] = []
    try:
        for file in each_segment(str(directory)):
            path = directory / file.name.removesuffix(".zst")
            events += [(path, record.parse_line(line)[0]) for line in file.lines()]
    except (record.MalformedLineError, DamagedSegmentError):
        return
    if not events:
        return
    for path in directory.glob("*.zst"):
        path.unlink()
    for _change in range(draw.draw(st.integers(1, 2))):
        alter_event(draw, events)
    renumber = draw.draw(st.booleans())
    write_again(events, renumber=renumber)


def alter_event(draw: Draw, events: list[tuple[Path, Event]]) -> None:
    at = draw.draw(st.integers(0, len(events) - 1))
    path, event = events[at]
    facts = dict(event.facts)
    event = msgspec.structs.replace(event, facts=facts)
    act = draw.draw(st.sampled_from(["fact", "fact", "fact", "type", "drop", "repeat", "seq", "move"]))
    if act == "fact" and facts:
        name = draw.draw(st.sampled_from(sorted(facts)))
        others = [value for _, other in events for value in [other.facts.get(name)] if value is not None]
        own: list[str | int] = [0, 1, 2, 3, 4, 5, 2**63 - 1, *TEXTS]
        value = draw.draw(st.one_of(st.sampled_from(own), st.sampled_from(others)))
        change = draw.draw(st.sampled_from(["set", "set", "drop", "add"]))
        if change == "set":
            facts[name] = value
        elif change == "drop":
            del facts[name]
        else:
            facts["more"] = value
        events[at] = (path, event)
    elif act == "type":
        types = sorted({other.type for _, other in events} | {"retention", "genesis"})
        event.type = draw.draw(st.sampled_from(types))
        events[at] = (path, event)
    elif act == "drop" and len(events) > 1:
        del events[at]
    elif act == "repeat":
        events.insert(at, (path, event))
    elif act == "move":
        events[at] = (draw.draw(st.sampled_from([other for other, _ in events])), event)
    elif act == "seq":
        event.seq = draw.draw(st.sampled_from([1, 2, event.seq + 1, event.seq - 1 or 1, 2**63 - 1]))
        events[at] = (path, event)


def write_again(events: list[tuple[Path, Event]], *, renumber: bool) -> None:
    content: dict[Path, bytes] = {path: b"" for path, _ in events}
    first = events[0][1]
    sig = decode_exact(first.facts.get("previous_sig"), 32) or record.ZERO_MAC
    seq = first.seq - 1
    key: Key = KEY2 if first.facts.get("key") == 2 else KEY1
    coverage, last, last_seq = Coverage(), b"", 0
    for path, event in events:
        seq = seq + 1 if renumber else event.seq
        event.seq = seq
        facts = event.facts
        if event.type in ("genesis", "segment_open"):
            if "previous_sig" in facts and last and renumber:
                facts |= {"previous_sig": encode_text(sig), "previous_seq": last_seq}
                facts["previous_sha256"] = coverage.hex()
            coverage = Coverage()
        if event.type in record.SIGNED_TYPES and "signature" in facts:
            if renumber:
                facts |= {"lines": coverage.lines_count, "lines_sha256": coverage.hex()}
                facts["previous_sig"] = encode_text(sig)
            facts["signature"] = encode_text(key.audit_key().signer.sign(chain.signed_message(event)))
            coverage = Coverage()
        event_bytes = record.encode_event(event)
        sig = chain.mac(key.mac_key, sig, event_bytes)
        last, last_seq = record.encode_line(event_bytes, sig), seq
        coverage.add(last, 1)
        content[path] = content[path] + last
        if event.type == "audit_key" and facts.get("next_key") == 2:
            key = KEY2
    for path, whole in content.items():
        path.write_bytes(whole)


ALTERATIONS: tuple[Callable[[Draw, Path, Original], None], ...] = (
    alter_bytes,
    alter_value,
    alter_lines,
    alter_files,
    alter_events,
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_two_verifiers_agree_on_whatever_was_altered(originals: list[Original], data: st.DataObject) -> None:
    """`verify` of `logmaker` asks both and compares them."""
    original = data.draw(st.sampled_from(originals))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(shutil.copytree(original.directory, Path(temporary) / "log"))
        for _ in range(data.draw(st.integers(1, 2))):
            if not files(directory):
                break
            data.draw(st.sampled_from(ALTERATIONS))(data, directory, original)
        since = {2: original.since} if data.draw(st.booleans()) else {}
        head = original.head if data.draw(st.booleans()) else None
        if not (directory / LOG).exists() and not list_segments(str(directory)):
            return
        verify(directory, *original.keys, since=since, expect_head=head)
        verify(directory, original.keys[0], public_only=True, expect_head=head)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_no_alteration_without_a_key_is_accepted(originals: list[Original], data: st.DataObject) -> None:
    """With the audit keys and a known head, so that a clean cut at the end shows too."""
    original = data.draw(st.sampled_from(originals))
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(shutil.copytree(original.directory, Path(temporary) / "log"))
        data.draw(st.sampled_from(ALTERATIONS[:4]))(data, directory, original)
        if not (directory / LOG).exists() and not list_segments(str(directory)):
            return
        if verify(directory, *original.keys, since={2: original.since}, expect_head=original.head).intact:
            assert lines_until(directory, original.head.seq) == original.lines
