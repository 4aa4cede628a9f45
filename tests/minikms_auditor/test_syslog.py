"""Syslog: frames that nothing in a line can end, and what a real `rsyslogd` writes of them."""

import json
import re
import time
from pathlib import Path

import pytest

from minikms.audit import record
from minikms.audit.record import Event
from minikms_auditor.config import SyslogSink
from minikms_auditor.sinks import SinkMessage
from minikms_auditor.syslog import Syslog, frame
from tests.harness.certificates import CLIENT, SERVER, Authority
from tests.minikms.audit.logmaker import open_log
from tests.minikms_auditor.receivers import Peer, Rsyslog, ShippingRig, take_frames

SINKS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "spec" / "sinks.md"
SETTLE_S = 0.1
RFC5424 = re.compile(
    rb"<(1?[0-9]{1,2})>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) ([!-~]{1,255}) ([!-~]{1,48}) - ([!-~]{1,32}) - (.*)"
)


def syslog_rig(
    base: Path, url: str, *, exchange_seconds: float = 30, ca: str = "", cert: str = "", key: str = ""
) -> ShippingRig:
    sink = SyslogSink(name="siem", url=url, ca=ca, cert=cert, key=key)
    return ShippingRig(
        base, sink, lambda files: Syslog(sink, files, settle_seconds=SETTLE_S, exchange_seconds=exchange_seconds)
    )


def ship_and_settle(rig: ShippingRig) -> str:
    """The error of the sink, empty once its receiver certainly has every line."""
    while True:
        rig.start_once()
        failures = rig.sinks[0].status().failures
        status = rig.ship()
        if status.failures > failures or not status.lag_lines:
            return status.error
        time.sleep(SETTLE_S)


def message_of(log_id: str, line: bytes) -> SinkMessage:
    event, _, sig = record.parse_line(line)
    return SinkMessage(log_id, event, line, sig, b'{"log_id":"%b","seq":%d,%b' % (log_id.encode(), event.seq, line[1:]))


def test_the_frame_is_the_one_of_the_specification() -> None:
    blocks = re.findall(r"```\n(.*?)\n(.*?)\n```", SINKS_PAGE.read_text("utf-8"))
    [(line, framed)] = blocks
    [log_id] = re.findall(r'"log_id":"([0-9a-f]{32})"', framed)
    assert frame(message_of(log_id, line.encode()), b"kms1") == framed.encode()


def test_no_text_can_end_a_frame_or_begin_another_line(tmp_path: Path) -> None:
    """Every byte in every text of an event, as a hostile caller would send it."""
    every = "".join(map(chr, range(0x100)))
    forged = '\n<13>1 - - - - - - {"log_id":"","seq":1}\n5 <13>1"}'
    log = open_log(tmp_path)
    for text in (*every, every, forged):
        log.add(
            Event(
                type=text, actor=text, key_id=text, key_ids=[text] * 2, thread_id=text, outcome=text or "ok",
                request_id=text, request_ids=[text], detail=text, facts={text: text},
            )
        )  # fmt: skip
        log.commit()
    log.close()
    lines = (tmp_path / "minikms-audit.log").read_bytes().split(b"\n")[:-1]
    assert len(lines) > 0x100 + 2
    sent = [message_of("x", line) for line in lines]
    stream = b"".join(frame(each, b"host") for each in sent)
    found = take_frames(stream)
    assert len(found) == len(sent)
    for message, each in zip(found, sent, strict=True):
        assert b"\n" not in message
        parts = RFC5424.fullmatch(message)
        assert parts is not None and parts[6] == each.body
        assert json.loads(parts[6])["seq"] == each.event.seq
        assert parts[1] == (b"110" if each.event.outcome == "ok" else b"108")


def test_rsyslog_writes_every_line_also_the_longest(tmp_path: Path) -> None:
    """Over TCP. A line has at most 1 MiB, which rsyslog takes with the recipe's two settings."""
    with Rsyslog(tmp_path / "rsyslog") as receiver, syslog_rig(tmp_path, f"tcp://127.0.0.1:{receiver.port}") as rig:
        log = open_log(rig.log_dir, clock=rig.clock)
        texts = ["%" * 85] * 1024
        log.add(
            Event(
                type="encrypt_batch", actor="peer_uid:1", key_ids=texts, request_ids=texts,
                detail="x" * 1000, facts={f"{n:02}" + "y" * 200: "z" * 1024 for n in range(64)},
            )
        )  # fmt: skip
        log.commit()
        log.close()
        rig.write(20)
        assert ship_and_settle(rig) == ""
        assert max(map(len, rig.lines())) > 600_000
        assert receiver.lines() == rig.bodies()
        receiver.kill()
        receiver.out.unlink()
        rig.write(2)
        assert "refused" in ship_and_settle(rig)
        receiver.start()
        assert ship_and_settle(rig) == ""
        assert receiver.lines() == rig.bodies()[-len(receiver.lines()) :]


