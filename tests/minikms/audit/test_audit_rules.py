"""Each rule of the specification is checked separately: each log has valid MACs and signatures, but breaks one rule.

Only a process with the audit keys can write such a log, for example a faulty daemon. `make_vectors.Maker` writes the
logs. Each is verified twice: with the audit keys, and with the public key alone.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from minikms.api.base64 import encode_text
from minikms.audit import chain, record
from minikms.audit.chain import Coverage
from minikms.audit.record import Event, Facts, LineRef
from tests.minikms.audit.logmaker import KEY1, KEY2, LOG, encrypt_event, verify
from tests.minikms.audit.make_vectors import LOG_ID, STATE, Maker, put

FIRST = f"{LOG}.1"
OTHER_SIG = encode_text(bytes(range(32)))


def begun(file: str = LOG, **changes: str | int) -> Maker:
    """A log with a genesis line and an event. `changes` replace facts of the genesis line."""
    maker = Maker()
    genesis = chain.genesis_event(LOG_ID, 1, KEY1.public_key, {})
    genesis.facts.update(changes)
    maker.begin(file, genesis)
    maker.add(encrypt_event(1))
    return maker


def signed(event_type: str = "checkpoint", *, extra: Facts | None = None, **changes: str | int) -> Callable[[], Maker]:
    """A log with a genesis line, an event and a signed line. `changes` replace facts of the signed line."""

    def make() -> Maker:
        maker = begun()
        facts: Facts = {
            "epoch": STATE.epoch,
            "key": 1,
            "lines": 2,
            "lines_sha256": maker.coverage.hex(),
            "log_id": LOG_ID.hex(),
            "previous_sig": encode_text(maker.head.sig),
            "tombstones": STATE.tombstones,
            **(extra or {}),
            **changes,
        }
        event = Event(seq=3, ts=maker.ts + 1, type=event_type, actor=record.ACTOR_SELF, facts=facts)
        event.facts["signature"] = encode_text(maker.key.signer.sign(chain.signed_message(event)))
        event_bytes = record.encode_event(event)
        sig = chain.mac(maker.key.mac_key, maker.head.sig, event_bytes)
        maker.take(record.encode_line(event_bytes, sig), LineRef(3, sig))
        return maker

    return make


def two_files(close: Facts | None = None, **changes: str | int) -> Callable[[], Maker]:
    """A closed file and the next file. `changes` replace facts of the first line of the next file."""

    def make() -> Maker:
        maker = begun(FIRST)
        maker.sign("segment_close", close or {"next_segment": 2})
        opening = maker.opening()
        opening.facts.update(changes)
        maker.begin(LOG, opening)
        maker.add(encrypt_event(2))
        maker.sign("checkpoint")
        return maker

    return make


def with_lines(*events: Event) -> Callable[[], Maker]:
    def make() -> Maker:
        maker = begun()
        for event in events:
            maker.add(event)
        maker.sign("checkpoint")
        return maker

    return make


def closed_without_next_file() -> Maker:
    maker = begun()
    maker.sign("segment_close", {"next_segment": 2})
    return maker


def line_after_the_close() -> Maker:
    maker = closed_without_next_file()
    maker.add(encrypt_event(2))
    return maker


OPENING = chain.segment_open_event(
    LOG_ID, 1, KEY1.public_key, segment=2, previous=LineRef(2, bytes(32)), closed=Coverage(), state=STATE
)


@pytest.mark.parametrize(
    "make", [signed(), two_files(), with_lines(encrypt_event(2))], ids=["checkpoint", "two files", "events"]
)
def test_a_log_that_breaks_no_rule_is_intact(tmp_path: Path, make: Callable[[], Maker]) -> None:
    put(make().files, tmp_path)
    assert verify(tmp_path).intact
    assert verify(tmp_path, public_only=True).intact


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(lambda: begun(format=2), "foreign", id="another format"),
        pytest.param(lambda: begun(key=9), "foreign", id="an unknown key version"),
        pytest.param(lambda: begun(public_key=encode_text(KEY2.public_key)), "foreign", id="another public key"),
        pytest.param(lambda: begun(segment=2), "altered", id="a genesis line of segment 2"),
        pytest.param(signed(log_id="ff" * 16), "foreign", id="signed for another log"),
        pytest.param(signed(key=2), "foreign", id="signed for another key version"),
        pytest.param(signed(previous_sig=OTHER_SIG), "altered", id="signed after another line"),
        pytest.param(signed(lines=1), "altered", id="signed for fewer lines"),
        pytest.param(signed(lines_sha256="00" * 32), "altered", id="signed for other lines"),
        pytest.param(signed(extra={"next_segment": 2}), "altered", id="a checkpoint with an additional fact"),
        pytest.param(signed("segment_close"), "altered", id="a close that names no next file"),
        pytest.param(
            signed("segment_close", next_segment=3), "segment", id="a close that names the file after the next"
        ),
        pytest.param(
            signed("audit_key", next_key=1, next_public_key=encode_text(KEY2.public_key)),
            "altered",
            id="a key change to the same version",
        ),
        pytest.param(
            signed("audit_key", next_key=2, next_public_key="AAAA"), "altered", id="a public key of another size"
        ),
        pytest.param(with_lines(chain.genesis_event(LOG_ID, 1, KEY1.public_key, {})), "segment", id="a second genesis"),
        pytest.param(with_lines(OPENING), "segment", id="an opening inside a file"),
        pytest.param(closed_without_next_file, "missing", id="the next file is missing"),
        pytest.param(line_after_the_close, "segment", id="a line after the close"),
        pytest.param(two_files(previous_sig=OTHER_SIG), "segment", id="a file that names another previous MAC"),
        pytest.param(two_files(previous_seq=7), "altered", id="a file that names another previous seq"),
        pytest.param(two_files(log_id="ff" * 16), "foreign", id="a file of another log"),
        pytest.param(two_files(key=2), "foreign", id="a file under another key version"),
        pytest.param(
            two_files(public_key=encode_text(KEY2.public_key)), "foreign", id="a file under another public key"
        ),
        pytest.param(two_files(segment=3), "segment", id="a file of another segment number"),
        pytest.param(two_files(format=2), "foreign", id="a file of another format"),
        pytest.param(two_files(more=1), "altered", id="a file whose first line has an additional fact"),
        pytest.param(
            two_files(previous_sha256="00" * 32), "altered", id="a file that names another hash of the previous line"
        ),
        pytest.param(lambda: begun(key=0), "foreign", id="no key version"),
        pytest.param(lambda: begun(key="1"), "foreign", id="a key version that is a string"),
        pytest.param(lambda: begun(log_id="../.."), "altered", id="a log id of another form"),
    ],
)
def test_a_log_that_breaks_one_rule_is_not_intact(tmp_path: Path, make: Callable[[], Maker], kind: str) -> None:
    put(make().files, tmp_path)
    report = verify(tmp_path)
    assert kind in {finding.kind for finding in report.findings}, report.findings
    public = verify(tmp_path, public_only=True)
    assert not public.intact or "version" in report.findings[0].text, "the public key alone can't check key versions"


def test_a_missing_key_version_is_found_with_the_public_key_too(tmp_path: Path) -> None:
    maker = begun(key=0)
    maker.key = maker.key._replace(version=0)
    maker.sign("checkpoint")
    put(maker.files, tmp_path)
    assert [finding.kind for finding in verify(tmp_path, public_only=True).findings] == ["foreign"]


def test_a_change_to_an_unknown_key_version_is_foreign(tmp_path: Path) -> None:
    maker = begun()
    maker.sign("audit_key", {"next_key": 5, "next_public_key": encode_text(KEY2.public_key)})
    put(maker.files, tmp_path)
    assert [finding.kind for finding in verify(tmp_path).findings] == ["foreign"]
    assert verify(tmp_path, public_only=True).intact


def shortened(last_sig: str | None = None, **changes: str | int) -> Maker:
    """A log without its first file, with a line that explains it. `changes` replace facts of its first line."""
    maker = begun(FIRST)
    maker.sign("segment_close", {"next_segment": 2})
    closed = maker.head
    opening = maker.opening()
    opening.facts.update(changes)
    maker.begin(LOG, opening)
    facts: Facts = {"last_seq": closed.seq, "last_sig": last_sig or encode_text(closed.sig), "removed_segment": 1}
    maker.add(Event(type="retention", actor="minikms", facts=facts))
    maker.sign("checkpoint")
    return maker


def test_a_retention_line_with_another_head_explains_no_missing_file(tmp_path: Path) -> None:
    """It explains the missing file only if it names the head before the first file that is present."""
    for last_sig, intact in ((None, True), (OTHER_SIG, False)):
        put({LOG: shortened(last_sig).files[LOG]}, tmp_path)
        assert verify(tmp_path).intact is intact


@pytest.mark.parametrize("number", [0, 1])
def test_a_log_cannot_begin_with_the_opening_of_segment_0_or_1(tmp_path: Path, number: int) -> None:
    """Segments are numbered from 1, and the first one begins with a genesis line."""
    put({LOG: shortened(segment=number).files[LOG]}, tmp_path)
    for public_only in (False, True):
        assert [finding.kind for finding in verify(tmp_path, public_only=public_only).findings] == ["segment"]