def test_rsyslog_on_a_full_disk_loses_what_it_has_read(tmp_path: Path) -> None:
    """All is well for the sink meanwhile. RELP is no better: imrelp acknowledges such messages too, also with a synced
    disk queue (tried with 8.2504). So a sink of syslog can't be required.
    """
    full = Path("/dev/full")
    receiver = Rsyslog(tmp_path / "rsyslog", out=full)
    with receiver, syslog_rig(tmp_path, f"tcp://127.0.0.1:{receiver.port}") as rig:
        rig.write(20)
        assert ship_and_settle(rig) == ""
        assert rig.sinks[0].status().seq == len(rig.lines())
        assert "No space left on device" in (tmp_path / "rsyslog" / "log").read_text()


def test_rsyslog_over_tls_takes_lines_of_a_known_certificate(tmp_path: Path) -> None:
    ours, others = Authority("ours"), Authority("others")
    base = tmp_path / "rsyslog"
    base.mkdir()
    (base / "ca.pem").write_bytes(ours.pem)
    cert, key = ours.issue(dns=["localhost"], extended=[SERVER]).write(base, "server")
    with Rsyslog(base, tls=(base / "ca.pem", cert, key)) as receiver:
        for name, trusted, issuer, said in (
            ("wrong-server", others, ours, "CERTIFICATE_VERIFY_FAILED"),
            ("wrong-client", ours, others, "."),
            ("right", ours, ours, ""),
        ):
            place = tmp_path / name
            place.mkdir()
            place.chmod(0o700)
            (place / "ca.pem").write_bytes(trusted.pem)
            issuer.issue(dns=["auditor.example.com"], extended=[CLIENT]).write(place)
            url = f"tls://localhost:{receiver.port}"
            with syslog_rig(place, url, ca="ca.pem", cert="client.pem", key="client.key") as rig:
                rig.write(10)
                error = ship_and_settle(rig)
                assert re.search(said, error) if said else error == ""
                assert receiver.lines() == ([] if said else rig.bodies())


def test_a_receiver_that_stops_reading_loses_nothing(tmp_path: Path) -> None:
    """Its kernel takes what fits into its buffers. That counts for nothing, and the sink names the fault."""
    with Peer(reads=False) as peer, syslog_rig(tmp_path, peer.url, exchange_seconds=0.3) as rig:
        rig.write(20)
        status = rig.ship()
        assert "does not read" in status.error and status.seq == 0
        rig.stop()
        with Peer() as other:
            rig.connect = lambda files: Syslog(SyslogSink(name="siem", url=other.url), files, settle_seconds=SETTLE_S)
            assert ship_and_settle(rig) == ""
            assert bodies(other) == rig.bodies()


@pytest.mark.parametrize("taken", [1, 5000, 10**9])
def test_a_receiver_that_is_killed_gets_its_lines_again(tmp_path: Path, taken: int) -> None:
    """Before it has read everything, or after that, while what it has read is in its memory only. The connection alone
    does not show that: the kernel of a killed receiver closes it as an orderly one does.
    """
    with Peer(taken=taken) as peer, syslog_rig(tmp_path, peer.url) as rig:
        rig.write(50)
        assert ship_and_settle(rig) != ""
        assert rig.sinks[0].status().seq == 0
        peer.taken = None
        peer.received.clear()
        peer.start()
        assert ship_and_settle(rig) == ""
        assert bodies(peer) == rig.bodies()


def test_a_receiver_that_is_killed_between_batches_gets_its_lines_again(tmp_path: Path) -> None:
    """Another one listens in its place at once. The connection that was opened for the next batch has ended, and what
    is sent on it would seem to be read.
    """
    with Peer() as peer, syslog_rig(tmp_path, peer.url) as rig:
        rig.write(20)
        rig.ship()
        peer.kill()
        peer.received.clear()
        peer.start()
        rig.write(20)
        rig.ship()
        assert ship_and_settle(rig) == ""
        assert bodies(peer) == rig.bodies()


def bodies(peer: Peer) -> list[bytes]:
    """Of the messages of all connections, in order."""
    found = []
    for message in [each for received in peer.received for each in take_frames(bytes(received))]:
        parts = RFC5424.fullmatch(message)
        assert parts is not None
        found.append(parts[6])
    return found
